# SPDX-License-Identifier: Apache-2.0
"""The ledger keeps what was proven and forgets it when the source moves; tables agree with it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fmha_runtime import catalog, ledger, sources
from fmha_runtime.errors import ArtifactError
from fmha_runtime.spec import KernelSpec

ROOT = Path(__file__).resolve().parent.parent
SPEC = KernelSpec.parse("fmha_fwd_sm90_bf16_d64")
sys.path.insert(0, str(ROOT / "tools"))

import gen_tables  # noqa: E402


def record(spec: KernelSpec = SPEC, how: str = "cubin") -> ledger.Record:
    """A current record."""
    return ledger.Record(
        name=spec.name,
        how=how,
        source_hash=sources.source_hash(spec),
        tile=str(catalog.tile(spec)),
        sha256="00" if how == "cubin" else None,
        nvcc="13.0",
        device="CPU emulator" if how == "emulator" else "Some GPU",
        capability=None if how == "emulator" else "9.0",
        driver=None if how == "emulator" else "580.1",
        cases=128,
        skipped=0,
        worst_rel_l2=2.3e-3,
        worst_ratio=0.4,
        date="2026-11-21T10:00:00+00:00",
        commit="abc",
    )


def test_records_are_kept_sorted_one_per_line(tmp_path: Path) -> None:
    file = tmp_path / "verified.json"
    other = replace(record(), name="fmha_fwd_sm90_bf16_d128")
    ledger.record([record(how="emulator"), record()], file)
    ledger.record([other, replace(record(), cases=99)], file)
    assert ledger.load(file) == (other, replace(record(), cases=99), record(how="emulator"))
    text = file.read_text()
    assert json.loads(text)["schema"] == ledger.SCHEMA
    assert sum('"name"' in line for line in text.splitlines()) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["verified.json"]


def test_a_missing_ledger_is_an_empty_one(tmp_path: Path) -> None:
    assert ledger.load(tmp_path / "verified.json") == ()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"schema": 99, "records": []}',
        '{"schema": 1, "records": [{"name": "x"}]}',
        '{"schema": 1, "records": [3]}',
        '{"schema": 1}',
    ],
)
def test_a_damaged_ledger_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    file = tmp_path / "verified.json"
    file.write_text(text)
    with pytest.raises(ArtifactError, match=r"verified\.json") as caught:
        ledger.load(file)
    assert caught.value.path == file
    with pytest.raises(ArtifactError):
        ledger.record([record()], file)
    assert file.read_text() == text


def test_a_failed_write_leaves_the_old_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "verified.json"
    ledger.record([record()], file)

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        ledger.record([record(how="ptx")], file)
    assert ledger.load(file) == (record(),)
    assert [path.name for path in tmp_path.iterdir()] == ["verified.json"]


def test_only_a_gpu_record_of_the_present_source_and_tile_verifies() -> None:
    def word(*records: ledger.Record) -> tuple[str, bool]:
        status = ledger.status(SPEC, records)
        return status.word, status.emulated

    assert word() == ("unverified", False)
    assert word(record()) == ("verified", False)
    assert word(record(how="ptx")) == ("verified", False)
    assert word(record(how="emulator")) == ("unverified", True)
    assert word(record(), record(how="emulator")) == ("verified", True)
    assert word(replace(record(), source_hash="0" * 64)) == ("stale", False)
    assert word(replace(record(), tile="16x16 w1 s2 c1")) == ("stale", False)
    assert word(replace(record(), source_hash="0" * 64), record(how="ptx")) == ("verified", False)
    assert word(replace(record(how="emulator"), source_hash="0" * 64)) == ("unverified", False)
    assert word(replace(record(), name="fmha_fwd_sm90_bf16_d128")) == ("unverified", False)


def test_the_status_says_why() -> None:
    assert "cubin on Some GPU, 128 cases" in ledger.status(SPEC, [record(how="ptx"), record()]).reason
    moved = ledger.status(SPEC, [replace(record(), tile="16x16 w1 s2 c1")])
    assert "16x16 w1 s2 c1" in moved.reason and str(catalog.tile(SPEC)) in moved.reason
    edited = ledger.status(SPEC, [replace(record(), source_hash="f" * 64)])
    assert "ffffffffffff" in edited.reason


def test_the_commit_is_that_of_git() -> None:
    if not (ROOT / ".git").exists():
        assert ledger.commit() is None
        return
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ledger.commit() == asked.stdout.strip()


def test_the_committed_ledger_is_readable_and_names_kernels_that_exist() -> None:
    for found in ledger.load(ROOT / "cubins" / "verified.json"):
        assert catalog.exists(KernelSpec.parse(found.name))


def test_the_support_table_tells_how_each_kernel_was_proven(tmp_path: Path) -> None:
    ours = [s for s in catalog.enumerate_specs() if s.head_dim == 64]
    assert {gen_tables.proof(spec, []) for spec in ours} == {"unverified"}
    file = tmp_path / "cubins" / "verified.json"
    fp16 = KernelSpec.parse("fmha_fwd_sm90_fp16_d64")
    sm80 = [KernelSpec.parse(f"fmha_fwd_sm80_{dtype}_d64") for dtype in ("bf16", "fp16")]
    stale = replace(record(KernelSpec.parse("fmha_fwd_sm89_bf16_d64")), source_hash="0")
    ledger.record([record(), record(fp16, "emulator"), stale], file)
    ledger.record([record(spec, "ptx") for spec in sm80], file)
    lines = gen_tables.support(tmp_path).splitlines()
    head = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    line = next(x for x in lines if x.startswith("| 64 | plain |"))
    row = dict(zip(head, (cell.strip() for cell in line.split("|")[1:-1]), strict=True))
    assert row["sm90"] == "bf16 cubin, fp16 emulator"
    assert row["sm80"] == "ptx"
    assert row["sm89"] == "bf16 stale, fp16 unverified"
    assert "Verified on: Some GPU." in lines[-1] and "18 kernels" in lines[-1]
    (short,) = (x for x in lines if "| short |" in x)
    assert short.startswith("| 32, 40, 48, 64, 80, 96, 104, 192, 256 | short | no |") and "| unverified | no |" in short


def test_a_generated_part_is_replaced_and_nothing_else() -> None:
    text = "before\n<!-- generated:x -->\nold\n<!-- /generated:x -->\nafter\n"
    new = gen_tables.regenerate(text, "x", r"n\1ew")
    assert new == "before\n<!-- generated:x -->\nn\\1ew\n<!-- /generated:x -->\nafter\n"
    assert gen_tables.regenerate(new, "x", r"n\1ew") == new
    with pytest.raises(ArtifactError, match="generated:y"):
        gen_tables.regenerate(text, "y", "")


@pytest.mark.parametrize("name", list(gen_tables.PARTS))
def test_the_committed_tables_agree_with_the_records(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for part, render in gen_tables.PARTS[name].items():
        assert gen_tables.regenerate(text, part, render(ROOT)) == text, "run tools/gen_tables.py"

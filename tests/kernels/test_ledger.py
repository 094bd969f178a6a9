# SPDX-License-Identifier: Apache-2.0
"""The ledger keeps what was proven and forgets it when the source moves; tables agree with it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ROOT

from fmha_runtime import records
from fmha_runtime.errors import ArtifactError
from fmha_runtime.kernels import catalog, ledger, sources, store
from fmha_runtime.kernels.ledger import Ledger
from fmha_runtime.kernels.manifest import KernelRow
from fmha_runtime.kernels.spec import Arch, KernelSpec
from fmha_runtime.verify import run as verifier

SPEC = KernelSpec.parse("fmha_fwd_sm90_bf16_d64")
sys.path.insert(0, str(ROOT / "tools"))

import gen_tables  # noqa: E402


def row(spec: KernelSpec = SPEC) -> KernelRow:
    """The packaged manifest's row of a kernel."""
    found = store.locked(spec)
    assert found is not None
    return found


def record(spec: KernelSpec = SPEC, how: str = "cubin") -> ledger.Record:
    """A record of the bytes that the manifest locks."""
    tile = catalog.tile(spec)
    emulated = sources.emulated_code(spec, tile)
    return ledger.Record(
        name=spec.name,
        how=how,
        evidence={"cubin": row(spec).sha256, "ptx": row(spec).ptx_sha256, "emulator": emulated}[how],
        code=sources.code(spec, tile),
        tile=str(tile),
        suite=verifier.suite(spec),
        nvcc=None if how == "emulator" else "13.0.88",
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


def of(*records: ledger.Record) -> Ledger:
    """A ledger of just these."""
    found: dict[str, tuple[ledger.Record, ...]] = {}
    for one in records:
        found[one.name] = (*found.get(one.name, ()), one)
    return Ledger(found)


def test_records_are_kept_sorted_one_per_line_in_the_table_of_their_op_and_arch(tmp_path: Path) -> None:
    other = replace(record(), name="fmha_fwd_sm90_bf16_d128")
    far = record(KernelSpec.parse("fmha_fwd_sm80_bf16_d64"), "ptx")
    ledger.record([record(how="emulator"), record(), far], tmp_path)
    ledger.record([other, replace(record(), cases=99)], tmp_path)
    assert tuple(Ledger.load(tmp_path)) == (far, other, replace(record(), cases=99), record(how="emulator"))
    text = (tmp_path / "fwd_sm90.json").read_text()
    assert json.loads(text)["schema"] == ledger.SCHEMA
    assert sum('"name"' in line for line in text.splitlines()) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fwd_sm80.json", "fwd_sm90.json"]


def test_a_missing_ledger_is_an_empty_one(tmp_path: Path) -> None:
    assert tuple(Ledger.load(tmp_path / "verified")) == ()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"schema": 99, "records": []}',
        '{"schema": 1, "records": []}',
        '{"schema": 2, "records": [{"name": "x"}]}',
        '{"schema": 2, "records": [3]}',
        '{"schema": 2}',
    ],
)
def test_a_damaged_ledger_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    file = tmp_path / "fwd_sm90.json"
    file.write_text(text)
    with pytest.raises(ArtifactError, match=r"fwd_sm90\.json") as caught:
        Ledger.load(tmp_path)
    assert caught.value.path == file
    with pytest.raises(ArtifactError):
        ledger.record([record()], tmp_path)
    assert file.read_text() == text


def test_a_failed_write_leaves_the_old_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.record([record()], tmp_path)

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        ledger.record([record(how="ptx")], tmp_path)
    assert tuple(Ledger.load(tmp_path)) == (record(),)
    assert [path.name for path in tmp_path.iterdir()] == ["fwd_sm90.json"]


def test_verified_is_said_of_the_very_bytes_only() -> None:
    def word(*records: ledger.Record, at_hand: KernelRow | None = row()) -> tuple[str, bool]:  # noqa: B008
        status = of(*records).status(SPEC, at_hand)
        assert status.word in ledger.WORDS
        return status.word, status.emulated

    assert word() == ("unverified", False)
    assert word(record()) == ("verified", False)
    assert word(record(how="ptx")) == ("verified", False)
    assert word(record(how="emulator")) == ("unverified", True)
    assert word(record(), record(how="emulator")) == ("verified", True)
    # Other bytes of the same code: another compiler's, on either side.
    assert word(replace(record(), evidence="0" * 64)) == ("other bytes", False)
    assert word(record(), at_hand=replace(row(), sha256="0" * 64)) == ("other bytes", False)
    assert word(record(how="ptx"), at_hand=replace(row(), ptx_sha256="0" * 64)) == ("other bytes", False)
    assert word(record(how="ptx"), at_hand=replace(row(), sha256="0" * 64)) == ("verified", False)
    assert word(record(), at_hand=None) == ("other bytes", False)
    # Evidence of one kind is none of another.
    assert word(replace(record(how="ptx"), evidence=row().sha256)) == ("other bytes", False)
    # Other code, or the same in another cut.
    assert word(replace(record(), evidence="0" * 64, code="0" * 64)) == ("stale", False)
    assert word(record(), at_hand=replace(row(), code="0" * 64)) == ("other bytes", False)
    assert word(replace(record(), evidence="0" * 64, tile="16x16 w1 s2 c1")) == ("stale", False)
    assert word(replace(record(), evidence="0" * 64), record(how="ptx")) == ("verified", False)
    # An emulator record of another emulator, or a migrated one.
    assert word(replace(record(how="emulator"), evidence="0" * 64)) == ("unverified", False)
    assert word(replace(record(how="emulator"), evidence="")) == ("unverified", False)
    assert word(replace(record(), name="fmha_fwd_sm90_bf16_d128")) == ("unverified", False)


def test_the_status_says_why() -> None:
    assert "cubin on Some GPU, 128 cases" in of(record(how="ptx"), record()).status(SPEC, row()).reason
    moved = of(replace(record(), evidence="0", tile="16x16 w1 s2 c1")).status(SPEC, row())
    assert "16x16 w1 s2 c1" in moved.reason and str(catalog.tile(SPEC)) in moved.reason
    edited = of(replace(record(), evidence="0", code="f" * 64)).status(SPEC, replace(row(), code="0"))
    assert "ffffffffffff" in edited.reason
    other = of(record()).status(SPEC, replace(row(), sha256="0" * 64, nvcc="13.5.37"))
    assert other.reason == "same code, other bytes: not the verified cubin (nvcc 13.0.88; here nvcc 13.5.37)"
    migrated = of(replace(record(), suite=ledger.MIGRATED)).status(SPEC, row())
    assert migrated.word == "verified" and "suite not recorded" in migrated.reason


def test_sm86_and_sm120_are_of_the_code_of_sm89() -> None:
    proven = KernelSpec.parse("fmha_fwd_sm89_bf16_d64")
    known = of(record(proven, "ptx"))
    for arch in (Arch.SM86, Arch.SM120):
        other = replace(proven, arch=arch)
        status = known.status(other, row(other))
        assert status.word == "same code" and proven.name in status.reason
    for arch in (Arch.SM80, Arch.SM90):
        other = replace(proven, arch=arch)
        assert known.status(other, row(other)).word == "unverified"
    other = replace(proven, arch=Arch.SM120)
    older = replace(record(proven, "ptx"), code="0")  # an edit since then changed the code and not one byte
    assert of(older).status(other, row(other)).word == "same code"
    assert of(older).status(proven, row(proven)).word == "verified"
    assert of(replace(older, evidence="0")).status(other, row(other)).word == "unverified"
    assert of(record(proven, "emulator")).status(other, row(other)).word == "unverified"
    # Where the tile differs, nothing is said.
    packed = KernelSpec.parse("fmha_fwd_sm120_bf16_d64_packed")
    twin = replace(packed, arch=Arch.SM89)
    assert catalog.tile(packed) != catalog.tile(twin)
    assert of(record(twin, "ptx")).status(packed, row(packed)).word == "unverified"


def test_the_commit_is_that_of_git() -> None:
    if not (ROOT / ".git").exists():
        assert records.commit() is None
        return
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert records.commit() == asked.stdout.strip()


def test_the_committed_ledger_names_kernels_that_exist_and_bytes_that_the_manifest_has() -> None:
    """A record of the present code and of other bytes than the manifest has would verify nothing. One of
    older code says that the kernel is stale, until a GPU has run the new one."""
    found = list(Ledger.load(ROOT / "cubins" / ledger.FOLDER))
    assert len(found) > 1000
    for one in found:
        spec = KernelSpec.parse(one.name)
        assert catalog.exists(spec)
        locked = store.locked(spec)
        assert locked is not None
        if one.on_gpu and one.code == locked.code:
            assert one.evidence == {"cubin": locked.sha256, "ptx": locked.ptx_sha256}[one.how], one.name


def test_the_support_table_tells_how_each_kernel_was_proven(tmp_path: Path) -> None:
    ours = [s for s in catalog.enumerate_specs() if s.head_dim == 64]
    assert {gen_tables.proof(spec, Ledger()) for spec in ours} == {"unverified"}
    folder = tmp_path / "cubins" / "verified"
    fp16 = KernelSpec.parse("fmha_fwd_sm90_fp16_d64")
    sm80 = [KernelSpec.parse(f"fmha_fwd_sm80_{dtype}_d64") for dtype in ("bf16", "fp16")]
    stale = replace(record(KernelSpec.parse("fmha_fwd_sm89_bf16_d64"), "ptx"), evidence="0" * 64, code="0" * 64)
    ledger.record([record(), record(fp16, "emulator"), stale], folder)
    ledger.record([record(spec, "ptx") for spec in sm80], folder)
    lines = gen_tables.support(tmp_path).splitlines()
    head = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    line = next(x for x in lines if x.startswith("| 64 | plain |"))
    cells = dict(zip(head, (cell.strip() for cell in line.split("|")[1:-1]), strict=True))
    assert cells["sm90"] == "bf16 cubin, fp16 emulator"
    assert cells["sm80"] == "ptx"
    assert cells["sm89"] == "bf16 stale, fp16 unverified"
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


def test_every_record_is_of_the_present_suite():
    """Who changes cases or limits has them run again."""
    for one in Ledger.load():
        assert one.suite == verifier.suite(KernelSpec.parse(one.name)), one.name


@pytest.mark.parametrize(
    "change",
    [
        {"cases": 0}, {"worst_ratio": 57.0}, {"suite": "banana"}, {"evidence": "0"}, {"capability": "banana"},
        {"date": "yesterday"}, {"code": ""},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_record_of_no_verification_that_could_pass_is_refused(tmp_path, change):
    ledger.record([replace(record(), **change)], tmp_path)
    with pytest.raises(ArtifactError, match="not a verification ledger"):
        Ledger.load(tmp_path)

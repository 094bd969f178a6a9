# SPDX-License-Identifier: Apache-2.0
"""tools/accuracy.py: it measures what it says, and fails when this library is the one that is wrong."""

from __future__ import annotations

import json
import sys

import pytest

torch = pytest.importorskip("torch")

from helpers import ROOT  # noqa: E402

if not (ROOT / "tools" / "accuracy.py").exists():
    pytest.skip("needs the checkout", allow_module_level=True)
sys.path.insert(0, str(ROOT / "tools"))

import accuracy  # noqa: E402
import gen_tables  # noqa: E402

SMALL = ["--emulator", "sm90", "--seqlen", "130", "--head-dims", "64"]


@pytest.mark.emulator
@pytest.mark.parametrize("feature", accuracy.FEATURES)
def test_a_case_on_the_emulator(feature, tmp_path, capsys):
    file = tmp_path / "record.json"
    assert accuracy.main([*SMALL, "--features", feature, "--dtypes", "bf16", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    found = {row["provider"]: row for row in rows}
    assert found["ours"]["kernel"].startswith("fmha_fwd_sm90")
    assert ("math" in found) == (feature not in ("softcap", "sinks")) and "explicit" in found
    assert all(1e-4 < row["rel_l2"] < 2e-2 for row in rows), rows
    assert f"ok    {feature}" in capsys.readouterr().out


@pytest.mark.emulator
def test_a_wrong_result_fails(monkeypatch, capsys):
    real = accuracy.ours
    monkeypatch.setattr(accuracy, "ours", lambda *args: ((found := real(*args))[0] * 1.01, found[1]))
    assert accuracy.main([*SMALL, "--features", "causal", "--dtypes", "bf16"]) == 1
    assert "FAIL  causal" in capsys.readouterr().out


def row(provider, rel_l2, max_abs):
    case = {"feature": "plain", "dtype": "bf16", "head_dim": 64}
    return {**case, "provider": provider, "kernel": None, "rel_l2": rel_l2, "max_abs": max_abs}


def test_the_rule_takes_the_best_peer():
    peers = [row("math", 1e-3, 1e-3), row("flash", 2e-3, 4e-3), row("explicit", 9e-3, 9e-3)]
    (one,) = accuracy.verdicts([row("ours", 1.9e-3, 7e-3), *peers])
    assert one["ok"] and one["l2_ratio"] == pytest.approx(1.9) and one["max_ratio"] == pytest.approx(7 / 4)
    assert not accuracy.verdicts([row("ours", 2.1e-3, 7e-3), *peers])[0]["ok"]
    assert not accuracy.verdicts([row("ours", 1e-3, 9e-3), *peers])[0]["ok"]
    for rows in (peers, [row("ours", 1e-3, 1e-3)]):
        with pytest.raises(ValueError, match="somebody to compare"):
            accuracy.verdicts(rows)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert accuracy.main([]) == 3
    assert "--emulator" in capsys.readouterr().err


def test_the_table_is_that_of_the_record(tmp_path):
    folder = tmp_path / "docs" / "accuracy"
    folder.mkdir(parents=True)
    assert "Nothing is recorded" in gen_tables.accuracy(tmp_path)
    file = folder / "some_gpu_2026-01-01.json"
    rows = [row("ours", 2e-3, 1e-3), row("math", 1e-3, 1e-3), row("flash", 2e-3, 2e-4)]
    meta = {"gpu": "Some GPU", "torch": "2", "cudnn": 9, "seqlen": 1024, "commit": None, "date": "2026-01-01T00:00:00"}
    file.write_text(json.dumps({"schema": 1, "meta": meta, "rows": rows}))
    text = gen_tables.accuracy(tmp_path)
    assert "| plain bf16 d64 | 2.00e-03 | 1.00e-03 | 2.00e-03 | 2.00 | **5.00** |" in text
    assert "Some GPU" in text
    file.write_text(json.dumps({"schema": 0}))
    with pytest.raises(gen_tables.ArtifactError, match="measure again"):
        gen_tables.accuracy(tmp_path)

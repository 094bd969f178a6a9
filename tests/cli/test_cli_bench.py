# SPDX-License-Identifier: Apache-2.0
"""``fmha bench``: which cells and peers its options mean, what it prints and writes."""

from __future__ import annotations

import pytest
from helpers.program import fmha


def test_bench_prints_and_writes(hopper, monkeypatch, tmp_path):
    from fmha_runtime.bench import run as bencher
    from fmha_runtime.bench.record import BenchRecord, Timing

    asked, wanted = [], []

    def run(cells, **options):
        asked.extend(cells)
        wanted.append((options["peers"], options["tile"]))
        options["on_cell"](cells[0], 0, len(cells))
        timings = (
            Timing(cells[0].key, "ours", median_us=1.0, tflops=500.0),
            Timing(cells[0].key, "flash", median_us=2.0, tflops=250.0),
        )
        return BenchRecord({"gpu": "H200", "torch": "2"}, timings)

    monkeypatch.setattr(bencher, "run", run)
    path = tmp_path / "record.json"
    words = ["--dtype", "bf16", "--head-dim", "64", "--seqlens", "512,1024", "--causal"]
    result = fmha("bench", *words, "--json", path)
    assert result.exit_code == 0, result.stderr
    assert [cell.key for cell in asked] == ["bf16_d64_s512_c", "bf16_d64_s1024_c"]
    assert "2.00" in result.stdout
    assert BenchRecord.load(path).providers == ("ours", "flash")
    for words in (
        ["--grid", "hopper"],
        ["--grid", "mma"],
        ["--grid", "length"],
        ["--against", "all", "--arch", "sm90", "--tile", "128x64"],
    ):
        assert fmha("bench", *words).exit_code == 0
    assert wanted == [
        (["sdpa"], None),
        (["cudnn", "flash"], None),
        (["cudnn", "flash"], "sm90"),
        (["cudnn", "flash", "math", "flex"], None),
        (["all"], "sm90 128x64"),
    ]


@pytest.mark.parametrize("words", [["--head-dim", "big"], ["--seqlens", "512,x"], ["--grid", "x"]])
def test_bench_usage(words):
    assert fmha("bench", *words).exit_code == 2


def test_bench_from_a_record_prints_and_draws_without_running(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    from fmha_runtime.bench import run as bencher
    from fmha_runtime.bench.record import BenchRecord, Timing

    monkeypatch.setattr(bencher, "run", lambda *_, **__: pytest.fail("it measured"))
    cells = [Timing(f"bf16_d{d}_s512_c", "ours", 1.0, 1.0, 100.0 + d) for d in (64, 128)]
    BenchRecord({"gpu": "H200", "torch": "2"}, tuple(cells)).save(tmp_path / "r.json")
    result = fmha("bench", "--from", tmp_path / "r.json", "--png", tmp_path / "r.png")
    assert result.exit_code == 0, result.stderr
    assert "bf16_d64_s512_c" in result.stdout and "228" in result.stdout
    assert (tmp_path / "r.png").is_file()
    result = fmha("bench", "--from", tmp_path / "r.json", "--head-dim", "128", "--causal")
    assert "d64" not in result.stdout and "d128" in result.stdout
    assert fmha("bench", "--from", tmp_path / "r.json", "--full").exit_code == 2


@pytest.mark.parametrize("words", [["--grid", "hopper"], ["--against", "flash"], ["--json", "x.json"]])
def test_bench_from_a_record_takes_no_options_of_measuring(words, tmp_path):
    result = fmha("bench", "--from", tmp_path / "r.json", *words)
    assert result.exit_code == 2 and f"leave out {words[0]}" in result.stderr

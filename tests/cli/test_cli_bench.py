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
    for words in (["--grid", "hopper"], ["--grid", "mma"], ["--against", "all", "--arch", "sm90", "--tile", "128x64"]):
        assert fmha("bench", *words).exit_code == 0
    assert wanted == [
        (["sdpa"], None),
        (["cudnn", "flash"], None),
        (["cudnn", "flash"], "sm90"),
        (["all"], "sm90 128x64"),
    ]


@pytest.mark.parametrize("words", [["--head-dim", "big"], ["--seqlens", "512,x"], ["--grid", "x"]])
def test_bench_usage(words):
    assert fmha("bench", *words).exit_code == 2

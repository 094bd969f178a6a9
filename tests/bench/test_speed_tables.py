# SPDX-License-Identifier: Apache-2.0
"""The pages of measured speed say what the records say: where this library loses, and against whom."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

from helpers import ROOT
from helpers.bench_records import example

from fmha_runtime.bench import cells as bench_cells
from fmha_runtime.bench import run as bencher
from fmha_runtime.bench.record import BenchRecord, Timing

sys.path.insert(0, str(ROOT / "tools"))
import speed_tables


def test_the_generated_pages_say_where_we_lose(tmp_path: Path) -> None:
    assert "No benchmark" in speed_tables.summary(tmp_path)
    example().save(tmp_path / "docs" / "bench" / "h200.json")
    page = speed_tables.full_records(tmp_path)
    assert "| bf16_d64_s512_n | 200 | 400 | 100 | **0.50** | 2.00 |" in page
    assert "| geometric mean |  |  |  | **0.50** | 2.00 |" in page
    assert "cudnn is absent from 1 cells: no such head dim" in page
    assert "(1, slower in 1)" in speed_tables.summary(tmp_path)


def hopper_record(ratio: float, date: str = "2026-11-22", tile: str | None = None) -> BenchRecord:
    """Every cell of the hopper grid: cuDNN at 100, ours ``ratio`` times the best peer's ratio to cuDNN."""
    known = speed_tables.peers(ROOT)["cells"]
    cells = []
    for cell in bench_cells.hopper():
        best = known.get(cell.key, {"best_over_cudnn": 1.0})["best_over_cudnn"]
        slow = 0.5 if cell.key == "bf16_d40_s512_c" else 1.0
        cells += [
            Timing(cell.key, "ours", 1.0, 1.0, 100 * best * ratio * slow, 20),
            Timing(cell.key, "cudnn", 1.0, 1.0, 100.0, 20),
        ]
    meta = {"gpu": "G", "driver": "5", "torch": "2", "cudnn": 9, "commit": "x", "date": date, "tile": tile}
    return BenchRecord(meta, tuple(cells))


def test_cells_are_held_against_the_best_now_and_then(tmp_path: Path) -> None:
    assert "Not recorded" in speed_tables.cells(tmp_path) and "Not recorded" in speed_tables.targets(tmp_path)
    folder = tmp_path / "docs" / "bench"
    hopper_record(1.1).save(folder / "new.json")
    hopper_record(9.0, "2026-11-21").save(folder / "old.json")
    hopper_record(9.0, "2026-11-23", tile="sm90").save(folder / "forced.json")
    page = speed_tables.cells(tmp_path)
    assert "bench/new.json" in page
    assert "**bf16**, 96 of 96 cells measured. Over the best of cuDNN in the same process: geometric mean 1.2" in page
    assert "Now over then (96 cells): geometric mean 1.092, lowest 0.55, 1 below 0.95" in page
    assert "| bf16_d40_s512_c | 55 | 100 | **0.55** | 1.00 | **0.55** |" in page
    assert "| bf16_d32_s16384_n | 158 | 100 | 1.58 | 1.44 | 1.10 |" in page
    assert "**fp16**, 24 of 24 cells" in page and "Now over then (18 cells): geometric mean 1.100" in page
    assert "| fp16_d64_s512_n | 110 | 100 | 1.10 | - | - |" in page


def test_the_cells_name_who_ran_in_the_same_process(tmp_path: Path) -> None:
    record = hopper_record(1.1)
    fast = [replace(t, provider="flash_attn_3", tflops=2 * t.tflops) for t in record.cells if t.provider == "cudnn"]
    absent = Timing(fast[0].case, "flash_attn_3", None, None, None, 0, absent="no such head dim")
    replace(record, cells=(*record.cells, absent, *fast[1:])).save(tmp_path / "docs" / "bench" / "new.json")
    page = speed_tables.cells(tmp_path)
    assert "Over the best of cuDNN, FA3 in the same process" in page and "ahead in" in page
    first, second = fast[0].case, fast[1].case
    assert re.search(rf"\| {first} \| (\d+) \| 100 \| - \| 1\.\d\d \|", page)  # the best of those that ran
    assert re.search(rf"\| {second} \| (\d+) \| 100 \| 200 \| \*\*0\.\d\d\*\* \|", page)


def test_the_targets_are_held_against_the_newest_record(tmp_path: Path) -> None:
    hopper_record(1.1).save(tmp_path / "docs" / "bench" / "new.json")
    page = speed_tables.targets(tmp_path)
    assert "| 32 | full | 385 | 158 | **0.41** | 360 | 1.58 | 1.44 |" in page and "0 of 24 met" in page


def test_features_are_held_against_peers_then_and_now(tmp_path: Path) -> None:
    assert "Not recorded" in speed_tables.features(tmp_path)
    cells = []
    for cell in bench_cells.features():
        cells += [Timing(cell.key, "ours", 1.0, 1.0, 500.0), Timing(cell.key, "cudnn", absent="none")]
        if cell.packed:
            cells.append(Timing(cell.key, bencher.BAND, 1.0, 1.0, 600.0))
        if cell.window is not None:
            cells.append(Timing(cell.key, "flash", 1.0, 1.0, 250.0))
    meta = {"gpu": "G", "driver": "5", "torch": "2", "cudnn": 9, "commit": "x", "date": "2026-11-22"}
    BenchRecord(meta, tuple(cells)).save(tmp_path / "docs" / "bench" / "f.json")
    page = speed_tables.features(tmp_path)
    assert "| gqa32_8_d128_s4096_n | 500 | - | - | 675 (cuDNN 9.19) | **0.74** |" in page
    assert "| packed_d128_s8192_c | 500 | - | **0.83** of our band kernel | - | - |" in page
    assert "| win1024_d128_s8192 | 500 | 250 | 2.00 | 484 (FA3) | 1.03 |" in page
    assert "cudnn is absent from 14 cells: none" in page


def test_the_overview_has_a_row_a_head_dim(tmp_path: Path) -> None:
    assert "Not recorded" in speed_tables.overview(tmp_path)
    hopper_record(1.1).save(tmp_path / "docs" / "bench" / "new.json")
    page = speed_tables.overview(tmp_path)
    assert "| 32 | 158 | 100 cuDNN | 1.58 | 158 | 100 cuDNN | 1.58 | 1." in page
    assert re.search(r"^\| 40 \| .* \| \*\*0\.55\*\* \|$", page, re.MULTILINE)  # its slowest cell
    assert page.count("\n| ") == 13 and "ours faster in 95" in page

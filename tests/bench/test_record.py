# SPDX-License-Identifier: Apache-2.0
"""A benchmark's record reports its losses, survives the disk and is drawn so that it can be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.bench_records import example

from fmha_runtime.bench import cells as bench_cells
from fmha_runtime.bench import plots
from fmha_runtime.bench.record import Axes, BenchRecord, Timing, axes
from fmha_runtime.errors import ArtifactError, InputError


def test_ratios_and_geometric_means() -> None:
    record = example()
    assert record.providers == ("ours", "cudnn", "flash")
    assert record.ratios("flash") == {"bf16_d64_s512_n": 2.0, "bf16_d80_s512_c": 2.0}
    assert record.ratios("cudnn") == {"bf16_d64_s512_n": 0.5}
    assert record.geometric_mean("flash") == pytest.approx(2.0)
    assert record.geometric_mean("math") is None


def test_the_table_marks_losses_and_lists_absences() -> None:
    lines = example().lines()
    assert lines[0].split() == ["case", "ours", "cudnn", "flash", "/cudnn", "/flash"]
    assert lines[1].split() == ["bf16_d64_s512_n", "200", "400", "100", "0.50<", "2.00"]
    assert lines[2].split() == ["bf16_d80_s512_c", "300", "-", "150", "-", "2.00"]
    text = "\n".join(lines)
    assert "absent: cudnn in 1 cells: no such head dim" in text
    assert "geometric mean vs cudnn: 0.500 over 1 cells, 1 lost" in text
    assert "geometric mean vs flash: 2.000 over 2 cells, 0 lost" in text
    assert "at most, flash: 64 MiB (bf16_d64_s512_n)" in text
    assert "ours: 9.5 us" in text and "cudnn: absent: not there" in text


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "r.json"
    example().save(path)
    assert BenchRecord.load(path) == example()
    data = json.loads(path.read_text())
    assert set(data) == {"schema", "meta", "cells", "host"} and data["schema"] == 1
    assert set(data["cells"][0]) >= {"case", "provider", "median_us", "tflops", "absent"}


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 2}', '{"schema": 1, "meta": {}}'])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=r"r\.json"):
        BenchRecord.load(path)
    with pytest.raises(ArtifactError):
        BenchRecord.load(tmp_path / "none.json")


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "r.png"
    plots.speed(example(), path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(path.read_bytes()[16:20], "big") == 1200  # pixels
    with pytest.raises(InputError, match="no cells"):
        plots.speed(BenchRecord({}, ()), path)


def lines_of(*speeds: float) -> BenchRecord:
    """A panel for each speed: ours and a flash half as fast at two lengths."""
    cells = [
        Timing(f"bf16_d{16 * (i + 1)}_s{n}_c", provider, 1.0, 1.0, value / share)
        for i, value in enumerate(speeds)
        for n in (512, 2048)
        for provider, share in (("ours", 1), ("flash", 2))
    ]
    return BenchRecord({}, tuple(cells))


def test_every_panel_has_its_own_scale_and_none_is_empty() -> None:
    pytest.importorskip("matplotlib")
    record = lines_of(100.0, 800.0, 50.0, 60.0, 70.0)
    figure = plots._figure(record)
    plots._draw_panels(figure, plots._grouped(plots._panels(record, "tflops")), 4, record)
    assert len(figure.axes) == 5
    for axis, speed in zip(figure.axes, (100.0, 800.0, 50.0, 60.0, 70.0), strict=True):
        low, high = axis.get_ylim()
        assert low == 0 and speed < high < 1.2 * speed
        assert [text.get_text() for text in axis.texts] == ["ours", "flash"] and axis.get_legend() is None


def test_panels_of_a_head_dim_lie_side_by_side_and_nobody_absent_is_drawn() -> None:
    panels = plots._panels(example(), "tflops")
    assert set(panels["bf16 d64, full"]) == {"ours", "cudnn", "flash"}
    assert set(panels["bf16 d80, causal"]) == {"ours", "flash"}
    titles = ["bf16 d64, full", "bf16 d80, full", "bf16 d64, causal", "bf16 d80, causal"]
    grouped = plots._grouped({title: {} for title in titles})
    assert [title for title, _ in grouped] == [titles[0], titles[2], titles[1], titles[3]]


def test_labels_that_would_touch_are_moved_apart_about_their_middle() -> None:
    placed = plots._spread({"a": 0.5, "b": 0.9, "c": 0.52})
    assert placed["b"] == 0.9
    assert placed["c"] - placed["a"] == pytest.approx(plots._LABEL_GAP)
    assert placed["c"] + placed["a"] == pytest.approx(1.02)


def test_cells_with_names_of_their_own_are_drawn_as_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cells = (Timing("alibi_d128_s2048_c", "ours", 1.0, 1.0, 500.0), Timing("alibi_d128_s2048_c", "cudnn", absent="no"))
    plots.speed(BenchRecord({}, cells), tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 1000


def test_axes_are_read_from_the_names_of_cells() -> None:
    for cell in bench_cells.hopper():
        found = axes(cell.key)
        assert found is not None
        dims = (cell.head_dim, cell.head_dim_v)
        assert (found.dtype, found.head_dims, found.seqlen) == (cell.dtype.value, dims, cell.seqlen)
        assert found.mask == ("causal" if cell.causal else "full")
    assert axes("bf16_d192x128_s1024_n_w127-0") == Axes("bf16", (192, 128), 1024, "n_w127-0")
    assert not any(axes(cell.key) for cell in bench_cells.features())


def test_a_part_of_a_record_is_chosen_by_axes() -> None:
    assert example().only(head_dims=[(64, 64)]).cases == ("bf16_d64_s512_n",)
    assert example().only(masks=["causal"], dtypes=["bf16"]).cases == ("bf16_d80_s512_c",)
    with pytest.raises(InputError, match="it has bf16_d64_s512_n, bf16_d80_s512_c"):
        example().only(lengths=[4096])


def over_length() -> BenchRecord:
    """Two lengths of the length grid; math does not run the long one."""
    cells = []
    for n in (512, 32768):
        case = f"b1_h8_bf16_d64_s{n}_c"
        cells += [Timing(case, "ours", n / 10, 1.0, 300.0, peak_mib=n / 100)]
        cells += [
            Timing(case, "math", n * 2, 1.0, 30.0, peak_mib=n * 1.0) if n == 512 else Timing(case, "math", absent="no")
        ]
    return BenchRecord({"gpu": "Some GPU"}, tuple(cells))


def test_the_length_grid_is_about_time_and_memory(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert over_length().over_length and not example().over_length and not BenchRecord({}, ()).over_length
    text = "\n".join(over_length().lines())
    assert "b1_h8_bf16_d64_s32768_c  3277     -\nmicroseconds" in text
    assert "b1_h8_bf16_d64_s512_c       5   512" in text and "MiB of device memory that a call takes" in text
    assert "microseconds" not in "\n".join(example().lines())
    plots.draw(over_length(), tmp_path / "length.png")
    assert (tmp_path / "length.png").stat().st_size > 10_000


def test_time_and_memory_have_panels_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    plots.draw(over_length(), tmp_path / "length.png")
    ((time, memory),) = (figure.axes for figure in drawn)
    assert (time.get_title(), memory.get_title()) == ("bf16 d64, causal: us", "bf16 d64, causal: MiB")
    assert (time.get_yscale(), memory.get_yscale()) == ("log", "log")
    low, high = time.get_ylim()
    assert low < 51.2 and high > 3276.8
    with pytest.raises(InputError, match="no cells"):
        plots.length(BenchRecord({}, ()), tmp_path / "length.png")

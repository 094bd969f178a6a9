# SPDX-License-Identifier: Apache-2.0
"""A benchmark counts the right work, takes turns, hides no absence and reports its losses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fmha_runtime import bench, plots
from fmha_runtime.bench import Cell, Runnable
from fmha_runtime.bench_record import BenchRecord, HostTime, Timing
from fmha_runtime.errors import ArtifactError, DriverError, FmhaError, InputError, KernelNotBuilt
from fmha_runtime.reference import attention, band
from fmha_runtime.spec import DType


class FakeTimer:
    """Counts; every call of f takes f() microseconds."""

    def __init__(self) -> None:
        self.order: list[float] = []

    def begin(self, call: Callable[[], float]) -> float:
        self.order.append(call())
        return self.order[-1]

    def microseconds(self, tokens: Sequence[float]) -> list[float]:
        return list(tokens)

    def peak_mib(self, call: Callable[[], float]) -> float:
        return 12.0


def test_the_grid_is_the_standard_one() -> None:
    cells = bench.grid()
    assert len(cells) == len({c.key for c in cells}) == 72
    assert {c.key for c in cells} >= {"bf16_d64_s512_n", "fp16_d80_s16384_c", "bf16_d128_s4096_c"}
    assert all(c.batch * c.seqlen == 16384 for c in cells)
    assert {c.head_dim: c.heads for c in cells} == {64: 32, 80: 26, 128: 16}
    pair = Cell(DType.BF16, 192, 128, 1024, False, (127, 0))
    assert pair.key == "bf16_d192x128_s1024_n_w127-0" and pair.heads == 11


def test_flops_are_four_b_h_s_s_d_and_half_of_it_for_causal() -> None:
    full, causal = (Cell(DType.BF16, 128, 128, 2048, c) for c in (False, True))
    assert full.flops == 4 * 8 * 16 * 2048 * 2048 * 128
    assert causal.flops == full.flops / 2
    assert Cell(DType.BF16, 192, 128, 2048, False).flops == 2 * 8 * 11 * 2048**2 * (192 + 128)


@pytest.mark.parametrize("window", [(3, 0), (0, 0), (5, 7), (None, 2), (4, None), (99, 99)])
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_counts_the_pairs_of_its_band(window: tuple[int | None, int | None], causal: bool) -> None:
    n = 23
    left, right = (math.inf if x is None else x for x in band(causal, window))
    want = sum(-left <= j - i <= right for i in range(n) for j in range(n))
    assert Cell(DType.FP16, 64, 64, n, causal, window).pairs == want


def test_providers_take_turns_inside_their_contexts() -> None:
    timer = FakeTimer()
    entered: list[str] = []

    @contextmanager
    def context() -> Any:
        entered.append("in")
        yield
        entered.append("out")

    ready = {"a": Runnable(lambda: 1.0), "b": Runnable(lambda: 2.0, context)}
    found = bench.interleave(ready, timer, 3, seconds=60)
    assert timer.order == [1.0, 2.0] * 3
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert entered == ["in", "out"] * 3


def test_the_time_cap_cuts_repetitions_but_not_below_the_minimum() -> None:
    ready = {"a": Runnable(lambda: 1.0)}
    assert len(bench.interleave(ready, FakeTimer(), 20, seconds=0)["a"]) == bench.MIN_REPS
    assert len(bench.interleave(ready, FakeTimer(), 20, seconds=60)["a"]) == 20


def test_a_cell_gives_medians_and_keeps_who_is_absent() -> None:
    times = iter([5.0, 1.0, 100.0])
    cell = Cell(DType.BF16, 64, 64, 512, True)
    ready = {
        "flash": Runnable(lambda: 7.0),
        "ours": Runnable(lambda: next(times), kernel="fmha_fwd_sm90_bf16_d64"),
    }
    ours, cudnn, flash = bench.measure(cell, ready, {"cudnn": "no"}, FakeTimer(), 3, 60)
    assert (ours.provider, ours.median_us, ours.best_us, ours.reps) == ("ours", 5.0, 1.0, 3)
    assert ours.tflops == round(cell.flops / 5e-6 / 1e12, 1)
    assert ours.kernel == "fmha_fwd_sm90_bf16_d64" and ours.peak_mib == 12.0
    assert (cudnn.provider, cudnn.absent, cudnn.median_us) == ("cudnn", "no", None)
    assert flash.median_us == 7.0 and flash.kernel is None


def test_a_backend_that_refuses_says_why() -> None:
    # torch's flash backend needs a GPU; on the CPU its refusal stands for all refusals.
    q, k, v = (torch.randn(1, 8, 2, 24, dtype=torch.float64) for _ in range(3))
    cell = Cell(DType.BF16, 24, 24, 8, False)
    with pytest.raises(bench.Absent) as caught:
        bench._peer("efficient", cell, q, k, v)
    assert str(caught.value)
    with pytest.raises(bench.Absent, match="2048"):
        bench._peer("math", Cell(DType.BF16, 64, 64, 4096, False), q, k, v)
    with pytest.raises(bench.Absent, match="window"):
        bench._peer("flash", Cell(DType.BF16, 64, 64, 512, False, (3, 0)), q, k, v)
    runnable = bench._peer("math", cell, q, k, v)
    with runnable.context():
        assert runnable.call().shape == (1, 2, 8, 24)


@pytest.mark.parametrize(("factor", "agrees"), [(1.0, True), (1.05, False)])
def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, factor: float, agrees: bool) -> None:
    def ours(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Runnable:
        return Runnable(lambda: attention(q, k, v, causal=cell.causal)[0].to(q.dtype) * factor)

    monkeypatch.setattr(bench, "_ours", ours)
    monkeypatch.setattr(bench, "TOKENS", 64)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cell = Cell(DType.BF16, 256, 256, 32, True)
    ready, absent = bench._prepare(cell, "cpu", ("cudnn", "math"))
    assert "math" in ready and "cudnn" in absent
    assert ("ours" in ready) is agrees
    assert agrees or ("distance 5." in absent["ours"] and "to math" in absent["ours"])


def test_a_kernel_that_is_not_built_is_absent_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ours(*_: Any) -> Runnable:
        raise KernelNotBuilt("build it with\n  fmha build x", name="x", command="fmha build x")

    monkeypatch.setattr(bench, "_ours", ours)
    monkeypatch.setattr(bench, "TOKENS", 64)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    _, absent = bench._prepare(Cell(DType.BF16, 256, 256, 32, True), "cpu", ("math",))
    assert absent == {"ours": "build it with fmha build x"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises((DriverError, FmhaError), match=r"driver|GPU"):
        bench.run(bench.grid())


def example() -> BenchRecord:
    meta = {
        **{"gpu": "Some GPU", "driver": "580", "torch": "2.11", "cudnn": 91900},
        **{"commit": "abcdef", "date": "2026-11-21T10:00:00+00:00"},
    }
    cells = (
        Timing("bf16_d64_s512_n", "ours", 10.0, 9.0, 200.0, 20, 64.0, "fmha_fwd_sm90_bf16_d64"),
        Timing("bf16_d64_s512_n", "cudnn", 5.0, 5.0, 400.0, 20, 64.0),
        Timing("bf16_d64_s512_n", "flash", 20.0, 19.0, 100.0, 20, 64.0),
        Timing("bf16_d80_s512_c", "ours", 10.0, 9.0, 300.0, 20, 64.0, "fmha_fwd_sm90_bf16_d80"),
        Timing("bf16_d80_s512_c", "cudnn", absent="no such head dim"),
        Timing("bf16_d80_s512_c", "flash", 5.0, 5.0, 150.0, 20, 64.0),
    )
    host = (HostTime("b1", "ours", 9.5), HostTime("b1", "cudnn", absent="not there"))
    return BenchRecord(meta, cells, host)


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
    with pytest.raises(InputError, match="no cells"):
        plots.speed(BenchRecord({}, ()), path)


def test_the_generated_pages_say_where_we_lose(tmp_path: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
    import gen_tables

    assert "No benchmark" in gen_tables.speed(tmp_path)
    example().save(tmp_path / "docs" / "bench" / "h200.json")
    page = gen_tables.performance(tmp_path)
    assert "| bf16_d64_s512_n | 200 | 400 | 100 | **0.50** | 2.00 |" in page
    assert "| geometric mean |  |  |  | **0.50** | 2.00 |" in page
    assert "cudnn is absent from 1 cells: no such head dim" in page
    assert "slower in 1" in gen_tables.speed(tmp_path)

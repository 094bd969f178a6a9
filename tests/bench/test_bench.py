# SPDX-License-Identifier: Apache-2.0
"""A benchmark counts the right work, takes turns, hides no absence and reports its losses."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import ROOT

from fmha_runtime.bench import cells as bench_cells
from fmha_runtime.bench import peers as bench_peers
from fmha_runtime.bench import run as bencher
from fmha_runtime.bench.cells import Cell, Inputs
from fmha_runtime.bench.provider import Absent, Peer
from fmha_runtime.bench.record import BenchRecord, Timing
from fmha_runtime.bench.run import Runnable
from fmha_runtime.calls import api
from fmha_runtime.errors import DriverError, FmhaError, InputError, KernelNotBuilt
from fmha_runtime.kernels.spec import DType
from fmha_runtime.ops.forward.reference import attention, band

sys.path.insert(0, str(ROOT / "tools"))


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
    cells = bench_cells.grid()
    assert len(cells) == len({c.key for c in cells}) == 72
    assert {c.key for c in cells} >= {"bf16_d64_s512_n", "fp16_d80_s16384_c", "bf16_d128_s4096_c"}
    assert all(c.batch * c.seqlen == 16384 for c in cells)
    assert {c.head_dim: c.heads for c in cells} == {64: 32, 80: 25, 128: 16}
    pair = Cell(DType.BF16, 192, 128, 1024, False, (127, 0))
    assert pair.key == "bf16_d192x128_s1024_n_w127-0" and pair.heads == 10


def test_flops_are_four_b_h_s_s_d_and_half_of_it_for_causal() -> None:
    full, causal = (Cell(DType.BF16, 128, 128, 2048, c) for c in (False, True))
    assert full.flops == 4 * 8 * 16 * 2048 * 2048 * 128
    assert causal.flops == full.flops / 2
    assert Cell(DType.BF16, 192, 128, 2048, False).flops == 2 * 8 * 10 * 2048**2 * (192 + 128)


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
    found = bencher.interleave(ready, timer, 3, seconds=60)
    assert timer.order == [1.0, 2.0] * 3
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert entered == ["in", "out"] * 3


def test_the_time_cap_cuts_repetitions_but_not_below_the_minimum() -> None:
    ready = {"a": Runnable(lambda: 1.0)}
    assert len(bencher.interleave(ready, FakeTimer(), 20, seconds=0)["a"]) == bencher.MIN_REPS
    assert len(bencher.interleave(ready, FakeTimer(), 20, seconds=60)["a"]) == 20


def test_a_cell_gives_medians_and_keeps_who_is_absent() -> None:
    times = iter([5.0, 1.0, 100.0])
    cell = Cell(DType.BF16, 64, 64, 512, True)
    ready = {
        "flash": Runnable(lambda: 7.0),
        "ours": Runnable(lambda: next(times), kernel="fmha_fwd_sm90_bf16_d64"),
    }
    ours, cudnn, flash = bencher.measure(cell, ready, {"cudnn": "no"}, FakeTimer(), 3, 60)
    assert (ours.provider, ours.median_us, ours.best_us, ours.reps) == ("ours", 5.0, 1.0, 3)
    assert ours.tflops == round(cell.flops / 5e-6 / 1e12, 1)
    assert ours.kernel == "fmha_fwd_sm90_bf16_d64" and ours.peak_mib == 12.0
    assert (cudnn.provider, cudnn.absent, cudnn.median_us) == ("cudnn", "no", None)
    assert flash.median_us == 7.0 and flash.kernel is None


def test_a_backend_that_refuses_says_why() -> None:
    # torch's flash backend needs a GPU; on the CPU its refusal stands for all refusals.
    x = Inputs(*(torch.randn(1, 8, 2, 24, dtype=torch.float64) for _ in range(3)))
    cell = Cell(DType.BF16, 24, 24, 8, False)
    with pytest.raises(bencher.Absent) as caught:
        bench_peers.prepare("efficient", cell, x)
    assert str(caught.value)
    for name, change, words in (
        ("math", {"seqlen": 4096}, "2048"),
        ("cudnn", {"window": (3, 0)}, "window"),
        ("cudnn", {"lengths": (8, 8)}, "varlen"),
        ("cudnn", {"softcap": 30.0}, "softcap"),
        ("math", {"page_size": 64}, "paged"),
        ("flash", {"alibi": True}, "mask tensor"),
        ("flash", {"packed": True}, "mask tensor"),
    ):
        with pytest.raises(bencher.Absent, match=words):
            bench_peers.prepare(name, replace(cell, **change), x)
    runnable = bench_peers.prepare("math", cell, x)
    with runnable.context():
        assert runnable.output(runnable.call()).shape == (1, 8, 2, 24)


FEATURES = {
    "gqa": {"grouped": (4, 2)},
    "alibi": {"alibi": True, "head_dim": 64, "head_dim_v": 64},
    "packed": {"packed": True},
    "window": {"window": (7, 0)},
    "softcap": {"softcap": 30.0},
    "varlen": {"lengths": (32, 5, 27)},
    "paged": {"page_size": 8, "queries": 16},
    "paged gqa": {"page_size": 8, "queries": 16, "grouped": (4, 2)},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Cell:
    """A cell that takes no time: 64 tokens, causal, four heads or fewer."""
    monkeypatch.setattr(bench_cells, "TOKENS", 64)
    monkeypatch.setattr(bench_cells, "WIDTH", 512)
    return Cell(DType.FP16, 256, 256, 32, True)


@pytest.mark.parametrize("feature", FEATURES)
def test_our_call_computes_the_cell(small: Cell, feature: str) -> None:
    """On the CPU the calls of ours run in plain torch: the same arguments, held against the reference and a peer."""
    cell = replace(small, **FEATURES[feature])  # type: ignore[arg-type]
    ready, absent = bencher._prepare(replace(cell, packed=False), "cpu", ("math",))
    assert "CPU tensors" in absent["ours"]  # no plan without a GPU
    x = bench_cells.inputs(cell, "cpu")
    call = ours_on_cpu(cell, x)
    assert bencher.wrong(cell, x, {"ours": call}) == {}
    assert "reference" in bencher.wrong(cell, x, {"ours": call * 1.05})["ours"]
    if "math" in ready:
        runnable = bench_peers.prepare("math", cell, x)
        with runnable.context():
            theirs = runnable.output(runnable.call())
        assert theirs.shape == call.shape
        assert bencher._distance(call, theirs) < (5e-3 if cell.alibi else 2e-3)
    else:
        assert feature in {"window", "softcap", "varlen", "paged", "paged gqa"}


def ours_on_cpu(cell: Cell, x: Inputs) -> torch.Tensor:
    """What bench.ours would call, without the plan that needs a GPU."""

    class Plan:
        class spec:
            name = "fmha_fwd_sm90_fp16_d256"

        tile = "64x64 w4 s2 c1"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "plan", lambda *_, **options: Plan)
        result = bencher.ours(cell, x).call()
    assert isinstance(result, torch.Tensor)
    return result


def test_flash_of_windows_and_lengths_is_the_operator_below_sdpa(small: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        torch.ops.aten, "_flash_attention_forward", lambda *args, **options: calls.append((args, options)) or ("out",)
    )
    for cell in (replace(small, window=(7, 0)), replace(small, lengths=(32, 5, 27), causal=False)):
        x = bench_cells.inputs(cell, "cpu")
        runnable = bench_peers.prepare("flash", cell, x)
        assert runnable.output(runnable.call()) == "out"
    (window, sides), (varlen, none) = calls
    assert window[3:] == (None, None, 32, 32, 0.0, True, False)
    assert sides == {"window_size_left": 7, "window_size_right": 0}
    assert varlen[3].tolist() == [0, 32, 37, 64] and varlen[5:9] == (32, 32, 0.0, False)
    assert none == {"window_size_left": -1, "window_size_right": -1}


@pytest.mark.parametrize(("factor", "agrees"), [(1.0, True), (1.05, False)])
def test_a_wrong_result_is_not_timed(small: Cell, monkeypatch: pytest.MonkeyPatch, factor: float, agrees: bool) -> None:
    def ours(cell: Cell, x: Inputs, tile: str | None) -> Runnable:
        return Runnable(lambda: attention(x.q, x.k, x.v, causal=cell.causal)[0].to(x.q.dtype) * factor)

    monkeypatch.setattr(bencher, "ours", ours)
    ready, absent = bencher._prepare(small, "cpu", ("cudnn", "math"))
    assert "math" in ready and "cudnn" in absent
    for peers in (("cudnn", "math"), ()):  # with nobody else the reference judges
        ready, absent = bencher._prepare(small, "cpu", peers)
        assert ("ours" in ready) is agrees and ("math" in ready) is bool(peers)
        assert agrees or "wrong: relative L2 distance 5." in absent["ours"]
        assert agrees or "to the reference in sequence 0, head 0" in absent["ours"]


def test_the_reference_says_which_of_two_is_wrong(small: Cell) -> None:
    x = bench_cells.inputs(small, "cpu")
    right = attention(x.q, x.k, x.v, causal=True)[0].half()
    assert bencher.wrong(small, x, {"ours": right, "flash": right, "cudnn": right}) == {}
    off = right * 1.05
    assert list(bencher.wrong(small, x, {"ours": right, "flash": right, "cudnn": off})) == ["cudnn"]
    assert list(bencher.wrong(small, x, {"ours": off, "flash": right})) == ["ours"]
    assert list(bencher.wrong(small, x, {"flash": off})) == ["flash"]
    between = right.clone()
    between[0, :, 1:] *= 1.05  # the reference looks at the first and the last head only
    assert "to flash" in bencher.wrong(small, x, {"ours": between, "flash": right})["ours"]
    # Torch's mask tensor of ALiBi is rounded; a library with ALiBi of its own is not.
    alibi = replace(small, alibi=True)
    x = bench_cells.inputs(alibi, "cpu")
    right = attention(x.q, x.k, x.v, causal=True, alibi_slopes=x.slopes)[0].half()
    assert bencher.wrong(alibi, x, {"ours": right, "cudnn": right * 1.05}) == {}
    assert list(bencher.wrong(alibi, x, {"ours": right, "flash_attn": right * 1.05})) == ["flash_attn"]


def test_a_packed_cell_is_held_against_the_band_kernel(small: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ours(cell: Cell, x: Inputs, tile: str | None) -> Runnable:
        asked.append((cell.packed, cell.causal, tile))
        return Runnable(lambda: attention(x.q, x.k, x.v, causal=True)[0].to(x.q.dtype))

    monkeypatch.setattr(bencher, "ours", ours)
    ready, _ = bencher._prepare(replace(small, packed=True), "cpu", (), "sm90")
    assert list(ready) == ["ours", bencher.BAND]
    assert asked == [(True, True, "sm90"), (False, True, "sm90")]


def test_a_kernel_that_is_not_built_is_absent_with_the_command(
    small: Cell,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ours(*_: Any) -> Runnable:
        raise KernelNotBuilt("build it with\n  fmha build x", name="x", command="fmha build x")

    monkeypatch.setattr(bencher, "ours", ours)
    _, absent = bencher._prepare(small, "cpu", ("math",))
    assert absent == {"ours": "build it with fmha build x"}


def test_a_providers_own_error_is_on_record(small: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Runnable:
        raise AssertionError("head_dim must be 64")

    monkeypatch.setattr(bench_peers, "prepare", broken)
    _, absent = bencher._prepare(small, "cpu", ("math",))
    assert absent["math"] == "AssertionError: head_dim must be 64"


def test_the_hopper_grid_has_the_cells_of_the_peers() -> None:
    import speed_tables

    cells = bench_cells.hopper()
    keys = [cell.key for cell in cells if cell.dtype is DType.BF16]
    known = speed_tables.peers(ROOT)
    assert len(keys) == 96 and set(keys) == {key for key in known["cells"] if key.startswith("bf16_")}
    assert {c.head_dim for c in cells if c.dtype is DType.FP16} == {64, 128, 256} and len(cells) == 120
    assert set(known["goals"]) == {key for key in keys if "_s16384_" in key}


def test_the_feature_grid_has_the_names_of_the_peers() -> None:
    import speed_tables

    cells = {cell.key: cell for cell in bench_cells.features()}
    known = speed_tables.peers(ROOT)["cells"]
    assert len(cells) == 14 and all(c.head_dim == 128 for c in cells.values())
    assert {key for key in cells if key not in known} == {"packed_d128_s2048_c", "packed_d128_s8192_c"}
    gqa = cells["gqa32_8_d128_s4096_n"]
    assert (gqa.heads, gqa.heads_k, gqa.batch, gqa.flops) == (32, 8, 4, 4 * 4 * 32 * 4096**2 * 128)
    paged = cells["paged64_d128_2k_on_8k_c"]
    assert (paged.batch, paged.seqlen_q, paged.seqlen) == (8, 2048, 8192)
    assert paged.pairs == 2048 * 8192 - 2048**2 / 2
    varlen = cells["varlen_d128_c"]
    assert sum(varlen.lengths) == 16384
    assert varlen.flops == 4 * 16 * 128 * sum(n * n / 2 for n in varlen.lengths)
    assert cells["win1024_d128_s8192"].pairs == sum(min(i + 1, 1024) for i in range(8192))


def test_grids_are_selected_by_name_and_axes() -> None:
    assert bench_cells.select() == bench_cells.select("mma") == bench_cells.grid()
    assert len(bench_cells.select("standard", lengths=(3,))) == 12
    assert len(bench_cells.select("hopper", dtypes=(DType.BF16,))) == 96
    assert len(bench_cells.select("quick", masks=(True,), head_dims=((64, 64),))) == 3
    with pytest.raises(InputError, match="features"):
        bench_cells.select("all")
    with pytest.raises(InputError, match="no cell"):
        bench_cells.select("quick", lengths=(100,))


def test_peers_are_found_or_missing_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_peers.find(["sdpa", "math"]) == (("cudnn", "flash", "efficient", "math"), {})
    with pytest.raises(InputError, match="unknown"):
        bench_peers.find(["cutlass"])
    gone = Peer("gone", "no_such_library", bench_peers.prepare, "x")  # type: ignore[arg-type]
    monkeypatch.setattr(bench_peers, "peers", lambda: {"gone": gone})
    found, missing = bench_peers.find(["all"])
    assert found == () and "no_such_library" in missing["gone"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises((DriverError, FmhaError), match=r"driver|GPU"):
        bencher.run(bench_cells.grid(), peers=("cudnn",))


def test_decode_cells():
    found = bench_cells.decode()
    assert len(found) == len({cell.key for cell in found}) == 27
    assert all(cell.seqlen_q in (1, 4) and cell.pairs <= 4 * cell.seqlen for cell in found)
    by_name = {cell.key: cell for cell in found}
    assert by_name["dec_con_b8_kv2048"].bytes == 2 * 128 * 2 * (8 * 2048 * 8 + 8 * 32)
    mixed = by_name["dec_pg64_mixed32"]
    assert (mixed.batch, min(mixed.keys), max(mixed.keys)) == (32, 128, 32768)


def test_ragged_keys_are_cut_where_they_end():
    cell = replace(bench_cells.decode()[-1], seqlen=70, keys=(70, 3), grouped=(4, 2), page_size=24, name="small")
    x = bench_cells.inputs(cell, "cpu")
    assert x.used.tolist() == [70, 3] and x.table.shape == (2, 3) and x.k.shape[:2] == (6, 24)
    want = bencher._reference(cell, x, 1, 3)
    got = api.attention_with_kvcache(x.q, x.k, x.v, cache_seqlens=x.used, page_table=x.table)
    assert (got[1:, :, 3:].float() - want).norm() < 1e-2 * want.norm()
    with pytest.raises(Absent, match="one length for all"):
        bench_peers.prepare("math", replace(cell, page_size=0), x)


def test_a_record_of_decoding_has_a_table_of_times_and_rates():
    cell = bench_cells.decode()[0]
    timings = tuple(Timing(cell.key, name, 10.0, 9.0, 3.4, 20) for name in ("ours", "cudnn"))
    text = "\n".join(BenchRecord({"bytes": {cell.key: cell.bytes}}, timings).lines())
    assert re.search(rf"{cell.key} +10\.0 +10\.0 +840", text)

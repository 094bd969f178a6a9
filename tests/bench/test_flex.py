# SPDX-License-Identifier: Apache-2.0
"""flex_attention as a peer: uncompiled on the CPU it must compute each cell, so that a wrong mask or score shows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fmha_runtime.bench import cells as bench_cells
from fmha_runtime.bench import flex
from fmha_runtime.bench import peers as bench_peers
from fmha_runtime.bench import run as bencher
from fmha_runtime.bench.cells import Cell
from fmha_runtime.bench.provider import Absent
from fmha_runtime.kernels.spec import DType

attention = pytest.importorskip(flex.MODULE)
SMALL = Cell(DType.FP16, 64, 64, 160, True)  # more than one block of flex's mask
CELLS = {
    "causal": SMALL,
    "full": replace(SMALL, causal=False),
    "window": replace(SMALL, window=(7, 0)),
    "window of full": replace(SMALL, window=(7, 3), causal=False),
    "window on the right": replace(SMALL, window=(None, 3), causal=False),
    "window on the left": replace(SMALL, window=(7, None), causal=False),
    "softcap": replace(SMALL, softcap=30.0),
    "ALiBi": replace(SMALL, alibi=True),
    "ALiBi of full": replace(SMALL, alibi=True, causal=False),
    "packed": replace(SMALL, packed=True),
    "GQA": replace(SMALL, grouped=(4, 2)),
    "fewer queries": replace(SMALL, queries=40),
    "fewer queries in a window": replace(SMALL, queries=40, window=(7, 0)),
    "fewer queries with ALiBi": replace(SMALL, queries=40, alibi=True),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cells, "TOKENS", 320)
    monkeypatch.setattr(bench_cells, "WIDTH", 128)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What flex_attention is defined to compute, without a compiler."""
    monkeypatch.setattr(flex, "_compiled", lambda: attention.flex_attention)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", CELLS)
def test_it_computes_the_cell(name: str, uncompiled: None) -> None:
    cell = CELLS[name]
    x = bench_cells.inputs(cell, "cpu")
    runnable = bench_peers.prepare("flex", cell, x)
    out = runnable.output(runnable.call())
    assert out.shape == (cell.batch, cell.seqlen_q, cell.heads, cell.head_dim_v)
    assert bencher.wrong(cell, x, {"flex": out}) == {}
    assert list(bencher.wrong(cell, x, {"flex": out * 1.05})) == ["flex"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["causal", "full", "window", "softcap", "ALiBi", "packed", "GQA"])
def test_compiled_it_computes_the_cell_and_writes_out_no_scores(name: str) -> None:
    cell = replace(CELLS[name], seqlen=2048, sequences=1)
    x = bench_cells.inputs(cell, "cuda")
    runnable = bench_peers.prepare("flex", cell, x)
    out = runnable.output(runnable.call())
    assert bencher.wrong(cell, x, {"flex": out}) == {}
    peak = bencher.CudaTimer("cuda:0").peak_mib(runnable.call)
    assert peak < cell.heads * 2048**2 * 2 / 2**20  # of the scores in fp16


@pytest.mark.parametrize("change", [{"lengths": (32, 5, 27)}, {"page_size": 8, "queries": 16}])
def test_it_has_neither_lengths_nor_pages(change: dict[str, Any], uncompiled: None) -> None:
    cell = replace(SMALL, **change)
    with pytest.raises(Absent, match=r"flex_attention has no (varlen|paged KV)"):
        bench_peers.prepare("flex", cell, bench_cells.inputs(cell, "cpu"))


def test_nothing_hidden_needs_no_mask_and_nothing_changed_no_function(uncompiled: None) -> None:
    x = bench_cells.inputs(CELLS["full"], "cpu")
    assert flex.mask_mod(CELLS["full"], x) is None and flex.score_mod(CELLS["full"], x) is None
    assert flex.mask_mod(SMALL, x) is not None


def test_hidden_blocks_are_skipped(uncompiled: None) -> None:
    cell = replace(SMALL, seqlen=512)
    runnable = bench_peers.prepare("flex", cell, bench_cells.inputs(cell, "cpu"))
    mask = runnable.call.keywords["block_mask"]  # type: ignore[attr-defined]
    assert mask.sparsity() == pytest.approx(37.5)  # 6 of 4 x 4 blocks


def test_every_cell_is_compiled_anew_and_never_quietly_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: asked.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append((function, options)) or function)
    assert flex._compiled() is attention.flex_attention
    assert asked == ["reset", (attention.flex_attention, {"dynamic": False, "fullgraph": True})]


def test_the_length_grid_is_one_sequence_of_eight_heads() -> None:
    cells = bench_cells.select("length")
    assert len(cells) == 2 * 2 * 7 and {(c.batch, c.heads, c.heads_k) for c in cells} == {(1, 8, 8)}
    assert {c.head_dim for c in cells} == {64, 128} and {c.dtype for c in cells} == {DType.BF16}
    assert max(c.seqlen for c in cells) == 32768 and len({c.key for c in cells}) == 28
    longest = next(c for c in cells if c.key == "b1_h8_bf16_d128_s32768_c")
    assert longest.flops == 4 * 8 * 128 * 32768**2 / 2


def test_the_math_backend_is_left_out_where_its_scores_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = replace(SMALL, seqlen=4096, sequences=1, grouped=(8, 8))  # 128 Mi scores, three times 4 bytes: 1.5 GiB
    x = bench_cells.inputs(replace(cell, seqlen=8), "cpu")
    monkeypatch.setattr(bench_peers, "_free_bytes", lambda x: 2**30)
    with pytest.raises(Absent, match="it writes out every score: up to 2 GiB, 1 GiB are free"):
        bench_peers.prepare("math", cell, x)
    monkeypatch.setattr(bench_peers, "_free_bytes", lambda x: 2**31)
    assert bench_peers.prepare("math", cell, x)
    with pytest.raises(Absent, match="measured up to 2048"):  # other grids stop earlier: it is slow
        bench_peers.prepare("math", replace(cell, sequences=0), x)

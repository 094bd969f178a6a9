# SPDX-License-Identifier: Apache-2.0
"""The published test grids of fused attention libraries on a GPU, with this project's tighter thresholds.

Build the kernels first (`fmha build --arch sm90 --arch sm90a`), or every first use compiles one.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from helpers import grids  # noqa: E402

import fmha_runtime as fmha  # noqa: E402
from fmha_runtime.kernels.spec import HEAD_DIMS  # noqa: E402

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


def custom_mask(x, heads=1):
    g = torch.Generator("cuda").manual_seed(3)
    return torch.rand(heads, len(x.q), max(x.lens_k), generator=g, device="cuda") < 0.5


# --- TensorRT-LLM, fmha_test.py: every head dim at 1024, 8 ragged sequences, 16 heads

FLAGS = ("packed", "contiguous", "paged", "paged, 128 queries", "paged, 63 queries", "softcap", "sinks")


@DTYPES
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("dims", HEAD_DIMS, ids=lambda d: f"d{d[0]}" if d[0] == d[1] else f"d{d[0]}x{d[1]}")
def test_every_head_dim_at_1024(dims, flag, dtype):
    lens = grids.ragged(8, 128, 1024)
    queries = [int(flag.split()[1])] * 8 if "queries" in flag else None
    layout = {"softcap": "packed", "sinks": "packed"}.get(flag, flag.partition(",")[0])
    layout = "paged 64" if layout == "paged" else layout
    more = {"softcap": {"softcap": 30.0}, "sinks": {"sinks": torch.rand(16, device="cuda") * 5}}.get(flag, {})
    make = lambda hk: grids.make("cuda", dtype, dims, 16, hk, lens, queries)  # noqa: E731
    full, grouped, single = make(16), make(2), make(1)
    for x, options in (
        (full, {}),
        (full, {"causal": True}),
        (grouped, {"causal": True}),
        (single, {"causal": True, "window": (53, 0)}),  # 54 keys, the query's own included
    ):
        grids.hold(x, layout, **options, **more)
    if not more:
        slopes = fmha.alibi_slopes(16).cuda()
        grids.hold(full, layout, causal=True, alibi_slopes=slopes)
        grids.hold(grouped, layout, mask=custom_mask(grouped))
        grids.hold(grouped, layout, mask=custom_mask(grouped, 16), causal=True)


# --- FlashInfer, fmha_v2 prefill: ragged lengths in [max / 2, max], seed 42


@DTYPES
@pytest.mark.parametrize("layout", grids.LAYOUTS)
@pytest.mark.parametrize("d", [128, 256])
@pytest.mark.parametrize(("batch", "heads"), [(1, 4), (1, 32), (16, 4)])
def test_prefill(batch, heads, d, layout, dtype):
    x = grids.make("cuda", dtype, (d, d), heads, 4, grids.ragged(batch, 512, 1024, 42))
    for window in (None, (127, 0), (512, 0)):
        for softcap in (0.0, 30.0):
            grids.hold(x, layout, causal=True, window=window, softcap=softcap)


@DTYPES
@pytest.mark.parametrize("layout", ["separate", "paged 32", "paged 128"])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("seqlen", [1024, 4096])
def test_sinks(seqlen, d, layout, dtype):
    x = grids.make("cuda", dtype, (d, d), 32, 8, grids.ragged(4, seqlen // 2, seqlen, 42))
    sinks = torch.rand(32, device="cuda") * 5
    for window in (None, (127, 0), (512, 0)):
        grids.hold(x, layout, causal=True, window=window, sinks=sinks)


@DTYPES
@pytest.mark.parametrize("layout", ["packed", "separate", "paged 32", "paged 128"])
@pytest.mark.parametrize("chunk", [64, 128, 256, 512, 1000, 1024])
def test_chunked_attention(chunk, layout, dtype):
    for seqlen, heads in ((1024, 32), (4096, 4)):
        x = grids.make("cuda", dtype, (128, 128), heads, 4, grids.ragged(4, seqlen // 2, seqlen, 42))
        grids.hold(x, layout, causal=True, attention_chunk=chunk)


@DTYPES
@pytest.mark.parametrize("page", [32, 128])
@pytest.mark.parametrize("queries", [1, 64, 256])
@pytest.mark.parametrize("options", [{}, {"window": (127, 0)}, {"attention_chunk": 256}], ids=str)
def test_chunks_of_a_prefill(options, queries, page, dtype):
    lens = grids.ragged(4, 512, 1024, 42)
    x = grids.make("cuda", dtype, (128, 128), 32, 4, lens, [queries] * 4)
    for layout in (f"paged {page}", f"paged {page} HND", "separate"):
        grids.hold(x, layout, causal=True, **options)


@DTYPES
@pytest.mark.parametrize("layout", ["separate", "paged 32", "paged 128"])
def test_custom_masks_with_every_group(layout, dtype):
    for heads, kv_heads in ((16, 16), (16, 2), (16, 1)):
        x = grids.make("cuda", dtype, (128, 128), heads, kv_heads, grids.ragged(4, 128, 1024), [128] * 4)
        for mask in (custom_mask(x), custom_mask(x, heads)):
            grids.hold(x, layout, mask=mask)
            grids.hold(x, layout, mask=mask, window=(127, 0), causal=True)


@pytest.mark.parametrize("layout", ["separate", "paged 32"])
def test_graph_replay_gives_the_same_bits(layout):
    x = grids.make("cuda", torch.bfloat16, (128, 128), 16, 4, grids.ragged(4, 512, 1024, 42))
    options = {"causal": True, "window": (127, 0)}
    if layout == "separate":
        lengths = (x.cu_q, x.cu_k)
        call = lambda: fmha.attention_varlen(x.q, x.k, x.v, *lengths, 1024, 1024, **options)  # noqa: E731
    else:
        k, v, table = grids.pages(x, 32, False)
        cu, used = x.cu_q, torch.tensor(x.lens_k, dtype=torch.int32, device="cuda")
        call = lambda: fmha.attention_with_kvcache(  # noqa: E731
            x.q, k, v, cache_seqlens=used, page_table=table, cu_seqlens_q=cu, max_seqlen_q=1024, **options
        )
    want = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, want)


@pytest.mark.parametrize("d", [64, 128])
def test_a_rectangle_with_fewer_queries_than_keys_in_every_layout(d):
    """Which the published grids leave out: 63, 128 and 1 queries of each of 8 sequences."""
    lens = grids.ragged(8, 128, 1024)
    for queries in (1, 63, 128):
        x = grids.make("cuda", torch.bfloat16, (d, d), 16, 2, lens, [queries] * 8)
        for layout in grids.LAYOUTS[1:]:
            grids.hold(x, layout, causal=True)

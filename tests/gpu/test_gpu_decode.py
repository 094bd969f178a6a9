# SPDX-License-Identifier: Apache-2.0
"""Decoding on a GPU: graphs that follow the lengths, streams side by side, results that many CTAs share."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import fmha_runtime as fmha  # noqa: E402
from fmha_runtime.device import counters  # noqa: E402
from fmha_runtime.kernels.spec import Op  # noqa: E402
from fmha_runtime.ops.forward import reference  # noqa: E402


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def cache(batch=4, room=5000, heads_k=2, d=128, page=16, seed=0):
    """A pool of pages in random order, and its table."""
    g = torch.Generator("cuda").manual_seed(seed)
    pages = -(-room // page)
    table = torch.randperm(batch * pages, device="cuda", generator=g).int().view(batch, pages)
    shape = (batch * pages, page, heads_k, d)
    k, v = (torch.randn(shape, device="cuda", generator=g).bfloat16() for _ in range(2))
    return k, v, table


def held(out, q, k, v, lengths, table=None, **options):
    ref, _ = reference.attention(q, k, v, seqused_k=lengths, page_table=table, **options)
    assert (out.double() - ref).norm() <= 3e-3 * ref.norm()
    assert out.isfinite().all()


@pytest.mark.parametrize("page", [1, 4, 16, 24, 256, 528])
@pytest.mark.parametrize("sq", [1, 3, 20])
def test_pages_of_any_size(page, sq):
    k, v, table = cache(page=page)
    lengths = int32(5000, 1, 0, 2500)
    q = torch.randn(4, sq, 8, 128, device="cuda").bfloat16()
    out = fmha.attention_with_kvcache(q, k, v, cache_seqlens=lengths, page_table=table, causal=True)
    held(out, q, k, v, lengths, table, causal=True)


@pytest.mark.parametrize(
    ("batch", "heads", "heads_k", "sk"), [(1, 8, 1, 100_000), (1, 128, 1, 30_000), (300, 8, 8, 900)]
)
def test_few_and_many_units(batch, heads, heads_k, sk):
    q = torch.randn(batch, 1, heads, 64, device="cuda").half()
    k, v = (torch.randn(batch, sk, heads_k, 64, device="cuda").half() for _ in range(2))
    assert fmha.explain(q, k, v).chosen.op is Op.DECODE
    lengths = torch.randint(0, sk + 1, (batch,), device="cuda").int()
    lengths[0] = sk
    held(fmha.attention(q, k, v, seqused_k=lengths), q, k, v, lengths)


def test_a_captured_graph_follows_lengths_and_tables():
    k, v, table = cache()
    lengths = int32(4000, 4000, 4000, 4000)
    q = torch.randn(4, 1, 8, 128, device="cuda").bfloat16()
    out = torch.empty_like(q)

    def step():
        for _ in range(3):  # layers
            fmha.attention_with_kvcache(q, k, v, cache_seqlens=lengths, page_table=table, causal=True, out=out)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for now in ((5000, 17, 0, 900), (0, 0, 0, 0), (1, 2, 3, 4), (4999, 5000, 5000, 5000)):
        lengths.copy_(int32(*now))
        table.copy_(table[:, torch.randperm(table.shape[1], device="cuda")])
        q.normal_()
        graph.replay()
        held(out, q, k, v, lengths, table, causal=True) if any(now) else (out == 0).all()


def test_graphs_and_eager_calls_side_by_side():
    """Each has counters and a workspace of its own."""
    k, v, table = cache(batch=2)
    lengths = int32(5000, 4321)
    qs = [torch.randn(2, 1, 8, 128, device="cuda").bfloat16() for _ in range(3)]
    outs = [torch.empty_like(q) for q in qs]

    def call(i):
        fmha.attention_with_kvcache(qs[i], k, v, cache_seqlens=lengths, page_table=table, out=outs[i])

    for i in range(3):
        call(i)
    want = [x.clone() for x in outs]
    graphs = []
    for i in range(2):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[i]):
            for _ in range(20):
                call(i)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if i < 2:
                    graphs[i].replay()
                else:
                    for _ in range(20):
                        call(i)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outs, want, strict=True))


def test_a_stream_that_is_not_the_current_one():
    k, v, table = cache(batch=2)
    lengths, q = int32(5000, 4321), torch.randn(2, 1, 8, 128, device="cuda").bfloat16()
    want = fmha.attention_with_kvcache(q, k, v, cache_seqlens=lengths, page_table=table)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    got = [
        fmha.attention_with_kvcache(
            q, k, v, cache_seqlens=lengths, page_table=table, stream=side.cuda_stream, out=torch.empty_like(q)
        )
        for _ in range(30)
    ]
    torch.cuda.synchronize()
    assert all(torch.equal(want, each) for each in got)


def test_counters_run_out_and_calls_bring_their_own(monkeypatch):
    monkeypatch.setattr(counters, "words", lambda *given: None)
    k, v, table = cache(batch=2)
    lengths, q = int32(5000, 4321), torch.randn(2, 1, 8, 128, device="cuda").bfloat16()
    out = fmha.attention_with_kvcache(q, k, v, cache_seqlens=lengths, page_table=table)
    held(out, q, k, v, lengths, table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fmha.attention_with_kvcache(q, k, v, cache_seqlens=lengths, page_table=table, out=out)
    for _ in range(3):
        out.zero_()
        graph.replay()
        held(out, q, k, v, lengths, table)

# SPDX-License-Identifier: Apache-2.0
"""Caches filled on a GPU: in a captured graph, beside the attention that reads them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import fmha_runtime as fmha  # noqa: E402
from fmha_runtime.ops.append import reference  # noqa: E402


def test_a_graph_follows_its_slots():
    k, v = (torch.randn(7, 2, 128, device="cuda").bfloat16() for _ in range(2))
    caches = [torch.zeros(5, 16, 2, 128, device="cuda").bfloat16() for _ in range(2)]
    slots = torch.arange(7, device="cuda")
    fmha.append_kv(k, v, *caches, slot_mapping=slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fmha.append_kv(k, v, *caches, slot_mapping=slots)
    for _ in range(3):
        slots.copy_(torch.randperm(80, device="cuda")[:7])
        slots[2] = -1
        k.normal_()
        want = [cache.clone() for cache in caches]
        reference.write((want[0], want[1]), (k, v), slots)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(caches, want, strict=True))


def test_decoding_step_by_step():
    """A sequence that grows by appended tokens attends as one that was there from the start."""
    q, k, v = (torch.randn(1, 900, heads, 64, device="cuda").bfloat16() for heads in (8, 2, 2))
    pools = [torch.zeros(80, 16, 2, 64, device="cuda").bfloat16() for _ in range(2)]
    table = torch.randperm(80, device="cuda").int()[None, :60]
    lengths = torch.zeros(1, dtype=torch.int32, device="cuda")
    fmha.append_kv(k[:, :800], v[:, :800], *pools, cache_seqlens=lengths, page_table=table)
    lengths += 800
    for at in range(800, 805):
        fmha.append_kv(k[:, at : at + 1], v[:, at : at + 1], *pools, cache_seqlens=lengths, page_table=table)
        lengths += 1
        got = fmha.attention_with_kvcache(
            q[:, at : at + 1], *pools, cache_seqlens=lengths, page_table=table, causal=True
        )
        want = fmha.attention(q[:, at : at + 1], k[:, : at + 1], v[:, : at + 1], causal=True)
        assert (got.float() - want.float()).norm() <= 4e-3 * want.float().norm()

# SPDX-License-Identifier: Apache-2.0
"""Decode kernels through the public calls: every mask and score, ragged batches, results that many CTAs share."""

from __future__ import annotations

import pytest
import torch
from helpers.caches import LAYOUTS, paged, queries
from helpers.numbers import REL_L2
from hypothesis import given, settings
from hypothesis import strategies as st

import fmha_runtime as fmha
from fmha_runtime.device.emulator import Order
from fmha_runtime.kernels.spec import Op
from fmha_runtime.ops.decode import work
from fmha_runtime.ops.forward import reference

pytestmark = pytest.mark.emulator

DEVICE = "emulator:sm90"


def keys(b, sk, heads_k, d, dv=None, seed=3, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(b, sk, heads_k, x, generator=g).to(dtype) for x in (d, dv or d))


def held(out, lse, ref, ref_lse):
    """The error is that of the dtype."""
    assert ref.isfinite().all()
    assert (out.double() - ref).norm() <= REL_L2[out.dtype] * ref.norm()
    assert torch.equal(lse.isinf(), ref_lse.isinf())
    assert (lse.double() - ref_lse).nan_to_num(0).abs().max() < 1e-3


def agree(q, k, v, short=None, **options):
    chosen = fmha.explain(q, k, v, device=DEVICE, **options).chosen
    assert chosen.op is Op.DECODE and short in (None, chosen.short)
    out, lse = fmha.attention(q, k, v, return_lse=True, device=DEVICE, **options)
    held(out, lse, *reference.attention(q, k, v, **options))
    return out


@pytest.mark.parametrize(
    ("sq", "heads", "heads_k", "short"),
    [(1, 4, 4, True), (1, 8, 1, True), (4, 8, 2, True), (16, 4, 4, True), (17, 4, 4, False), (8, 8, 1, False)],
)
@pytest.mark.parametrize("causal", [False, True])
def test_rows_are_queries_times_heads(sq, heads, heads_k, short, causal):
    q = queries(2, sq, heads, 64)
    agree(q, *keys(2, 770, heads_k, 64), short, causal=causal)


def test_the_rows_of_one_kv_head_may_need_several_ctas():
    agree(queries(1, 9, 16, 64), *keys(1, 800, 1, 64), False, causal=True)


@pytest.mark.parametrize("sk", [800, 1100, 3000])  # of 24 CTAs: 7, 9 and all, which meet in three groups
def test_one_unit_is_shared_by_many(sk):
    q, (k, v) = queries(1, 2, 4, 64), keys(1, sk, 1, 64)
    agree(q, k, v, causal=True, sinks=torch.tensor([0.5, -1.0, 3.0, 9.0]))


def test_options_are_those_of_the_forward_kernels():
    q, (k, v) = queries(2, 5, 6, 64), keys(2, 800, 2, 64)
    slopes = torch.rand(2, 6, generator=torch.Generator().manual_seed(1))
    tree = torch.rand(5, 800, generator=torch.Generator().manual_seed(2)) < 0.5
    for options in (
        {"window": (100, None), "causal": True},
        {"window": (3, 2)},
        {"attention_chunk": 64, "causal": True},
        {"softcap": 5.0},
        {"alibi_slopes": slopes, "causal": True},
        {"mask": tree},
        {"mask": tree, "softcap": 20.0, "sinks": torch.linspace(-1, 2, 6)},
        {"scale": 0.3},
        {"sinks": torch.full((6,), float("inf"))},
        {"seqused_k": torch.tensor([17, 0], dtype=torch.int32)},
    ):
        agree(q, k, v, **options)


def test_rows_that_see_no_key_are_zero():
    q, (k, v) = queries(1, 8, 2, 64), keys(1, 768, 2, 64)
    out, lse = fmha.attention(
        q, k, v, causal=True, seqused_k=torch.tensor([3], dtype=torch.int32), return_lse=True, device=DEVICE
    )
    assert (out[0, :5] == 0).all() and (lse[0, :, :5] == -torch.inf).all() and out[0, 5:].ne(0).any()


@pytest.mark.parametrize("page", [1, 2, 4, 24, 64, 528])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages(page, layout):
    k, v, table, lengths = paged((800, 1, 0, 257), page, 2, 64, layout=layout)
    q = queries(4, 2, 4, 64)
    out, lse = fmha.attention_with_kvcache(
        q, k, v, cache_seqlens=lengths, page_table=table, causal=True, return_lse=True, device=DEVICE
    )
    held(out, lse, *reference.attention(q, k, v, seqused_k=lengths, page_table=table, causal=True))


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 800), min_size=1, max_size=9), sq=st.integers(1, 5), seed=st.integers(0, 99))
def test_ragged_batches(lengths, sq, seed):
    k, v = keys(len(lengths), 800, 2, 64, seed=seed)
    used = torch.tensor(lengths, dtype=torch.int32)
    for b, n in enumerate(lengths):
        k[b, n:], v[b, n:] = float("nan"), float("nan")
    q = queries(len(lengths), sq, 4, 64)
    out, lse = fmha.attention(q, k, v, seqused_k=used, causal=True, return_lse=True, device=DEVICE)
    held(out, lse, *reference.attention(q, k.nan_to_num(0), v.nan_to_num(0), seqused_k=used, causal=True))


def test_varlen_queries_and_more_sequences_than_threads():
    """300 sequences: each thread of a CTA counts three. Some have no queries, some no keys."""
    g = torch.Generator().manual_seed(5)
    count_q, count_k = torch.randint(0, 3, (300,), generator=g), torch.randint(0, 9, (300,), generator=g)
    count_k[7] = 800
    cu_q, cu_k = (torch.cat([torch.zeros(1), n.cumsum(0)]).int() for n in (count_q, count_k))
    q = queries(1, int(cu_q[-1]), 4, 64)[0]
    k, v = (x[0] for x in keys(1, int(cu_k[-1]), 2, 64))
    assert fmha.explain(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=2, max_seqlen_k=800,
                        device=DEVICE).chosen.op is Op.DECODE  # fmt: skip
    out, lse = fmha.attention_varlen(
        q, k, v, cu_q, cu_k, 2, 800, causal=True, return_lse=True, device=DEVICE
    )  # fmt: skip
    held(out, lse, *reference.attention_varlen(q, k, v, cu_q, cu_k, causal=True))


def test_bits_do_not_depend_on_the_order_in_which_ctas_run():
    q, (k, v) = queries(2, 3, 4, 64), keys(2, 900, 1, 64)
    results = []
    for order in Order:
        plan = fmha.plan(q, k, v, causal=True, device=DEVICE)
        plan.binding.kernel.order = order
        results.append(plan.run(q, k, v))
    plan.binding.kernel.order = Order.FORWARD
    assert all(torch.equal(results[0], each) for each in results[1:])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 16, 24, 528, 784, 1000, 1024])
def test_division_by_a_page_size_is_exact(size):
    multiplier, shift = work.page_reciprocal(size)
    assert 0 < multiplier < 1 << 31
    near = [n * size + d for n in (1, 2, 1000, (1 << 29) // size) for d in (-1, 0, 1)]
    for token in [0, *near, *torch.randint(0, 1 << 29, (2000,)).tolist()]:
        if 0 <= token <= 1 << 29:
            assert ((2 * token + 1) * multiplier >> 32) >> shift == token // size

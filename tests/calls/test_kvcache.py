# SPDX-License-Identifier: Apache-2.0
"""Attention over a key/value cache, dense or paged: on the emulator, against the gathered reference."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.caches import LAYOUTS, paged, queries
from hypothesis import given, settings
from hypothesis import strategies as st

import fmha_runtime as fmha
from fmha_runtime.ops.forward import reference
from fmha_runtime.problem.arguments import PAGE_SIZES

pytestmark = pytest.mark.emulator


def agree(q, k, v, lengths, table=None, **options):
    lens = {key: options[key] for key in ("cu_seqlens_q", "max_seqlen_q") if key in options}
    maths = {key: x for key, x in options.items() if key not in lens}
    out, lse = fmha.attention_with_kvcache(
        q,
        k,
        v,
        cache_seqlens=lengths,
        page_table=table,
        return_lse=True,
        device="emulator",
        **options,
    )
    extra = {"seqused_k": lengths, "page_table": table, **maths}
    if lens:
        ref, ref_lse = reference.attention_varlen(q, k, v, lens["cu_seqlens_q"], None, **extra)
    else:
        ref, ref_lse = reference.attention(q, k, v, **extra)
    assert ref.isfinite().all()
    assert (out.double() - ref).norm() <= 3e-3 * ref.norm()
    assert torch.equal(lse.isinf(), ref_lse.isinf())
    assert (lse.double() - ref_lse).nan_to_num(0).abs().max() < 1e-3
    return out


@pytest.mark.parametrize("page", PAGE_SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_page_sizes_and_layouts(page, layout):
    k, v, table, lengths = paged((130, 1, 0, 257), page, 2, 64, layout=layout)
    agree(queries(4, 20, 4, 64), k, v, lengths, table, causal=True)


@pytest.mark.parametrize("d,dv", [(40, 40), (128, 128), (192, 128), (256, 256)])
def test_head_dims(d, dv):
    k, v, table, lengths = paged((70, 33), 16, 1, d, dv=dv)
    agree(queries(2, 3, 2, d), k, v, lengths, table)


@pytest.mark.parametrize(
    "options",
    [
        {"alibi_slopes": torch.rand(4)},
        {"softcap": 5.0},
        {"sinks": torch.randn(4)},
        {"attention_chunk": 48, "causal": True},
        {"window": (54, 0)},
        {"scale": 0.3},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options(options):
    k, v, table, lengths = paged((130, 61, 257), 32, 2, 64)
    q = queries(3, 33, 4, 64)
    out = agree(q, k, v, lengths, table, **options)
    plain = fmha.attention_with_kvcache(q, k, v, cache_seqlens=lengths, page_table=table, device="emulator")
    assert not torch.equal(out, plain)


@pytest.mark.parametrize("page", [None, 16])
def test_queries_of_different_lengths(page):
    """Chunked prefill next to decoding: 1, 50, 0 and 70 new tokens on caches of different lengths."""
    lengths = (200, 50, 9, 131)
    k, v, table, used = paged(lengths, page or 256, 2, 64)
    if page is None:
        k, v, table = k[table[:, 0].long()], v[table[:, 0].long()], None
    cu = torch.tensor([0, 1, 51, 51, 121], dtype=torch.int32)
    q = queries(1, 121, 4, 64)[0]
    agree(q, k, v, used, table, cu_seqlens_q=cu, max_seqlen_q=70, causal=True)


def test_a_dense_cache_and_one_length_for_all():
    q, k = queries(2, 5, 4, 64), queries(2, 40, 2, 64)
    lengths = torch.full((2,), 31, dtype=torch.int32)
    want = fmha.attention(q, k, k, seqused_k=lengths, causal=True, device="emulator")
    k[:, 31:] = math.nan
    for length in (lengths, 31):
        out = fmha.attention_with_kvcache(q, k, k, cache_seqlens=length, causal=True, device="emulator")
        assert torch.equal(out, want)


def test_pages_in_any_order_are_the_same_sequence():
    k, v, table, lengths = paged((300,), 16, 2, 64)
    q = queries(1, 40, 4, 64)
    rows = table[0, :19].long()
    dense = [x[rows].flatten(0, 1)[None, :300] for x in (k, v)]
    want = fmha.attention(q, *dense, causal=True, device="emulator")
    assert torch.equal(agree(q, k, v, lengths, table, causal=True), want)


def test_sequences_may_share_pages():
    k, v, table, lengths = paged((96,), 32, 2, 64)
    table, lengths = table.repeat(2, 1), lengths.repeat(2)
    q = queries(2, 7, 4, 64)
    agree(q, k, v, lengths, table)


def test_cpu_tensors_take_the_reference():
    k, v, table, lengths = paged((70, 33), 16, 2, 64)
    q = queries(2, 3, 4, 64)
    options = {"cache_seqlens": lengths, "page_table": table, "causal": True}
    ours = fmha.attention_with_kvcache(q, k, v, device="emulator", **options)
    assert (ours.float() - fmha.attention_with_kvcache(q, k, v, **options).float()).abs().max() < 2e-2


def test_plan_of_a_paged_call():
    k, v, table, lengths = paged((70, 33), 16, 2, 64)
    q = queries(2, 3, 4, 64)
    plan = fmha.plan(q, k, v, page_table=table, seqused_k=lengths, device="emulator")
    out = plan.run(q, k, v, page_table=table, seqused_k=lengths)
    assert torch.equal(out, agree(q, k, v, lengths, table))
    with pytest.raises(fmha.InputError, match="one set of optional tensors"):
        plan.run(q, k, v, seqused_k=lengths)


@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=3), sq=st.integers(1, 80),
    page=st.sampled_from(PAGE_SIZES),
    layout=st.sampled_from(LAYOUTS), window=st.tuples(st.none() | st.integers(0, 99), st.none() | st.integers(0, 99)),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_cache(lengths, sq, page, layout, window, seed):
    k, v, table, used = paged(lengths, page, 2, 64, layout=layout, seed=seed)
    q = queries(len(lengths), sq, 4, 64)
    out, lse = fmha.attention_with_kvcache(
        q,
        k,
        v,
        cache_seqlens=used,
        page_table=table,
        window=window,
        return_lse=True,
        device="emulator",
    )
    ref, ref_lse = reference.attention(q, k, v, seqused_k=used, page_table=table, window=window)
    assert (out.double() - ref).abs().max() < 3e-2
    assert torch.equal(lse.isinf(), ref_lse.isinf())


def int32(*shape):
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"page_table": int32(2, 4).long()}, "page_table is torch.int64"),
        ({"page_table": int32(3, 4)}, r"page_table has shape \(3, 4\); \[2, pages"),
        ({"page_table": int32(4, 2).T[:, ::2]}, "rows of page_table must be contiguous"),
        ({"page_table": [[0]]}, "page_table is list"),
        ({"cache_seqlens": None}, "cache_seqlens is None"),
        ({"cache_seqlens": int32(3)}, r"cache_seqlens has shape \(3,\)"),
        ({"k_cache": torch.zeros(5, 12, 2, 64).half()}, "all but the head dim"),
        ({"q": torch.zeros(8, 4, 64).half(), "cu_seqlens_q": int32(3)}, "max_seqlen_q is None"),
    ],
)
def test_bad_input(change, message):
    pool = torch.zeros(5, 16, 2, 64).half()
    call = {
        "q": torch.zeros(2, 3, 4, 64).half(), "k_cache": pool, "v_cache": pool, "cache_seqlens": int32(2),
        "page_table": int32(2, 4), **change,
    }  # fmt: skip
    with pytest.raises(fmha.InputError, match=message):
        fmha.attention_with_kvcache(call.pop("q"), call.pop("k_cache"), call.pop("v_cache"), device="emulator", **call)


def test_page_sizes_are_named():
    pool = torch.zeros(5, 12, 2, 64).half()
    with pytest.raises(fmha.InputError, match=r"pages of 12 tokens.*1, 2, 4 and multiples of 8 up to 1024"):
        fmha.attention_with_kvcache(
            torch.zeros(2, 3, 4, 64).half(), pool, pool, cache_seqlens=int32(2), page_table=int32(2, 4),
            device="emulator",
        )  # fmt: skip

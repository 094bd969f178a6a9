# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's wrappers: pages in the CSR form, both layouts, plans that are made anew."""

from __future__ import annotations

import math

import pytest
import torch

import fmha_runtime as fmha
from fmha_runtime.compat import flashinfer
from fmha_runtime.ops.forward import reference

PAGE, HEADS, HEADS_K, DIM = 16, 8, 2, 64
LENGTHS = (300, 1, 0, 47)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def csr(lengths, seed=0):
    """(indptr, indices, last_page_len) of pages in random order, and the table that says the same."""
    need = [-(-n // PAGE) for n in lengths]
    order = torch.randperm(sum(need) + 3, generator=torch.Generator().manual_seed(seed)).int()
    indptr = torch.tensor([0, *need]).cumsum(0).int()
    last = ints(*(n - (pages - 1) * PAGE if pages else 0 for n, pages in zip(lengths, need, strict=True)))
    table = torch.zeros(len(lengths), max(need), dtype=torch.int32)
    for b, pages in enumerate(need):
        table[b, :pages] = order[indptr[b] : indptr[b] + pages]
    return (indptr, order[: sum(need)], last), table, len(order)


def cache(pages, layout, pair=False):
    g = torch.Generator().manual_seed(7)
    shape = (pages, 2, PAGE, HEADS_K, DIM) if layout == "NHD" else (pages, 2, HEADS_K, PAGE, DIM)
    both = torch.randn(shape, generator=g).bfloat16()
    return (both[:, 0], both[:, 1]) if pair else both


def queries(*rows):
    return torch.randn(*rows, HEADS, DIM, generator=torch.Generator().manual_seed(8)).bfloat16()


def close(got, want):
    assert (got.double() - want.double()).norm() <= 4e-3 * want.double().norm()


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("options", [{}, {"window_left": 20, "sm_scale": 0.3}, {"logits_soft_cap": 10.0}], ids=str)
def test_decoding(layout, pair, options):
    places, table, pages = csr(LENGTHS)
    pool, q = cache(pages, layout, pair), queries(len(LENGTHS))
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(None, layout)
    wrapper.plan(*places, HEADS, HEADS_K, DIM, PAGE, q_data_type=torch.bfloat16, **options)
    out, lse = wrapper.run(q, pool, return_lse=True)
    k, v = flashinfer.split(pool, layout)
    window = (options["window_left"], None) if "window_left" in options else None
    want, natural = reference.attention(
        q[:, None], k, v, seqused_k=ints(*LENGTHS), page_table=table, window=window,
        scale=options.get("sm_scale"), softcap=options.get("logits_soft_cap", 0.0),
    )  # fmt: skip
    close(out, want[:, 0])
    assert lse.shape == (len(LENGTHS), HEADS) and lse[2].isinf().all()
    assert (lse * math.log(2) - natural[:, :, 0]).nan_to_num(0).abs().max() < 1e-3
    into, lse_into = torch.empty_like(out), torch.empty_like(lse)
    got = wrapper.run(q, pool, out=into, lse=lse_into, return_lse=True)
    assert got[0] is into and torch.equal(into, out) and torch.equal(lse_into, lse)


@pytest.mark.parametrize("causal", [False, True])
def test_prefill(causal):
    counts = (5, 1, 3, 40)
    places, table, pages = csr(LENGTHS)
    pool, q = cache(pages, "NHD"), queries(sum(counts))
    qo = torch.tensor([0, *counts]).cumsum(0).int()
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(1), "NHD")
    wrapper.plan(qo, *places, HEADS, HEADS_K, DIM, PAGE, causal=causal, q_data_type=torch.bfloat16)
    out, lse = wrapper.run(q, pool, return_lse=True)
    k, v = flashinfer.split(pool, "NHD")
    want, natural = reference.attention_varlen(
        q, k, v, qo, None, seqused_k=ints(*LENGTHS), page_table=table, causal=causal
    )  # fmt: skip
    close(out, want)
    assert lse.shape == (sum(counts), HEADS)
    assert (lse * math.log(2) - natural.t()).nan_to_num(0).abs().max() < 1e-3


def test_a_plan_for_graphs_stays_where_it_is():
    places, _, pages = csr(LENGTHS)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(None, "NHD", use_cuda_graph=True)
    wrapper.plan(*places, HEADS, HEADS_K, DIM, PAGE)
    table, lengths = wrapper._table, wrapper._lengths
    other, _, _ = csr((17, 30, 2, 0), seed=1)
    wrapper.plan(*other, HEADS, HEADS_K, DIM, PAGE)
    assert wrapper._table is table and wrapper._lengths is lengths and lengths.tolist() == [17, 30, 2, 0]
    q, pool = queries(4), cache(pages, "NHD")
    again = flashinfer.BatchDecodeWithPagedKVCacheWrapper(None, "NHD")
    again.plan(*other, HEADS, HEADS_K, DIM, PAGE)
    assert torch.equal(wrapper.run(q, pool), again.run(q, pool))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_appending(layout):
    places, table, pages = csr((20, 5))
    pool = torch.zeros_like(cache(pages, layout))
    k, v = (torch.randn(3, HEADS_K, DIM).bfloat16() for _ in range(2))
    flashinfer.append_paged_kv_cache(
        k, v, ints(0, 1, 0), ints(17, 4, 3), pool, places[1], places[0], places[2], layout
    )  # fmt: skip
    keys, values = flashinfer.split(pool, layout)
    for i, (b, at) in enumerate(((0, 17), (1, 4), (0, 3))):
        assert torch.equal(keys[table[b, at // PAGE], at % PAGE], k[i])
        assert torch.equal(values[table[b, at // PAGE], at % PAGE], v[i])
    assert pool.ne(0).sum() == k.ne(0).sum() + v.ne(0).sum()


def planned(**change):
    places, _, pages = csr(LENGTHS)
    call = dict(zip(("indptr", "indices", "last_page_len"), places, strict=True)) | change
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(None, call.pop("kv_layout", "NHD"))
    wrapper.plan(num_qo_heads=HEADS, num_kv_heads=HEADS_K, head_dim=DIM, page_size=PAGE, **call)
    return wrapper, cache(pages, "NHD")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kv_layout": "DHN"}, fmha.InputError, "kv_layout is 'DHN'"),
        ({"indptr": ints(0, 19)}, fmha.InputError, "indptr has 2 entries for 4 sequences"),
        ({"indptr": ints(0, 19, 18, 18, 20)}, fmha.InputError, "descends"),
        ({"indptr": ints(0, 19, 20, 20, 99)}, fmha.InputError, "at most the 23 indices"),
        ({"indices": torch.ones(5)}, fmha.InputError, r"indices is torch\.float32"),
        ({"pos_encoding_mode": "ROPE_LLAMA"}, fmha.UnsupportedProblem, "Rotate q and k"),
        ({"nonsense": 1}, TypeError, "nonsense"),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, dict) else None,
)
def test_bad_plans_are_named(change, error, message):
    with pytest.raises(error, match=message):
        planned(**change)


def test_bad_runs_are_named():
    wrapper, pool = planned()
    q = queries(4)
    for given, error, message in (
        ((q, pool[:, 0]), fmha.InputError, "paged_kv_cache is"),
        ((q, pool[:, :, :8]), fmha.InputError, "pages of 8 tokens, plan was told 16"),
        ((q[:2], pool), fmha.InputError, r"page_table has shape \(4"),
    ):
        with pytest.raises(error, match=message):
            wrapper.run(*given)
    with pytest.raises(fmha.UnsupportedProblem, match="k_scale is 2"):
        wrapper.run(q, pool, k_scale=2)
    with pytest.raises(TypeError, match="nonsense"):
        wrapper.run(q, pool, nonsense=2)
    with pytest.raises(fmha.InputError, match="run before plan"):
        flashinfer.BatchDecodeWithPagedKVCacheWrapper(None).run(q, pool)
    with pytest.raises(fmha.InputError, match="run before plan"):
        flashinfer.BatchPrefillWithPagedKVCacheWrapper(None).run(q, pool)

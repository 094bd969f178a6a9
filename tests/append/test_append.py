# SPDX-License-Identifier: Apache-2.0
"""New keys and values into caches: the emulated kernel and plain torch leave the same bytes, whatever says where."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fmha_runtime as fmha
from fmha_runtime.ops.append import reference

pytestmark = pytest.mark.emulator


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def both(k, v, k_cache, v_cache, **options):
    """The caches that the emulated kernel leaves; torch's are the same."""
    caches = []
    for device in ("emulator", None):
        mine = (k_cache.clone(), v_cache.clone())
        fmha.append_kv(k, v, *mine, **options, device=device)
        caches.append(mine)
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))
    return caches[0]


def test_slots():
    k, v = tokens(5, 2, 64), tokens(5, 2, 32)
    k_cache, v_cache = torch.zeros(3, 4, 2, 64).bfloat16(), torch.zeros(3, 4, 2, 32).bfloat16()
    slots = torch.tensor([11, -1, 0, 12, 6])  # 12 is past the pool
    got, other = both(k, v, k_cache, v_cache, slot_mapping=slots)
    assert torch.equal(got.view(12, 2, 64)[[11, 0, 6]], k[[0, 2, 4]])
    assert torch.equal(other.view(12, 2, 32)[[11, 0, 6]], v[[0, 2, 4]])
    assert got.view(12, -1).ne(0).any(1).sum() == 3


def test_behind_the_keys_of_a_sequence():
    k, cache = tokens(2, 3, 1, 8), torch.zeros(2, 5, 1, 8).bfloat16()
    got, _ = both(k, k, cache, cache, cache_seqlens=ints(1, 4))  # two of the second sequence have no room
    assert torch.equal(got[0, 1:4], k[0]) and torch.equal(got[1, 4], k[1, 0]) and not got[1, :4].any()


def test_pages_and_packed_sequences():
    k, pool = tokens(6, 1, 8), torch.zeros(7, 2, 1, 8).bfloat16()
    table, cu = ints(5, 2, 0).view(1, 3).repeat(3, 1) + torch.tensor([[0], [1], [0]]).int(), ints(0, 2, 2, 5)
    got, _ = both(k, k, pool, pool, cache_seqlens=ints(1, 0, 3), page_table=table, cu_seqlens=cu)
    assert torch.equal(got[5, 1], k[0]) and torch.equal(got[2, 0], k[1])
    assert torch.equal(got[2, 1], k[2]) and torch.equal(got[0], k[3:5])  # token 5 is of no sequence
    assert got.flatten(1).ne(0).any(1).tolist() == [True, False, True, False, False, True, False]


@settings(max_examples=30, deadline=None)
@given(
    lens=st.lists(st.integers(0, 9), min_size=1, max_size=6), page=st.integers(1, 9), columns=st.integers(1, 4),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_places_are_those_that_python_counts(lens, page, columns, seed):
    g = torch.Generator().manual_seed(seed)
    pages = len(lens) * columns + 1
    table = torch.randperm(pages, generator=g)[: len(lens) * columns].view(len(lens), columns).int()
    held = torch.randint(-1, page * columns + 1, (len(lens),), generator=g).int()
    cu = torch.tensor([0, *lens]).cumsum(0).int()
    count = sum(lens) + 2
    want = []
    for b, n in enumerate(lens):
        for i in range(n):
            at = int(held[b]) + i
            inside = 0 <= at < page * columns
            want.append(int(table[b, at // page]) * page + at % page if inside else -1)
    want += [-1, -1]
    assert reference.slots_of((count,), held, cu, table, pages, page).tolist() == want
    k, pool = tokens(count, 1, 8), torch.zeros(pages, page, 1, 8).bfloat16()
    both(k, k, pool, pool, cache_seqlens=held, page_table=table, cu_seqlens=cu)


def test_what_the_kernel_cannot_copy_runs_in_torch():
    for dim, shift, step in ((4, 0, 1), (8, 1, 1), (8, 0, 2)):  # 8 bytes a head; heads anywhere; every other number
        k = tokens(3, 2, 16)[..., shift : shift + dim * step : step]
        pool = torch.zeros(2, 4, 2, dim).bfloat16()
        got, _ = both(k, k, pool, pool, slot_mapping=torch.tensor([7, 0, 3]))
        assert torch.equal(got.view(8, 2, dim)[[7, 0, 3]], k)


def test_tensors_that_are_not_simply_memory():
    k, pool = tokens(3, 2, 8), torch.zeros(2, 4, 2, 8).bfloat16()
    got, _ = both(torch._neg_view(-k), torch._neg_view(-k), pool, pool, slot_mapping=torch.tensor([7, 0, 3]))
    assert torch.equal(got.view(8, 2, 8)[[7, 0, 3]], k)


def test_under_compile():
    k, pool = tokens(3, 2, 8), torch.zeros(2, 4, 2, 8).bfloat16()

    @torch.compile(fullgraph=True, backend="eager")
    def step(k, cache, slots):
        fmha.append_kv(k, k, cache, cache, slot_mapping=slots)
        return cache * 1

    got = step(k, pool, torch.tensor([7, -1, 3]))
    assert torch.equal(got.view(8, 2, 8)[[7, 3]], k[[0, 2]]) and torch.equal(got, pool)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot_mapping": None}, "exactly one of the two"),
        ({"cache_seqlens": ints(1)}, "exactly one of the two"),
        ({"slot_mapping": torch.tensor([1, 2])}, r"torch.int64 \[2\]; torch.int64 \[3\] is needed"),
        ({"slot_mapping": ints(1, 2, 3)}, r"slot_mapping is torch.int32"),
        ({"page_table": ints(1).view(1, 1)}, "leave out page_table"),
        ({"v": tokens(3, 1, 8)}, "all but the last dim must be equal"),
        ({"k_cache": torch.zeros(2, 4, 2, 16).bfloat16()}, "heads and head dim"),
        ({"k_cache": torch.zeros(2, 4, 2, 8)}, "k_cache is torch.float32"),
        ({"k": [1]}, "k is list"),
        ({"device": "cuda"}, "device is 'cuda'"),
        ({"slot_mapping": None, "cache_seqlens": ints(1, 2, 3)}, "cu_seqlens is not given"),
        ({"slot_mapping": None, "cache_seqlens": ints(1, 2, 3), "cu_seqlens": ints(0, 1)}, r"cu_seqlens is .*\[4\]"),
        ({"slot_mapping": None, "cache_seqlens": ints(1, 2, 3), "cu_seqlens": ints(0, 1, 2, 3)}, "give a page_table"),
    ],
    ids=lambda x: None if isinstance(x, str) else "+".join(x),
)
def test_bad_input_is_named(change, message):
    k, pool = tokens(3, 2, 8), torch.zeros(2, 4, 2, 8).bfloat16()
    call = {"k": k, "v": k, "k_cache": pool, "v_cache": pool.clone(), "slot_mapping": torch.tensor([1, 2, 3]), **change}
    with pytest.raises(fmha.InputError, match=message):
        fmha.append_kv(**call)


def test_a_gradient_is_refused():
    k, pool = tokens(1, 2, 8).requires_grad_(), torch.zeros(2, 4, 2, 8).bfloat16()
    with pytest.raises(fmha.UnsupportedProblem, match="no backward"):
        fmha.append_kv(k, k, pool, pool, slot_mapping=torch.tensor([1]))
    with torch.no_grad():
        fmha.append_kv(k, k, pool, pool, slot_mapping=torch.tensor([1]))
    assert torch.equal(pool[0, 1], k[0])

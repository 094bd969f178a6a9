# SPDX-License-Identifier: Apache-2.0
"""Caches of flash_attn with head dims that have no kernel, and lengths for which a cache has no room."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")

from helpers.flash import BF16, CPU_AND_GPU, batched, close, ints, pool, tensors  # noqa: E402

from fmha_runtime.compat import append, shared  # noqa: E402
from fmha_runtime.compat import flash_attn as fa  # noqa: E402
from fmha_runtime.compat import flash_attn_3 as fa3  # noqa: E402
from fmha_runtime.errors import InputError  # noqa: E402


@pytest.fixture(autouse=True)
def build_what_is_missing(monkeypatch):
    monkeypatch.setenv("FMHA_BUILD_ON_DEMAND", "1")


# --- head dims ---


@CPU_AND_GPU
@pytest.mark.parametrize("d,dv", [(100, 100), (112, 112), (36, 36), (96, 60)])
@pytest.mark.parametrize("layout", ["dense", "rows", "odd rows", "leftpad", "pages", "large pages", "few pages"])
def test_head_dims_without_a_kernel_are_padded_in_caches(device, layout, d, dv):
    b, new, lengths = 2, 3, [17, 40]
    size = 53 if layout == "odd rows" else 512 if layout == "large pages" else 64
    q = torch.randn(b, new, 4, d).to(device, BF16)
    k, v = (torch.randn(b, new, 2, n).to(device, BF16) for n in (d, dv))
    k_cache, v_cache = (torch.randn(b, size, 2, n).to(device, BF16) for n in (d, dv))
    expected = [k_cache.clone(), v_cache.clone()]
    index = [1, 0] if "rows" in layout else [0, 1]
    leftpad = [5, 40] if layout == "leftpad" else [0, 0]
    for i, n in enumerate(lengths):
        expected[0][index[i], n : n + new], expected[1][index[i], n : n + new] = k[i], v[i]
    seen = [[x[j, p : n + new] for j, p, n in zip(index, leftpad, lengths, strict=True)] for x in expected]
    options, caches = {"causal": True}, [k_cache, v_cache]
    if "pages" in layout:
        page = 512 if layout == "large pages" else 16
        (caches[0], table), (caches[1], _) = pool(k_cache, page, device), pool(v_cache, page, device)
        if layout == "few pages":  # most of the pool is of others: it is not copied as a whole
            caches = [torch.cat((x, torch.full_like(x, float("nan")).repeat(3, 1, 1, 1))) for x in caches]
        options["block_table"] = table
    if "rows" in layout:
        options["cache_batch_idx"] = ints(*index, device=device)
    if layout == "leftpad":
        options["cache_leftpad"] = ints(*leftpad, device=device)
    out, lse = fa.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=ints(*lengths, device=device), return_softmax_lse=True, **options
    )
    want, want_lse = batched(q, *seen, causal=True)
    close(out, want)
    close(lse, want_lse)
    for got, right in zip(caches, expected, strict=True):
        assert torch.equal(got[table.long()].flatten(1, 2) if "pages" in layout else got, right)


@pytest.mark.emulator
@pytest.mark.parametrize("device", ["emulator", "emulator:sm90"])
def test_padded_pages_on_the_emulator(monkeypatch, device):
    monkeypatch.setattr(shared, "device", device)
    q, k, v = tensors("cpu", 2, 3, 64, d=100)
    (keys, table), (values, _) = pool(k, 16, "cpu"), pool(v, 16, "cpu")
    out = fa.flash_attn_with_kvcache(q, keys, values, cache_seqlens=ints(64, 19), block_table=table, causal=True)
    close(out, batched(q, [k[0], k[1, :19]], [v[0], v[1, :19]], causal=True)[0])


# --- rows that no sequence has ---


@CPU_AND_GPU
def test_a_cache_may_have_more_rows_than_there_are_sequences(device):
    """There, sequence b has row b unless cache_batch_idx says otherwise."""
    q, k, v = tensors(device, 5, 3, 64)
    k, v = k.clone(), v.clone()
    before = k[2:].clone()
    lengths = ints(20, 64 - 3, device=device)
    new = [torch.randn(2, 3, 2, 64).to(device, BF16) for _ in range(2)]
    out = fa.flash_attn_with_kvcache(q[:2], k, v, *new, cache_seqlens=lengths, causal=True)
    want, _ = batched(q[:2], [k[0, :23], k[1]], [v[0, :23], v[1]], causal=True)
    close(out, want)
    assert torch.equal(k[1, 61:], new[0][1]) and torch.equal(k[2:], before)
    with pytest.raises(InputError, match="the cache has 1 rows for 2 sequences"):
        fa.flash_attn_with_kvcache(q[:2], k[:1], v[:1], *new, cache_seqlens=lengths, causal=True)


# --- lengths past the room ---


def long_calls():
    """(what, call(lengths), whether it appends): caches for 64 keys, dense and in pages."""
    q, k, v = tensors("cpu", 2, 3, 64)
    new = [torch.randn(2, 3, 2, 64).to(BF16) for _ in range(2)]
    (keys, table), (values, _) = pool(k, 16, "cpu"), pool(v, 16, "cpu")
    more = torch.randperm(8).view(2, 4).int()
    cu = ints(0, 3, 6)
    flat = q.flatten(0, 1)
    yield "dense", lambda n: fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=n, causal=True), False
    yield "appended", lambda n: fa.flash_attn_with_kvcache(q, k, v, *new, cache_seqlens=n, causal=True), True
    yield "pages", lambda n: fa.flash_attn_with_kvcache(q, keys, values, cache_seqlens=n, block_table=table), False
    yield (
        "appended pages",
        lambda n: fa.flash_attn_with_kvcache(q, keys, values, *new, cache_seqlens=n, block_table=more), True,
    )  # fmt: skip
    yield (
        "rows",
        lambda n: fa.flash_attn_with_kvcache(
            q, k, v, *new, cache_seqlens=n, cache_batch_idx=ints(1, 0), causal=True
        ), True,
    )  # fmt: skip
    yield (
        "leftpad",
        lambda n: fa.flash_attn_with_kvcache(
            q, k, v, *new, cache_seqlens=n, cache_leftpad=ints(3, 0), causal=True
        ), True,
    )  # fmt: skip
    yield "version 3", lambda n: fa3.flash_attn_with_kvcache(q, k, v, *new, cache_seqlens=n), True
    yield (
        "vLLM",
        lambda n: fa.flash_attn_varlen_func(flat, keys, values, cu, max_seqlen_q=3, seqused_k=n, block_table=table),
        False,
    )


@pytest.mark.parametrize("name,call,appends", [pytest.param(*x, id=x[0]) for x in long_calls()])
def test_lengths_past_the_room_are_an_error_where_the_host_knows_them(name, call, appends):
    room = 64 - 3 * appends
    call(ints(room, 5))
    for wrong in (ints(5, room + 1), ints(5, -1)):
        with pytest.raises(InputError, match=r"cache_seqlens is -?\d+ of sequence 1.* room for 0 to 64 keys"):
            call(wrong)
    if name != "vLLM":  # which takes tensors only
        call(room)
        for wrong in (room + 1, -1):
            with pytest.raises(InputError, match=r"cache_seqlens is -?\d+.* room for 0 to 64 keys"):
                call(wrong)


def test_a_refused_call_has_not_touched_the_cache():
    q, k, v = tensors("cpu", 2, 3, 64)
    before = k.clone(), v.clone()
    for lengths in (62, ints(0, 62), ints(0, 5).long(), ints(0, 1, 2), [0, 5]):
        with pytest.raises(InputError, match="cache_seqlens"):
            fa.flash_attn_with_kvcache(q, k, v, k[:, :3].clone(), v[:, :3].clone(), cache_seqlens=lengths)
    assert torch.equal(k, before[0]) and torch.equal(v, before[1])


@pytest.fixture
def blind(monkeypatch):
    """CPU tensors are treated as those of a GPU are: nobody reads them."""
    monkeypatch.setattr(shared, "readable", lambda *_: False)


def check_clamped(device, size, lengths, new, *, pages=None, index=None, leftpad=None):
    """Appending to a cache of ``size`` keys: what has a place is written and attended to, nothing else changes."""
    b = len(lengths)
    q = torch.randn(b, new, 4, 64).to(device, BF16)
    k, v = (torch.randn(b, new, 2, 64).to(device, BF16) for _ in range(2))
    k_cache, v_cache = (torch.randn(b + 1, size, 2, 64).to(device, BF16) for _ in range(2))
    rows = list(range(b)) if index is None else index
    pads = [0] * b if leftpad is None else leftpad
    expected = [k_cache.clone(), v_cache.clone()]
    start = [max(0, n) for n in lengths]
    for x, given in zip(expected, (k, v), strict=True):
        for i, n in enumerate(start):
            room = max(0, min(new, size - n))
            x[rows[i], n : n + room] = given[i, :room]
    seen = [[x[r, p : min(size, n + new)] for r, p, n in zip(rows, pads, start, strict=True)] for x in expected]
    options, caches, table = {}, [k_cache, v_cache], None
    if pages:
        (caches[0], table), (caches[1], _) = pool(k_cache, pages, device), pool(v_cache, pages, device)
        options["block_table"] = table[:b]
    if index is not None:
        options["cache_batch_idx"] = ints(*index, device=device)
    if leftpad is not None:
        options["cache_leftpad"] = ints(*leftpad, device=device)
    used = ints(*lengths, device=device)
    out = fa.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=used, causal=True, **options)
    close(out, batched(q, *seen, causal=True)[0])
    for got, right in zip(caches, expected, strict=True):
        assert torch.equal(got[table.long()].flatten(1, 2) if pages else got, right)


OVER = ([62, 64, 0], [64, 65, 1000], [61, 63, 70], [-5, 10, 2**31 - 1])


@pytest.mark.parametrize("lengths", OVER, ids=str)
@pytest.mark.parametrize("layout", ["dense", "pages", "rows", "leftpad"])
def test_unread_lengths_past_the_room_are_the_room(blind, layout, lengths):
    options = {
        "dense": {}, "pages": {"pages": 16}, "rows": {"index": [3, 0, 2]}, "leftpad": {"leftpad": [3, 0, 64]}
    }[layout]  # fmt: skip
    check_clamped("cpu", 64, lengths, 3, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", OVER, ids=str)
@pytest.mark.parametrize("layout", ["dense", "pages", "rows", "leftpad"])
def test_lengths_on_a_gpu_past_the_room_are_the_room(layout, lengths):
    options = {
        "dense": {}, "pages": {"pages": 16}, "rows": {"index": [3, 0, 2]}, "leftpad": {"leftpad": [3, 0, 64]}
    }[layout]  # fmt: skip
    check_clamped("cuda", 64, lengths, 3, **options)
    torch.cuda.synchronize()  # a device assert would show here


def test_a_page_that_is_none_is_not_written(blind):
    q, k, v = tensors("cpu", 2, 3, 32)
    pools = [torch.randn(4, 16, 2, 64).to(BF16) for _ in range(2)]
    before = [x.clone() for x in pools]
    for bad in (-1, 4, 2**31 - 1):
        table = torch.tensor([[0, bad], [2, bad]], dtype=torch.int32)
        append_only(q, pools, k[:, :3], v[:, :3], ints(15, 20), table)
        expected = [x.clone() for x in before]
        for x, new in zip(expected, (k, v), strict=True):
            x[0, 15] = new[0, 0]  # the other tokens would lie in the bad page
        assert all(torch.equal(*pair) for pair in zip(pools, expected, strict=True))
        for x, y in zip(pools, before, strict=True):
            x.copy_(y)


def append_only(q, pools, k, v, lengths, table):
    """Core then refuses the bad page, since it reads the table of CPU tensors."""
    with pytest.raises(InputError, match="page_table"):
        fa.flash_attn_with_kvcache(q, *pools, k, v, cache_seqlens=lengths, block_table=table, causal=True)


def test_packed_new_keys_past_the_room_and_behind_the_last_sequence(blind):
    """Tokens behind cu_seqlens_k_new[-1], as a captured graph has them, go nowhere."""
    q = torch.randn(4, 4, 64).to(BF16)
    k, v = (torch.randn(9, 2, 64).to(BF16) for _ in range(2))
    caches = [torch.randn(2, 16, 2, 64).to(BF16) for _ in range(2)]
    expected = [x.clone() for x in caches]
    for x, new in zip(expected, (k, v), strict=True):
        x[0, 14:] = new[:2]
        x[1, 5:7] = new[4:6]
    out = fa3.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=ints(14, 5), cu_seqlens_q=ints(0, 2, 4), cu_seqlens_k_new=ints(0, 4, 6),
        max_seqlen_q=2, causal=True,
    )  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip(caches, expected, strict=True))
    seen = [[x[0], x[1, :7]] for x in expected]
    close(out, torch.cat(batched([q[:2], q[2:]], *seen, causal=True)[0]))


@pytest.mark.parametrize("some", list(itertools.product([False, True], repeat=3)), ids=str)
def test_write_in_any_mix(some):
    cache = torch.arange(12.0).view(2, 3, 2, 1)
    caches = cache.clone(), cache + 100
    new = torch.full((3, 2, 1), -1.0), torch.full((3, 2, 1), -2.0)
    row, place = torch.tensor([0, 1, 1]), torch.tensor([2, 2, 2])  # the same place, if both are written, twice
    append.write(caches, new, row, place, torch.tensor(some))
    for got, before, value in zip(caches, (cache, cache + 100), (-1.0, -2.0), strict=True):
        want = before.clone()
        for r, p, valid in zip(row.tolist(), place.tolist(), some, strict=True):
            if valid:
                want[r, p] = value
        assert torch.equal(got, want)


def test_a_rotary_table_is_as_long_as_the_cache():
    q, k, v = tensors("cpu", 2, 3, 64)
    new = k[:, :3].clone(), v[:, :3].clone()
    short, full = torch.rand(40, 8), torch.rand(64, 8)
    with pytest.raises(InputError, match=r"rotary_cos has shape \(40, 8\).* at least 64 positions"):
        fa.flash_attn_with_kvcache(q, k, v, *new, short, short, cache_seqlens=5)
    fa.flash_attn_with_kvcache(q, k, v, *new, full, full, cache_seqlens=5)
    a, b = (x.clone() for x in (k, v))
    fa3.flash_attn_with_kvcache(q, a, b, *new, None, short, short, cache_seqlens=5)  # version 3: only for pages
    with pytest.raises(InputError, match="both must be"):
        fa.flash_attn_with_kvcache(q, k, v, *new, full, short, cache_seqlens=5)


def test_indices_of_a_wrong_kind():
    q, k, v = tensors("cpu", 2, 3, 64)
    good = ints(0, 1)
    for options, what in (
        ({"cache_batch_idx": good.long()}, r"cache_batch_idx is torch\.int64"),
        ({"cache_batch_idx": ints(0, 2)}, r"cache_batch_idx is \[0, 2\]; numbers from 0 to 1"),
        ({"cache_batch_idx": ints(0, -1)}, r"cache_batch_idx is \[0, -1\]"),
        ({"cache_leftpad": ints(0, 65)}, r"cache_leftpad is \[0, 65\]; numbers from 0 to 64"),
        ({"cache_leftpad": [0, 1]}, "cache_leftpad is a list"),
        ({"block_table": good}, r"block_table is torch\.int32 \[2\]"),
        ({"block_table": good[:, None].long()}, "block_table is torch.int64"),
    ):
        with pytest.raises(InputError, match=what):
            fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=5, **options)

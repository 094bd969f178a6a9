# SPDX-License-Identifier: Apache-2.0
"""Packed masks: the layout, packing and unpacking, and kernels that obey every bit."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.numbers import close, qkv
from hypothesis import given, settings
from hypothesis import strategies as st

import fmha_runtime as fmha
from fmha_runtime.ops.forward import reference
from fmha_runtime.problem import packed_mask


def random_mask(*shape, seed=0, share=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def agree(q, k, v, mask, device="emulator", **options):
    out, lse = fmha.attention(q, k, v, mask=mask, return_lse=True, device=device, **options)
    bits = fmha.unpack_mask(mask) if isinstance(mask, fmha.PackedMask) else mask
    close(out, lse, *reference.attention(q, k, v, mask=bits, **options))
    return out


# --- the layout


def test_every_bit_has_its_documented_place():
    mask = random_mask(1, 1, 130, 200)
    packed = fmha.pack_mask(mask)
    assert packed.words.shape == (1, 1, 3, 4, 128) and packed.any.shape == (1, 1, 3, 1)
    words = packed.words.numpy().view(np.uint32)
    for row in range(192):
        for col in range(256):
            w, half, g = row % 64 // 16, row % 16 // 8, row % 8
            n, t, k = col % 64 // 8, col % 8 // 2, col % 2
            word = words[0, 0, row // 64, col // 64, 32 * w + 4 * g + t]
            want = row < 130 and col < 200 and bool(mask[0, 0, row, col])
            assert bool(word >> (4 * n + 2 * half + k) & 1) == want, (row, col)


def test_blocks_without_a_bit_are_known():
    mask = torch.zeros(1, 1, 150, 64 * 40, dtype=torch.bool)
    mask[0, 0, 70, 64 * 33 + 5] = mask[0, 0, 0, 0] = mask[0, 0, 149, 64 * 31] = True
    seen = fmha.pack_mask(mask).any.numpy().view(np.uint32)
    assert seen.tolist() == [[[[1, 0], [0, 2], [1 << 31, 0]]]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_any_dtype_packs_alike(dtype):
    mask = random_mask(2, 3, 5, 70)
    other = mask.to(dtype)
    if dtype.is_floating_point:  # what SDPA adds to the scores
        other = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
    packed, want = fmha.pack_mask(other), fmha.pack_mask(mask)
    assert torch.equal(packed.words, want.words) and torch.equal(packed.any, want.any)
    assert torch.equal(fmha.pack_mask(mask.numpy()).words, want.words)


@given(
    batch=st.integers(1, 3), heads=st.integers(1, 3), rows=st.integers(0, 150), cols=st.integers(0, 200),
    seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
)  # fmt: skip
@settings(max_examples=30, deadline=None, derandomize=True)
def test_unpack_is_the_inverse(batch, heads, rows, cols, seed, share):
    mask = random_mask(batch, heads, rows, cols, seed=seed, share=share)
    assert torch.equal(fmha.unpack_mask(fmha.pack_mask(mask)), mask)


@given(
    lens=st.lists(st.integers(0, 150), min_size=1, max_size=6),
    heads=st.integers(1, 2),
    more=st.integers(0, 70),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_unpack_is_the_inverse_for_varlen(lens, heads, more):
    cu = torch.tensor([0, *lens]).cumsum(0).int()
    mask = random_mask(heads, sum(lens) + more, 90)
    packed = fmha.pack_mask(mask, cu_seqlens_q=cu)
    assert packed.words.shape[2] == packed_mask.varlen_row_blocks(sum(lens) + more, len(lens))
    assert torch.equal(fmha.unpack_mask(packed, cu_seqlens_q=cu), mask)


def test_sequences_of_a_varlen_mask_share_no_block():
    lens = [1, 63, 64, 0, 65, 129, 1]
    cu = torch.tensor([0, *lens]).cumsum(0).int()
    places = packed_mask._row_places(sum(lens), cu)
    blocks = [set((places[a:b] // 64).tolist()) for a, b in pairwise(cu.tolist())]
    assert sum(len(x) for x in blocks) == len(set().union(*blocks))
    assert all((places[a] % 64 == 0) for a, b in pairwise(cu.tolist()) if b > a)


# --- kernels


@pytest.mark.emulator
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("sq,sk", [(70, 131), (131, 70), (1, 300)])
def test_masks_of_batch_and_heads(shape, sq, sk):
    q, k, v = qkv(2, sq, sk, 4, 2, 64)
    agree(q, k, v, random_mask(*shape, sq, sk))


@pytest.mark.emulator
@pytest.mark.parametrize("d,dv", [(32, 32), (40, 40), (104, 104), (128, 128), (192, 128), (160, 160), (256, 256)])
@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm89"])
def test_every_cut_reads_the_right_bits(d, dv, arch):
    q, k, v = qkv(1, 150, 203, 2, 1, d, dv)
    agree(q, k, v, random_mask(1, 2, 150, 203), f"emulator:{arch}")


@pytest.mark.emulator
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": (40, 10)},
        {"seqused_k": torch.tensor([100, 0], dtype=torch.int32)},
        {"sinks": torch.randn(4)},
        {"attention_chunk": 48},
        {"scale": 0.3},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_apply_on_top(options):
    q, k, v = qkv(2, 90, 203, 4, 2, 64)
    mask = random_mask(1, 1, 90, 203)
    assert not torch.equal(agree(q, k, v, mask, **options), agree(q, k, v, mask))


@pytest.mark.emulator
def test_a_full_mask_is_no_mask_and_a_causal_one_is_causal():
    q, k, v = qkv(1, 130, 130, 2, 1, 64)
    full = torch.ones(130, 130, dtype=torch.bool)
    for mask, causal in ((full, False), (full.tril(), True)):
        want = fmha.attention(q, k, v, causal=causal, device="emulator")
        assert torch.equal(agree(q, k, v, mask), want)


@pytest.mark.emulator
def test_an_empty_mask_hides_everything():
    q, k, v = qkv(1, 70, 130, 2, 1, 64)
    agree(q, k, v, torch.zeros(70, 130, dtype=torch.bool))


@pytest.mark.emulator
@pytest.mark.parametrize("d", [64, 40])
def test_tiles_without_a_bit_are_not_visited(d):
    """Their keys and values are NaN: one tile that is read would show."""
    q, k, v = qkv(1, 100, 960, 2, 1, d)
    mask = torch.zeros(100, 960, dtype=torch.bool)
    mask[:, 384:576] = random_mask(100, 192)
    mask[:, 768:800] = True
    want = agree(q, k, v, mask)
    for x in (k, v):
        x[:, :384] = x[:, 576:768] = x[:, 864:] = math.nan
    assert torch.equal(fmha.attention(q, k, v, mask=mask, device="emulator"), want)


@pytest.mark.emulator
def test_a_packed_mask_is_the_mask():
    q, k, v = qkv(1, 70, 131, 4, 2, 64)
    mask = random_mask(1, 4, 70, 131)
    assert torch.equal(agree(q, k, v, fmha.pack_mask(mask)), agree(q, k, v, mask))
    plan = fmha.plan(q, k, v, mask=mask, device="emulator")
    assert torch.equal(plan.run(q, k, v, mask=fmha.pack_mask(mask)), agree(q, k, v, mask))


@pytest.mark.emulator
def test_keys_beyond_the_columns_are_not_seen():
    q, k, v = qkv(1, 70, 200, 2, 1, 64)
    narrow = random_mask(1, 1, 70, 50)
    wide = torch.nn.functional.pad(narrow, (0, 150))
    assert torch.equal(agree(q, k, v, narrow), agree(q, k, v, wide))


@pytest.mark.emulator
@pytest.mark.parametrize("heads", [1, 4])
def test_varlen(heads):
    lens_q, lens_k = [5, 0, 70, 3, 129], [9, 4, 140, 130, 64]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lens_q, lens_k))
    q, k, v = (x[0] for x in qkv(1, sum(lens_q), sum(lens_k), 4, 2, 64))
    k, v = (torch.randn(sum(lens_k), 2, 64).to(q.dtype) for _ in "kv")
    mask = random_mask(heads, sum(lens_q), 140)
    options = {"mask": mask, "causal": True}
    out, lse = fmha.attention_varlen(q, k, v, cu_q, cu_k, 129, 140, return_lse=True, device="emulator", **options)
    close(out, lse, *reference.attention_varlen(q, k, v, cu_q, cu_k, **options))


@pytest.mark.emulator
def test_a_tree_of_drafts_over_pages():
    """Speculative decoding: everybody sees the prefix, each draft its ancestors."""
    page, prefix, parents = 16, 100, [-1, 0, 0, 1, 1, 2]
    drafts = len(parents)
    tree = torch.eye(drafts, dtype=torch.bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            tree[i] |= tree[parent]
    mask = torch.cat([torch.ones(drafts, prefix, dtype=torch.bool), tree], 1)
    q, k, v = qkv(2, drafts, 112, 4, 2, 64)
    k[:, prefix + drafts :] = v[:, prefix + drafts :] = math.nan
    pools = [torch.cat([x[1].unflatten(0, (7, page)), x[0].unflatten(0, (7, page))]) for x in (k, v)]
    table = torch.tensor([[*range(7, 14)], [*range(7)]], dtype=torch.int32)
    used = torch.full((2,), prefix + drafts, dtype=torch.int32)
    out = fmha.attention_with_kvcache(q, *pools, cache_seqlens=used, page_table=table, mask=mask, device="emulator")
    ref, _ = reference.attention(q, k, v, seqused_k=used, mask=mask)
    assert (out.double() - ref).norm() <= 3e-3 * ref.norm()
    on_cpu = fmha.attention_with_kvcache(q, *pools, cache_seqlens=used, page_table=table, mask=mask)
    assert (out.float() - on_cpu.float()).abs().max() < 2e-2


@pytest.mark.emulator
@given(
    sq=st.integers(1, 140), sk=st.integers(0, 300), seed=st.integers(0, 99), causal=st.booleans(),
    share=st.sampled_from([0.0, 0.001, 0.05, 0.9]), d=st.sampled_from([40, 64]),
)  # fmt: skip
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_mask(sq, sk, seed, causal, share, d):
    q, k, v = qkv(1, sq, sk, 2, 1, d)
    mask = random_mask(1, 2, sq, sk, seed=seed, share=share)
    out, lse = fmha.attention(q, k, v, mask=mask, causal=causal, return_lse=True, device="emulator")
    close(out, lse, *reference.attention(q, k, v, mask=mask, causal=causal))


BAD = {
    "rank": (torch.ones(2, 8, 8, dtype=torch.bool), r"\[Sq, Sk\] or \[B or 1, H or 1, Sq, Sk\]"),
    "rows": (torch.ones(7, 8, dtype=torch.int8), "for 8 queries"),
    "heads": (torch.zeros(1, 3, 8, 8), "for batch 2 and 4 heads"),
    "batch": (torch.ones(3, 1, 8, 8, dtype=torch.int32), "for batch 2 and 4 heads"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_masks(name):
    q, k, v = qkv(2, 8, 8, 4, 2, 64)
    mask, message = BAD[name]
    with pytest.raises(fmha.InputError, match=message):
        fmha.attention(q, k, v, mask=mask, device="emulator")


def test_dense_and_varlen_masks_are_not_confused():
    q, k, v = qkv(1, 8, 8, 4, 2, 64)
    cu = torch.tensor([0, 8], dtype=torch.int32)
    with pytest.raises(fmha.InputError, match="for dense queries"):
        fmha.attention(q, k, v, mask=fmha.pack_mask(torch.zeros(8, 8), cu_seqlens_q=cu), device="emulator")
    with pytest.raises(fmha.InputError, match="for varlen queries"):
        fmha.attention_varlen(q[0], k[0], v[0], cu, cu, 8, 8, mask=fmha.pack_mask(torch.zeros(8, 8)), device="emulator")
    with pytest.raises(fmha.InputError, match="needs cu_seqlens_q"):
        fmha.unpack_mask(fmha.pack_mask(torch.zeros(8, 8), cu_seqlens_q=cu))
    with pytest.raises(fmha.InputError, match=r"varlen needs \[Tq, columns\]"):
        fmha.pack_mask(torch.zeros(1, 1, 8, 8), cu_seqlens_q=cu)


@pytest.mark.emulator
@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01])}], ids=str)
def test_masks_with_alibi_or_softcap(options):
    q, k, v = qkv(1, 70, 131, 4, 2, 64)
    mask = random_mask(1, 4, 70, 131)
    want = reference.attention(q, k, v, mask=mask, **options)
    for device in (None, "emulator:sm80", "emulator:sm90"):
        close(*fmha.attention(q, k, v, mask=mask, return_lse=True, device=device, **options), *want)


@pytest.mark.parametrize("value", [1.0, -10000.0, torch.finfo(torch.float32).min, float("nan"), float("inf")])
@pytest.mark.parametrize("pack", ["torch", "numpy", "call"])
def test_floats_that_are_no_mask_are_refused(value, pack):
    """Silently wrong once: every float but 0 was taken for True, the opposite of what SDPA adds."""
    mask = torch.zeros(5, 7)
    mask[3, 4] = value
    q = torch.randn(1, 5, 1, 64).bfloat16()
    with pytest.raises(fmha.InputError, match=r"mask has dtype torch.float32 and the value .* 0 \(attend\) and -inf"):
        if pack == "call":
            fmha.attention(q, q[:, :1].expand(1, 7, 1, 64), q[:, :1].expand(1, 7, 1, 64), mask=mask)
        else:
            fmha.pack_mask(mask.numpy() if pack == "numpy" else mask)


def test_an_additive_mask_means_what_it_means_to_sdpa():
    q, k, v = qkv(2, 33, 70, 4, 4, 64)
    bits = random_mask(2, 4, 33, 70)
    bits[..., 0] = True
    mask = torch.zeros(bits.shape).masked_fill(~bits, -torch.inf)
    turned = [t.float().transpose(1, 2) for t in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*turned, attn_mask=mask).transpose(1, 2)
    assert (fmha.attention(q, k, v, mask=mask).float() - want).norm() < 4e-3 * want.norm()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: {"rows": 200}, r"words of a PackedMask is torch.int32 \(1, 2, 2, 3, 128\).*goes with 200 rows"),
        (lambda m: {"cols": 300}, "goes with 70 rows and 300 columns"),
        (lambda m: {"words": m.words[:, :, :1]}, r"\(1, 2, 2, 3, 128\) on cpu goes with"),
        (lambda m: {"words": m.words.transpose(2, 3).contiguous().transpose(2, 3)}, "not contiguous"),
        (lambda m: {"words": m.words.long()}, "torch.int64"),
        (lambda m: {"words": m.words[0]}, r"words of a PackedMask is torch.int32 \(2, 2, 3, 128\)"),
        (lambda m: {"any": m.any[:, :1]}, "any of a PackedMask is"),
        (lambda m: {"any": None}, "any of a PackedMask is a NoneType"),
        (lambda m: {"any": m.any.to("meta")}, "on meta"),
        (lambda m: {"sequences": 2}, "of 2 sequences"),
    ],
)
def test_a_mask_built_by_hand_is_checked(change, message):
    mask = fmha.pack_mask(random_mask(1, 2, 70, 130))
    parts = {name: getattr(mask, name) for name in ("words", "any", "rows", "cols", "sequences")}
    fmha.PackedMask(**parts)
    with pytest.raises(fmha.InputError, match=message + r".*let pack_mask make it"):
        fmha.PackedMask(**{**parts, **change(mask)})

# SPDX-License-Identifier: Apache-2.0
"""Packed masks on Hopper's own kernels: every bit obeyed, empty tiles never read, both sides on the same walk."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.mutants import Mutant, assert_caught, assert_the_same_in_every_order
from helpers.numbers import REL_L2, qkv
from hypothesis import given, settings
from hypothesis import strategies as st

import fmha_runtime as fmha
from fmha_runtime.device import emulator
from fmha_runtime.device.emulator import Order
from fmha_runtime.kernels.spec import HEAD_DIMS, KernelSpec
from fmha_runtime.ops.forward import direct, reference

pytestmark = pytest.mark.emulator

DEVICE = "emulator:sm90a"  # for which no decode kernel comes first


def random_mask(*shape, seed=0, share=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def agree(q, k, v, mask, **options):
    chosen = fmha.explain(q, k, v, mask=mask, device=DEVICE, **options).chosen
    assert (chosen.arch.value, chosen.mask.value) == ("sm90a", "packed")
    out, lse = fmha.attention(q, k, v, mask=mask, return_lse=True, device=DEVICE, **options)
    ref, ref_lse = reference.attention(q, k, v, mask=mask, **options)
    assert (out.double() - ref).norm() <= REL_L2[q.dtype] * ref.norm()
    assert torch.equal(lse.isinf(), ref_lse.isinf())
    assert (lse.double() - ref_lse).nan_to_num(0).abs().max() < 1e-3
    assert (out.transpose(1, 2)[ref_lse.isinf()] == 0).all()
    return out


@pytest.mark.parametrize("d,dv", HEAD_DIMS)
def test_every_head_dim_reads_the_right_bits(d, dv):
    """Three tiles and a bit: tiles of 80 or 112 keys begin inside a block of the mask."""
    q, k, v = qkv(1, 200, 403, 2, 1, d, dv)
    agree(q, k, v, random_mask(1, 2, 200, 403))


@pytest.mark.parametrize("d", [48, 80, 128])
def test_fp16(d):
    q, k, v = qkv(2, 150, 300, 4, 2, d, dtype=torch.float16)
    agree(q, k, v, random_mask(2, 4, 150, 300, share=0.1))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("sq,sk", [(70, 300), (300, 70), (1, 500)])
def test_masks_of_batch_and_heads(shape, sq, sk):
    q, k, v = qkv(2, sq, sk, 4, 2, 64)
    agree(q, k, v, random_mask(*shape, sq, sk))


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": (40, 10)},
        {"seqused_k": torch.tensor([200, 0], dtype=torch.int32)},
        {"sinks": torch.randn(4)},
        {"attention_chunk": 48},
        {"scale": 0.3},
    ],
    ids=lambda o: next(iter(o)),
)
@pytest.mark.parametrize("d", [64, 80])
def test_options_apply_on_top(options, d):
    q, k, v = qkv(2, 230, 403, 4, 2, d)
    mask = random_mask(1, 1, 230, 403)
    assert not torch.equal(agree(q, k, v, mask, **options), agree(q, k, v, mask))


def test_a_full_mask_is_no_mask_and_a_causal_one_is_causal():
    q, k, v = qkv(1, 400, 400, 2, 1, 64)
    full = torch.ones(400, 400, dtype=torch.bool)
    for mask, causal in ((full, False), (full.tril(), True)):
        want = fmha.attention(q, k, v, causal=causal, device=DEVICE)
        out = agree(q, k, v, mask)
        assert (out.float() - want.float()).abs().max() < 2e-2


@pytest.mark.parametrize("d", [64, 256])
def test_an_empty_mask_hides_everything(d):
    """Nor is V touched, whatever it holds; the next query tile of a CTA is served all the same."""
    q, k, v = qkv(1, 500, 330, 2, 1, d)
    mask = torch.zeros(500, 330, dtype=torch.bool)
    v[:, :, 0, 0] = math.nan
    out, lse = fmha.attention(q, k, v, mask=mask, return_lse=True, device=DEVICE)
    assert (out == 0).all() and (lse == -math.inf).all()
    mask[300:] = random_mask(200, 330)
    v = v.nan_to_num(0)
    agree(q, k, v, mask)


@pytest.mark.parametrize("d,align", [(128, 128), (80, 192), (192, 64)])
def test_tiles_without_a_bit_are_not_visited(d, align):
    """Their keys and values are NaN: one tile that is read would show. `align`: whole tiles and blocks of the mask."""
    q, k, v = qkv(1, 100, 12 * align, 2, 1, d)
    mask = torch.zeros(100, 12 * align, dtype=torch.bool)
    for tile, share in ((0, 0.5), (3, 0.01), (4, 1.0), (10, 0.2)):
        mask[:, tile * align : (tile + 1) * align] = random_mask(100, align, seed=tile, share=share)
    want = agree(q, k, v, mask)
    for tile in (1, 2, 5, 6, 7, 8, 9, 11):
        for x in (k, v):
            x[:, tile * align : (tile + 1) * align] = math.nan
    assert torch.equal(fmha.attention(q, k, v, mask=mask, device=DEVICE), want)


def test_a_walk_over_many_words_of_the_summary():
    """32 blocks a word: keys in the first, in the last and in none of the words between."""
    q, k, v = qkv(1, 40, 9000, 2, 1, 32)
    mask = torch.zeros(40, 9000, dtype=torch.bool)
    mask[:, 70] = mask[7, 2047] = mask[8, 6144] = mask[:, 8999] = True
    agree(q, k, v, mask)
    agree(q, k, v, mask, window=(3000, None))
    mask[:, 2048:] = False
    agree(q, k, v, mask)


@pytest.mark.parametrize("cols", [50, 64, 130])
def test_keys_beyond_the_columns_are_not_seen(cols):
    q, k, v = qkv(1, 70, 400, 2, 1, 64)
    narrow = random_mask(1, 1, 70, cols)
    wide = torch.nn.functional.pad(narrow, (0, 400 - cols))
    out = fmha.attention(q, k, v, mask=narrow, device=DEVICE)
    assert torch.equal(out, agree(q, k, v, wide))


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("d", [64, 80])
def test_varlen(heads, d):
    lens_q, lens_k = [5, 0, 270, 3, 129], [9, 4, 340, 130, 64]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lens_q, lens_k))
    g = torch.Generator().manual_seed(5)
    q = torch.randn(sum(lens_q), 4, d, generator=g).bfloat16()
    k, v = (torch.randn(sum(lens_k), 2, d, generator=g).bfloat16() for _ in "kv")
    mask = random_mask(heads, sum(lens_q), 340)
    mask[:, 5 + 64 : 5 + 256] &= False  # a query tile's worth of rows of the third sequence, mostly
    for options in ({}, {"causal": True}):
        out, lse = fmha.attention_varlen(
            q, k, v, cu_q, cu_k, 270, 340, mask=mask, return_lse=True, device=DEVICE, **options
        )
        ref, ref_lse = reference.attention_varlen(q, k, v, cu_q, cu_k, mask=mask, **options)
        assert (out.double() - ref).norm() <= REL_L2[q.dtype] * ref.norm()
        assert torch.equal(lse.isinf(), ref_lse.isinf())


@given(
    sq=st.integers(1, 240), sk=st.integers(0, 500), seed=st.integers(0, 99), causal=st.booleans(),
    share=st.sampled_from([0.0, 0.0005, 0.05, 0.9]), d=st.sampled_from([40, 80]),
    window=st.none() | st.integers(0, 300),
)  # fmt: skip
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_mask(sq, sk, seed, causal, share, d, window):
    q, k, v = qkv(1, sq, sk, 2, 1, d)
    options = {"causal": causal, "window": (window, None), "mask": random_mask(1, 2, sq, sk, seed=seed, share=share)}
    out, lse = fmha.attention(q, k, v, return_lse=True, device=DEVICE, **options)
    ref, ref_lse = reference.attention(q, k, v, **options)
    assert (out.double() - ref).abs().max() < 3e-2
    assert torch.equal(lse.isinf(), ref_lse.isinf())


# --- mutants: what the emulator or the numbers must notice

SPEC = KernelSpec.parse("fmha_fwd_sm90a_bf16_d80_packed")


def mutant(
    pattern: str, replacement: str, fault: str, file: str = "forward/wgmma_packed.cuh", kernel: str = SPEC.name
) -> Mutant:
    return Mutant(file, pattern, replacement, fault, kernel)


MUTANTS = {
    "consumers visit every tile": mutant(
        r"after = tile_after\(n_block\);(?=\s*more)", "after = n_block - 1;", "deadlock", "forward/wgmma.cuh"
    ),
    "a word's summary is of the first row block only": mutant(
        r"i < kRowBlocks; \+\+i\) \{\s*seen", "i < 1; ++i) { seen", ""
    ),
    "the walk ends with its first word": mutant(r"block = block / 32 \* 32 - 1;", "block = -1;", ""),
    "consumers read the words of the first": mutant(
        r"own\(p, seq, work\.batch, work\.head, row_begin,",
        "own(p, seq, work.batch, work.head, work.row_begin,",
        "",
        "forward/wgmma.cuh",
    ),
    "a consumer is done too early": mutant(r"more = after >= leftmost;", "more = false;", "", "forward/wgmma.cuh"),
    "a consumer starts where another does": mutant(
        r"own\.left_of\(range\.end\) \+ 1;", "range.begin + 1;", "deadlock|byte offset", "forward/wgmma.cuh"
    ),
    "the second word is not there": mutant(r"i \+ 1 < kWords \? words\[i \+ 1\] : 0", "words[kWords] * 0", ""),
    "tiles begin where blocks do": mutant(r"Traits::kBlockN % 64 / 2\)", "Traits::kBlockN % 64 * 0)", ""),
    "the next tile is told after K is full": mutant(
        r"(if constexpr \(Traits::kPacked\) \{\s*st_shared_v4\(smem\.next_tile[^;]*;\s*\})"
        r"(\s*mbarrier_arrive_expect[^;]*;)",
        r"\2 \1",
        "race at .*(next|wrote with|read with)|ld_shared_v4",
        "forward/wgmma.cuh",
        "fmha_fwd_sm90a_bf16_d64_packed",  # of two Q stages: with one, Q comes after the first K, and brings it along
    ),
    "all lanes read what lane 0 hands back": mutant(
        r"lane == 0 \? (static_cast<int>\(ld_shared_v4\(smem\.next_tile.*?\)) : 0;",
        r"\1;",
        "race at",
        "forward/wgmma.cuh",
    ),
    "words beyond the columns are read": mutant(
        r"at < static_cast<uint32_t>\(col_blocks\)\s*\?\s*(PackedMask::load\(from \+ at \* 128\)) : 0",
        r"\1",
        "ld_global_s32: .* byte offset",
    ),
    "row blocks below the mask are read": mutant(
        r"i < row_blocks \? (PackedMask::load\(any \+ i \* stride\)) : 0", r"\1", "ld_global_s32: .* byte offset"
    ),
}


def outputs(kernel: emulator.Kernel, spec: KernelSpec) -> tuple[torch.Tensor]:
    """Two query tiles of two heads; keys in the second row block and in the first word of the summary count alone. The
    last KV tile begins in the last block."""
    q, k, v = qkv(1, 300, 4250, 2, 2, spec.head_dim)
    mask = torch.zeros(300, 4250, dtype=torch.bool)
    mask[:, 2048:2300] = random_mask(300, 252)
    mask[:64, 2048:2100] = False
    mask[64:128, 500:800] = random_mask(64, 300, seed=1)
    mask[:, 4249] = True
    out = direct.run(kernel, spec, q, k, v, mask=mask)
    assert isinstance(out, torch.Tensor)
    return (out,)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path) -> None:
    assert_caught(MUTANTS[name], tmp_path / "fmha", outputs, [Order.FORWARD])


def test_the_real_kernel_is_the_same_in_every_order() -> None:
    assert_the_same_in_every_order(SPEC, outputs)

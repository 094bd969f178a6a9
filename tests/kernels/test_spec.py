# SPDX-License-Identifier: Apache-2.0
"""Names and kernels are inverse functions; the catalogue has what it promises, and tiles fit."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from fmha_runtime.errors import InputError, UnsupportedProblem
from fmha_runtime.kernels import catalog
from fmha_runtime.kernels.spec import HEAD_DIMS, Arch, DType, KernelSpec, KvLayout, Mask, Op, Score
from fmha_runtime.kernels.tile import Tile

SPECS = catalog.enumerate_specs()
# KiB of shared memory on one SM, of which each CTA costs 1 KiB more than it asks for.
SM_KIB = {(8, 0): 164, (8, 6): 100, (8, 9): 100, (9, 0): 228, (12, 0): 100}


def test_catalogue_is_every_dtype_and_head_dim_of_every_arch():
    forward = [s for s in SPECS if s.op is Op.FWD]
    long = [s for s in forward if not s.short]
    gemma = 6 * 2 * 2 * 2  # softcap with a packed mask, contiguous or in pages
    assert len(long) == 6 * 2 * 13 * 8 + gemma  # targets, dtypes, head dims, features
    assert {(s.arch, s.dtype, s.head_dim, s.head_dim_v) for s in forward} == {
        (arch, dtype, *dims) for arch in Arch for dtype in (DType.FP16, DType.BF16) for dims in HEAD_DIMS
    }
    assert [s.name for s in SPECS] == sorted({s.name for s in SPECS})


def test_short_rows_are_other_cuts_of_plain_hopper_kernels():
    short = [s for s in SPECS if s.short and s.op is Op.FWD]
    dims = (32, 40, 48, 64, 80, 96, 104, 192, 256)
    assert {s.name for s in short} == {f"fmha_fwd_sm90a_{t}_d{d}_short" for t in ("bf16", "fp16") for d in dims}
    for spec in short:
        assert spec.long in SPECS and spec.long.long == spec.long and not spec.long.short
        assert catalog.tile(spec) != catalog.tile(spec.long)
        for change in ({"score": Score.ALIBI}, {"mask": Mask.PACKED}, {"kv": KvLayout.PAGED}, {"arch": Arch.SM90}):
            assert catalog.exists(replace(spec.long, **change)) and not catalog.exists(replace(spec, **change))


def test_each_family_of_archs_packs_masks():
    assert [s.name for s in SPECS if s.op is Op.PACK] == [
        f"fmha_pack_{arch}_u8" for arch in ("sm120", "sm80", "sm86", "sm89", "sm90")
    ]


@pytest.mark.parametrize("arch", Arch)
def test_enumeration_of_one_arch(arch):
    assert catalog.enumerate_specs(arch) == tuple(s for s in SPECS if s.arch is arch)


def test_parse_is_the_inverse_of_name():
    axes = (Arch, DType, HEAD_DIMS, Mask, Score, KvLayout, (False, True))
    specs = [
        KernelSpec(Op.FWD, arch, dtype, *dims, mask, score, kv, short)
        for arch, dtype, dims, mask, score, kv, short in itertools.product(*axes)
    ]
    specs += [KernelSpec(Op.PACK, arch, dtype, 0, 0) for arch in Arch for dtype in DType]
    assert [KernelSpec.parse(spec.name) for spec in specs] == specs
    assert len({spec.name for spec in specs}) == len(specs)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "fmha",
        "fmha_fwd_sm90_bf16",
        "fmha_fwd_sm90_bf16_d64x64",
        "fmha_fwd_sm90_bf16_packed",
        "fmha_pack_sm90_u8_d64",
        "fmha_pack_sm90_u8_packed",
        "fmha_pack_sm90_u8_short",
        "fmha_fwd_sm90a_bf16_d64_short_paged",
        "fmha_fwd_sm90a_bf16_d64_long",
        "fmha_fwd_sm90_bf16_d064",
        "fmha_fwd_sm75_bf16_d64",
        "fmha_fwd_sm90_fp32_d64",
        "fmha_fwd_sm90_bf16_d64_packed_alibi_packed",
        "fmha_fwd_sm90_bf16_d64_alibi_softcap",
        "fmha_fwd_sm90_bf16_d64\n",
        "../fmha_fwd_sm90_bf16_d64",
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(InputError, match="is not a kernel name"):
        KernelSpec.parse(name)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((7, 5), None),
        ((8, 0), Arch.SM80),
        ((8, 6), Arch.SM86),
        ((8, 7), Arch.SM86),
        ((8, 9), Arch.SM89),
        ((9, 0), Arch.SM90),
        ((10, 0), None),
        ((12, 0), Arch.SM120),
        ((12, 1), Arch.SM120),
    ],
)
def test_cubins_stay_within_their_major_capability(capability, arch):
    assert Arch.for_capability(*capability) is arch


def test_every_tile_fits_as_often_as_it_says():
    for spec in SPECS:
        tile = catalog.tile(spec)
        need = catalog.smem_bytes(spec, tile)
        assert tile.ctas_per_sm * (need + 1024) <= SM_KIB[spec.arch.capability] * 1024, (spec.name, tile)
        assert Tile.parse(str(tile)) == tile


def test_shared_memory_counts_the_rounded_depth_of_q_and_k():
    spec = KernelSpec.parse("fmha_fwd_sm80_bf16_d72")
    assert catalog.smem_bytes(spec, Tile(64, 32, 4, 2, 1)) == 2 * (64 * 80 + 2 * 32 * (80 + 72))


def test_a_tile_that_does_not_fit_is_refused_with_the_numbers():
    spec = KernelSpec.parse("fmha_fwd_sm86_bf16_d256")
    with pytest.raises(InputError, match=r"163840 bytes.*sm86 allows 101376"):
        catalog.smem_bytes(spec, Tile(64, 64, 4, 2, 1))


@pytest.mark.parametrize("text", ["", "128x64", "100x64 w4 s2 c1", "64x24 w4 s2 c1", "64x64 w4 s1 c1"])
def test_impossible_tiles_are_refused(text):
    with pytest.raises(InputError, match="tile"):
        Tile.parse(text)


def test_a_kernel_outside_the_catalogue_has_no_tile():
    spec = KernelSpec.parse("fmha_fwd_sm90_bf16_d60_packed_alibi")
    assert not catalog.exists(spec)
    with pytest.raises(UnsupportedProblem, match=r"no kernel fmha_fwd_sm90_bf16_d60_packed_alibi.*multiples of 8"):
        catalog.tile(spec)

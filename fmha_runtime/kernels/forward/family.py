# SPDX-License-Identifier: Apache-2.0
"""The attention kernels: which exist, how each is cut, what shared memory it takes, which struct it is given."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from ..spec import HEAD_DIMS, Arch, DType, KernelSpec, KvLayout, Mask, Op, Score
from ..tile import Tile
from ..unit import ELEMENT, Unit, template
from . import params, tiles

_FEATURES: tuple[tuple[Mask, Score, KvLayout], ...] = tuple(
    (mask, score, kv)
    for mask in Mask
    for score in Score
    for kv in KvLayout
    if mask is Mask.BAND or score is Score.PLAIN
)
"""Masks, scores and KV layouts that are core for every head dim and target."""

_ALSO = frozenset((d, Mask.PACKED, Score.SOFTCAP) for d in ((128, 128), (256, 256)))
"""Head dims with a packed mask and softcap, contiguous and paged: Gemma 2 and 3 with padding on the left."""


def specs(arch: Arch) -> Iterator[KernelSpec]:
    """The attention kernels of an arch."""
    for dtype in (DType.FP16, DType.BF16):
        for dims in HEAD_DIMS:
            for mask, score, kv in product(Mask, Score, KvLayout):
                spec = KernelSpec(Op.FWD, arch, dtype, *dims, mask, score, kv)
                for each in (spec, replace(spec, short=True)):
                    if is_core(each):
                        yield each


def is_core(spec: KernelSpec) -> bool:
    """Whether this attention kernel is enumerated."""
    dims = (spec.head_dim, spec.head_dim_v)
    features = (spec.mask, spec.score, spec.kv) in _FEATURES or (dims, spec.mask, spec.score) in _ALSO
    return (
        spec.op is Op.FWD
        and spec.dtype in (DType.FP16, DType.BF16)
        and dims in tiles.TILES
        and features
        and (not spec.short or _has_short(spec))
    )


def is_extended(spec: KernelSpec) -> bool:
    """Whether the sources can express this attention kernel, though nobody tuned it: head dims in steps of 8 (rows are
    copied in chunks of 16 bytes), any mask, score and layout."""
    if spec.op is not Op.FWD or spec.dtype not in (DType.FP16, DType.BF16) or spec.short or is_core(spec):
        return False
    if spec.arch is not Arch.SM90A and spec.head_dim_v > -(-spec.head_dim // 16) * 16:
        return False  # O is staged in the rows of Q
    return all(8 <= d <= MAX_HEAD_DIM and d % 8 == 0 for d in (spec.head_dim, spec.head_dim_v))


MAX_HEAD_DIM = 256


def _tuned(spec: KernelSpec) -> tuple[int, int]:
    """The head dims of the table whose tiles a kernel takes: its own, or the next ones with room for them."""
    dims = (spec.head_dim, spec.head_dim_v)
    room = [each for each in tiles.TILES if each[0] >= dims[0] and each[1] >= dims[1]]
    return dims if dims in tiles.TILES else min(room, key=sum)


def _has_short(spec: KernelSpec) -> bool:
    """Whether there is a cut of this kernel for short sequences."""
    plain = (spec.mask, spec.score, spec.kv) == (Mask.BAND, Score.PLAIN, KvLayout.CONTIGUOUS)
    return spec.arch is Arch.SM90A and plain and (spec.head_dim, spec.head_dim_v) in tiles.HOPPER_SHORT_TILES


def tile(spec: KernelSpec) -> str:
    """The tile of a kernel that exists, as text."""
    dims = _tuned(spec)
    if spec.arch is not Arch.SM90A:
        return _mma_tile(spec)
    if spec.short:
        return tiles.HOPPER_SHORT_TILES[dims]
    return _hopper_feature_tile(spec) or tiles.HOPPER_TILES[dims]


def _hopper_feature_tile(spec: KernelSpec) -> str | None:
    """The cut that a packed mask, softcap or pages ask for, if one of them does."""
    dims = _tuned(spec)
    mask, score, kv = spec.mask.value, spec.score.value, spec.kv.value
    words = [f"{mask} {score} {kv}", f"{mask} {score}", f"{mask} {kv}", mask, f"{score} {kv}", score, kv]
    found = (tiles.HOPPER_FEATURE_TILES.get((dims, word)) for word in words)
    return next(filter(None, found), None)


def _mma_tile(spec: KernelSpec) -> str:
    dims, column = _tuned(spec), tiles.COLUMN[spec.arch]
    if spec.arch is Arch.SM120 and dims in tiles.SM120_TILES:
        text = tiles.SM120_TILES[dims][spec.mask is not Mask.PACKED]
        if text is not None:
            return text
    for word in (spec.mask.value, spec.score.value, spec.kv.value):
        special = tiles.FEATURE_TILES.get((dims, word))
        if special is not None and (text := special[column]) is not None:
            return text
    return tiles.TILES[dims][column]


def smem_bytes(spec: KernelSpec, tile: Tile) -> int:
    """Dynamic shared memory of one CTA in bytes."""
    return _hopper_smem(spec, tile) if spec.arch is Arch.SM90A else _smem(spec, tile)


def _smem(spec: KernelSpec, tile: Tile) -> int:
    """Q and the K stages are as deep as the instruction wants (a multiple of 16), V is exact; O reuses Q's rows."""
    depth = -(-spec.head_dim // 16) * 16
    elements = tile.block_m * depth + tile.stages * tile.block_n * (depth + spec.head_dim_v)
    return spec.dtype.itemsize * elements


def _hopper_smem(spec: KernelSpec, tile: Tile) -> int:
    """Q (of two tiles where there is room), K and V in column groups as wide as the swizzle span, and 1024 bytes of
    barriers and assignments."""
    columns = 32 if spec.head_dim <= 32 else 64
    depth, width = (-(-d // columns) * columns for d in (spec.head_dim, spec.head_dim_v))
    q_tile = spec.dtype.itemsize * tile.block_m * depth
    one = q_tile + spec.dtype.itemsize * tile.stages * tile.block_n * (depth + width) + 1024
    return one + q_tile if one + q_tile <= spec.arch.smem_limit else one


def allowed_spill_bytes(spec: KernelSpec) -> int:
    """Bytes of register spills (stores plus loads) that the build accepts."""
    return tiles.ALLOWED_SPILLS.get(spec.name, (0, ""))[0]


def unit(spec: KernelSpec, tile: Tile) -> Unit:
    """The translation unit of a kernel."""
    dims = (ELEMENT[spec.dtype], spec.head_dim, spec.head_dim_v)
    score = f"fmha::Score::k{spec.score.value.capitalize()}"
    packed, paged = spec.mask is Mask.PACKED, spec.kv is KvLayout.PAGED
    if spec.arch is Arch.SM90A:
        consumers = tile.block_m // 64
        traits = template("FwdSm90Traits", *dims, score, tile.block_n, consumers, tile.stages, packed, paged)
        return Unit("forward/wgmma.cuh", traits, "FwdSm90Params", "fwd_sm90")
    cut = (tile.block_m, tile.block_n, tile.warps, tile.stages, "true" if tile.q_in_regs else "false")
    features = (spec.score is not Score.PLAIN and score, packed, paged)
    if packed or paged:
        features = (score, packed, paged)
    return Unit("forward/mma.cuh", template("FwdTraits", *dims, *cut, *features), "FwdParams", "fwd_sm80")


def block(spec: KernelSpec) -> type[ctypes.Structure]:
    """The struct that the kernel takes by value."""
    return params.FwdSm90Params if spec.arch is Arch.SM90A else params.FwdParams


def serves(spec: KernelSpec, mask: Mask, score: Score) -> bool:
    """Whether a kernel computes attention with such masks and scores: those of its name."""
    return (spec.mask, spec.score) == (mask, score)

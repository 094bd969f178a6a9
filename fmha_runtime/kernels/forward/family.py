# SPDX-License-Identifier: Apache-2.0
"""The attention kernels: which exist, how each is cut, what shared memory it takes, which struct it is given."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace

from ..spec import HEAD_DIMS, Arch, DType, KernelSpec, KvLayout, Mask, Op, Score
from ..tile import Tile
from . import params, tiles

_FEATURES: tuple[tuple[Mask, Score, KvLayout], ...] = tuple(
    (mask, score, kv)
    for mask in Mask
    for score in Score
    for kv in KvLayout
    if mask is Mask.BAND or score is Score.PLAIN
)
"""Masks, scores and KV layouts that are built for every head dim and target."""


def specs(arch: Arch) -> Iterator[KernelSpec]:
    """The attention kernels of an arch."""
    for dtype in (DType.FP16, DType.BF16):
        for dims in HEAD_DIMS:
            for mask, score, kv in _FEATURES:
                spec = KernelSpec(Op.FWD, arch, dtype, *dims, mask, score, kv)
                yield spec
                if exists(short := replace(spec, short=True)):
                    yield short


def exists(spec: KernelSpec) -> bool:
    """Whether there is this attention kernel."""
    return (
        spec.op is Op.FWD
        and spec.dtype in (DType.FP16, DType.BF16)
        and (spec.head_dim, spec.head_dim_v) in tiles.TILES
        and (spec.mask, spec.score, spec.kv) in _FEATURES
        and (not spec.short or _has_short(spec))
    )


def _has_short(spec: KernelSpec) -> bool:
    """Whether there is a cut of this kernel for short sequences."""
    plain = (spec.mask, spec.score, spec.kv) == (Mask.BAND, Score.PLAIN, KvLayout.CONTIGUOUS)
    return spec.arch is Arch.SM90A and plain and (spec.head_dim, spec.head_dim_v) in tiles.HOPPER_SHORT_TILES


def tile(spec: KernelSpec) -> str:
    """The tile of a kernel that exists, as text."""
    dims = (spec.head_dim, spec.head_dim_v)
    if spec.arch is not Arch.SM90A:
        return _mma_tile(spec)
    if spec.short:
        return tiles.HOPPER_SHORT_TILES[dims]
    return _hopper_feature_tile(spec) or tiles.HOPPER_TILES[dims]


def _hopper_feature_tile(spec: KernelSpec) -> str | None:
    """The cut that a packed mask, softcap or pages ask for, if one of them does."""
    dims = (spec.head_dim, spec.head_dim_v)
    mask, score, kv = spec.mask.value, spec.score.value, spec.kv.value
    words = [f"{mask} {kv}", mask, f"{score} {kv}", score, kv]
    found = (tiles.HOPPER_FEATURE_TILES.get((dims, word)) for word in words)
    return next(filter(None, found), None)


def _mma_tile(spec: KernelSpec) -> str:
    dims, column = (spec.head_dim, spec.head_dim_v), tiles.COLUMN[spec.arch]
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


def block(spec: KernelSpec) -> type[ctypes.Structure]:
    """The struct that the kernel takes by value."""
    return params.FwdSm90Params if spec.arch is Arch.SM90A else params.FwdParams

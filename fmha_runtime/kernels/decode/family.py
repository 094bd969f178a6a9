# SPDX-License-Identifier: Apache-2.0
"""The kernels for few queries on many keys: which exist, how each is cut, what shared memory it takes.

Masks and scores are decided at run time, so there is one kernel where the forward family has six. A ``short`` kernel is
the twin for up to 16 rows, pairs of a query and a head that shares its KV head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import product

from ..spec import HEAD_DIMS, Arch, DType, KernelSpec, KvLayout, Mask, Op, Score
from ..tile import Tile
from ..unit import ELEMENT, Unit, template
from . import params

_ARCHS = (Arch.SM80, Arch.SM86, Arch.SM89, Arch.SM90, Arch.SM120)
_SM_KIB = {Arch.SM80: 164, Arch.SM90: 228}  # shared memory of an SM; elsewhere 100

SHORT_ROWS = 16
ROWS = 64
"""Rows that a CTA of a short kernel and of any other computes at a time: the numbers dispatch counts in."""


def specs(arch: Arch) -> Iterator[KernelSpec]:
    """The decode kernels of an arch."""
    if arch not in _ARCHS:
        return
    for dtype in (DType.FP16, DType.BF16):
        for dims in HEAD_DIMS:
            for kv in KvLayout:
                for short in (False, True):
                    yield KernelSpec(Op.DECODE, arch, dtype, *dims, kv=kv, short=short)


def is_core(spec: KernelSpec) -> bool:
    """Whether there is this kernel."""
    return (
        spec.op is Op.DECODE
        and spec.arch in _ARCHS
        and spec.dtype in (DType.FP16, DType.BF16)
        and (spec.head_dim, spec.head_dim_v) in HEAD_DIMS
        and (spec.mask, spec.score) == (Mask.BAND, Score.PLAIN)
    )


def is_extended(spec: KernelSpec) -> bool:
    """There are no others yet."""
    return False


def tile(spec: KernelSpec) -> str:
    """The tile of a kernel, as text: two CTAs an SM where registers and shared memory allow them, to hide each other's
    ends; then three stages, where they fit."""
    wide = max(spec.head_dim, spec.head_dim_v)
    large = spec.arch in _SM_KIB
    if not spec.short:
        rows, keys = ROWS, 64 if wide <= 128 else 32
    else:
        rows, keys = (32, 32) if wide > 128 and not large else (SHORT_ROWS, 128 if wide <= 64 else 64)
    q_in_regs = wide <= 128 and wide != 104 and large  # 104: its odd number of n8 tiles takes the registers
    room = 1024 * _SM_KIB.get(spec.arch, 100)
    twice = wide <= 64 or (spec.short and wide <= 128)
    for ctas, stages in product((2, 1) if twice else (1,), (3, 2)):
        if wide == 256 and spec.short and large and stages == 3:
            continue  # more CTAs than stages
        found = Tile(rows, keys, 4, stages, ctas, q_in_regs)
        if ctas * (smem_bytes(spec, found) + 1024) <= room:
            return str(found)
    raise AssertionError(spec.name)


def smem_bytes(spec: KernelSpec, tile: Tile) -> int:
    """Dynamic shared memory of one CTA in bytes: Q, the stages, the places of keys in their pools, a few words. The
    results of warps that share keys meet where the stages were."""
    depth = -(-spec.head_dim // 16) * 16
    size = spec.dtype.itemsize
    ring = size * tile.stages * tile.block_n * (depth + spec.head_dim_v)
    along_keys = tile.warps * 16 // tile.block_m
    exchange = 0 if along_keys == 1 else tile.warps * spec.head_dim_v * 64 + tile.block_m * along_keys * 8
    places = tile.stages * tile.block_n * 16 if spec.kv is KvLayout.PAGED else 0
    return size * tile.block_m * depth + max(ring, exchange) + places + 64


def allowed_spill_bytes(spec: KernelSpec) -> int:
    """Bytes of register spills (stores plus loads) that the build accepts: none up to head dim 96. What spills above is
    the set-up of a unit and the sum of results, around a loop that waits for memory."""
    wide = max(spec.head_dim, spec.head_dim_v)
    return 0 if wide <= 96 else 128 if wide <= 128 else 1280


def unit(spec: KernelSpec, tile: Tile) -> Unit:
    """The translation unit of a kernel."""
    cut = (tile.block_m, tile.block_n, tile.warps, tile.stages, "true" if tile.q_in_regs else "false")
    paged = spec.kv is KvLayout.PAGED
    traits = template("DecodeTraits", ELEMENT[spec.dtype], spec.head_dim, spec.head_dim_v, *cut, paged)
    return Unit("decode/mma.cuh", traits, "DecodeParams", "decode")


def block(spec: KernelSpec) -> type[ctypes.Structure]:
    """The struct that the kernel takes by value."""
    return params.DecodeParams


def serves(spec: KernelSpec, mask: Mask, score: Score) -> bool:
    """All masks and scores: they are decided at run time."""
    return True

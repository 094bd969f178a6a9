# SPDX-License-Identifier: Apache-2.0
"""The kernels for few queries on many keys: which exist, how each is cut, what shared memory it takes.

Masks and scores are decided at run time, so there is one kernel where the forward family has six. A ``short`` kernel is
the twin for up to 16 rows, pairs of a query and a head that shares its KV head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from ..spec import HEAD_DIMS, Arch, DType, KernelSpec, KvLayout, Mask, Op, Score
from ..tile import Tile
from ..unit import ELEMENT, Unit, template
from . import params

# An sm_86 cubin runs on compute capability 8.9, and nothing newer helps a kernel that waits for memory.
_ARCHS = (Arch.SM80, Arch.SM86, Arch.SM90, Arch.SM120)
_LARGE = (Arch.SM80, Arch.SM90)  # 163 and 227 KiB of shared memory; 99 elsewhere
_SPILLS = 1024

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
    """The tile of a kernel, as text: rows and keys of a step. Two CTAs an SM hide each other's ends."""
    wide = max(spec.head_dim, spec.head_dim_v)
    large = spec.arch in _LARGE
    if spec.short:
        if wide >= 256 or (wide > 128 and not large):
            return f"32x32 w4 s{3 if large else 2} c1"
        if wide > 128:
            return f"16x64 w4 s{3 if spec.arch is Arch.SM90 else 2} c1"
        q = "" if wide == 104 else " q"  # an odd number of n8 tiles takes the registers that Q would
        stages = 3 if spec.arch is Arch.SM90 or wide <= 64 else 2
        return f"16x64 w4 s{stages} c{2 if large or wide <= 96 else 1}{q}"
    if wide > 128:
        return f"64x32 w4 s{3 if large else 2} c1"
    stages = 3 if spec.arch is Arch.SM90 or wide <= 64 else 2
    return f"64x64 w4 s{stages} c{2 if large or wide <= 64 else 1}"


def smem_bytes(spec: KernelSpec, tile: Tile) -> int:
    """Dynamic shared memory of one CTA in bytes: Q, the stages, a few words. The results of warps that share keys meet
    where the stages were."""
    depth = -(-spec.head_dim // 16) * 16
    size = spec.dtype.itemsize
    ring = size * tile.stages * tile.block_n * (depth + spec.head_dim_v)
    along_keys = tile.warps * 16 // tile.block_m
    exchange = 0 if along_keys == 1 else tile.warps * spec.head_dim_v * 64 + tile.block_m * along_keys * 8
    return size * tile.block_m * depth + max(ring, exchange) + 64


def allowed_spill_bytes(spec: KernelSpec) -> int:
    """Bytes of register spills (stores plus loads) that the build accepts: none up to head dim 128, but for 104. There
    and above, what spills is the set-up of a unit, around a loop that waits for memory."""
    wide = max(spec.head_dim, spec.head_dim_v)
    return _SPILLS if wide > 128 or wide == 104 else 0


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

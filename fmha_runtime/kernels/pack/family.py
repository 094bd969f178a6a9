# SPDX-License-Identifier: Apache-2.0
"""The kernels that pack masks: one an arch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from ..spec import Arch, DType, KernelSpec, Mask, Op, Score
from ..tile import Tile
from ..unit import Unit, template
from . import params

# One word of the "any" bits is 32 blocks of 64 x 64; two blocks of a warp in flight keep it within 64 registers.
_TILE = "64x2048 w16 s2 c2"
_ARCHS = (Arch.SM80, Arch.SM86, Arch.SM89, Arch.SM90, Arch.SM120)


def spec(arch: Arch) -> KernelSpec:
    """The kernel that packs masks, of one arch."""
    return KernelSpec(Op.PACK, arch, DType.U8, 0, 0)


def specs(arch: Arch) -> Iterator[KernelSpec]:
    """The packer of an arch, where it has one: sm90a is served by that of sm90."""
    if arch in _ARCHS:
        yield spec(arch)


def is_core(kernel: KernelSpec) -> bool:
    """Whether there is this packer."""
    return kernel.arch in _ARCHS and kernel == spec(kernel.arch)


def is_extended(kernel: KernelSpec) -> bool:
    """There are no others."""
    return False


def tile(kernel: KernelSpec) -> str:
    """The tile of a packer, as text."""
    return _TILE


def smem_bytes(kernel: KernelSpec, tile: Tile) -> int:
    """Dynamic shared memory of one CTA in bytes: a word a warp."""
    return 4 * tile.warps


def allowed_spill_bytes(kernel: KernelSpec) -> int:
    """Packers do not spill."""
    return 0


def unit(kernel: KernelSpec, tile: Tile) -> Unit:
    """The translation unit of a packer."""
    traits = template("PackMaskTraits", tile.warps, tile.stages)
    return Unit("pack/packer.cuh", traits, "PackMaskParams", "pack_mask")


def block(kernel: KernelSpec) -> type[ctypes.Structure]:
    """The struct that the kernel takes by value."""
    return params.PackMaskParams


def serves(kernel: KernelSpec, mask: Mask, score: Score) -> bool:
    """Packers compute no attention."""
    return False

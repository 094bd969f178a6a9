# SPDX-License-Identifier: Apache-2.0
"""Families with one kernel an arch: those that move bytes, whatever they mean, and compute no attention."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

from .spec import Arch, DType, KernelSpec, Mask, Op, Score
from .tile import Tile
from .unit import Unit, template

_ARCHS = (Arch.SM80, Arch.SM86, Arch.SM89, Arch.SM90, Arch.SM120)  # sm90a is served by the kernel of sm90


@dataclass(frozen=True)
class ByteFamily:
    """What ``catalog.Family`` asks of the kernels of an op.

    Attributes:
        text: the tile of every kernel.
        header: that defines it.
        traits: a class template, whose arguments are the tile's warps and, where ``staged``, its stages.
        params: the name of the struct in C++, ``struct`` its Python side.
        body: the function that is the kernel's body.
        smem_a_warp: bytes of shared memory that each warp of a CTA takes.
    """

    op: Op
    text: str
    header: str
    traits: str
    staged: bool
    struct: type[ctypes.Structure]
    body: str
    smem_a_warp: int = 0

    def spec(self, arch: Arch) -> KernelSpec:
        """The kernel of an arch, or the name that it would have."""
        return KernelSpec(self.op, arch, DType.U8, 0, 0)

    def specs(self, arch: Arch, /) -> Iterator[KernelSpec]:
        """The kernel of an arch, where it has one."""
        if arch in _ARCHS:
            yield self.spec(arch)

    def is_core(self, spec: KernelSpec, /) -> bool:
        """Whether there is this kernel."""
        return spec.arch in _ARCHS and spec == self.spec(spec.arch)

    def is_extended(self, spec: KernelSpec, /) -> bool:
        """There are no others."""
        return False

    def tile(self, spec: KernelSpec, /) -> str:
        """The tile of a kernel, as text."""
        return self.text

    def smem_bytes(self, spec: KernelSpec, tile: Tile, /) -> int:
        """Dynamic shared memory of one CTA in bytes."""
        return self.smem_a_warp * tile.warps

    def allowed_spill_bytes(self, spec: KernelSpec, /) -> int:
        """They do not spill."""
        return 0

    def unit(self, spec: KernelSpec, tile: Tile, /) -> Unit:
        """The translation unit of a kernel."""
        numbers = (tile.warps, tile.stages) if self.staged else (tile.warps,)
        return Unit(self.header, template(self.traits, *numbers), self.struct.__name__, self.body)

    def block(self, spec: KernelSpec, /) -> type[ctypes.Structure]:
        """The struct that the kernel takes by value."""
        return self.struct

    def serves(self, spec: KernelSpec, mask: Mask, score: Score, /) -> bool:
        """They compute no attention."""
        return False

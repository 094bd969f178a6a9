# SPDX-License-Identifier: Apache-2.0
"""Every kernel there is: the families of all ops as one catalogue, in two tiers.

*Core* kernels are enumerated, built by arch, and verified for a release. *Extended* ones are all others that the
sources can express: nothing lists them, they are built by their name or on demand, and nobody has run them until
`fmha verify`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Protocol

from ..errors import InputError, UnsupportedProblem
from .append import family as append
from .decode import family as decode
from .forward import family as forward
from .pack import family as pack
from .spec import Arch, KernelSpec, Mask, Op, Score
from .tile import Tile
from .unit import Unit

PROVEN_NVCC = "13.0.88"
"""The version of nvcc that the packaged manifest, the tuning and the verification are of."""


class Family(Protocol):
    """What a family's module says about the kernels of its op."""

    def specs(self, arch: Arch, /) -> Iterator[KernelSpec]: ...
    def is_core(self, spec: KernelSpec, /) -> bool: ...
    def is_extended(self, spec: KernelSpec, /) -> bool: ...
    def tile(self, spec: KernelSpec, /) -> str: ...
    def smem_bytes(self, spec: KernelSpec, tile: Tile, /) -> int: ...
    def allowed_spill_bytes(self, spec: KernelSpec, /) -> int: ...
    def unit(self, spec: KernelSpec, tile: Tile, /) -> Unit: ...
    def block(self, spec: KernelSpec, /) -> type[ctypes.Structure]: ...
    def serves(self, spec: KernelSpec, mask: Mask, score: Score, /) -> bool: ...


ANY_SPILLS = 1 << 30

FAMILIES: dict[Op, Family] = {
    Op.FWD: forward,
    Op.DECODE: decode,
    Op.PACK: pack.FAMILY,
    Op.APPEND: append.FAMILY,
}


@cache
def enumerate_specs(arch: Arch | None = None) -> tuple[KernelSpec, ...]:
    """The core kernels of one arch or of all, sorted by name."""
    archs = [each for each in Arch if arch is None or each is arch]
    found = [spec for family in FAMILIES.values() for each in archs for spec in family.specs(each)]
    return tuple(sorted(found, key=lambda spec: spec.name))


def is_core(spec: KernelSpec) -> bool:
    """Whether this is one of the enumerated kernels."""
    return FAMILIES[spec.op].is_core(spec)


def exists(spec: KernelSpec) -> bool:
    """Whether there is this kernel, core or extended."""
    family = FAMILIES[spec.op]
    return family.is_core(spec) or family.is_extended(spec)


def tile(spec: KernelSpec) -> Tile:
    """The tile that the catalogue gives this kernel.

    Raises:
        UnsupportedProblem: the catalogue does not have the kernel.
        InputError: its tile does not fit the arch's shared memory.
    """
    if not exists(spec):
        raise UnsupportedProblem(
            f"there is no kernel {spec.name}: `fmha list` shows the {len(enumerate_specs())} of the catalogue, and "
            "head dims that are multiples of 8 up to 256 can be built by name",
            problem=spec,
        )
    chosen = Tile.parse(FAMILIES[spec.op].tile(spec))
    smem_bytes(spec, chosen)
    return chosen


def smem_bytes(spec: KernelSpec, tile: Tile) -> int:
    """Dynamic shared memory of one CTA in bytes; the kernel asserts the same number (kSmemBytes of its traits).

    Raises:
        InputError: more than one CTA may use on this arch.
    """
    need = FAMILIES[spec.op].smem_bytes(spec, tile)
    if need > spec.arch.smem_limit:
        raise InputError(
            f"tile {tile} of {spec.name} needs {need} bytes of shared memory and "
            f"{spec.arch.value} allows {spec.arch.smem_limit} per CTA; "
            "use fewer rows, keys or stages"
        )
    return need


def allowed_spill_bytes(spec: KernelSpec) -> int:
    """Bytes of register spills (stores plus loads) that the build accepts of this kernel; any of an extended one, whose
    tile nobody tuned."""
    if not is_core(spec):
        return ANY_SPILLS
    return FAMILIES[spec.op].allowed_spill_bytes(spec)


def unit(spec: KernelSpec, tile: Tile) -> Unit:
    """What the kernel's translation unit says."""
    return FAMILIES[spec.op].unit(spec, tile)


def serves(spec: KernelSpec, mask: Mask, score: Score) -> bool:
    """Whether a kernel computes attention with such masks and scores: those of its name, or any where it decides at run
    time."""
    return FAMILIES[spec.op].serves(spec, mask, score)


def block(spec: KernelSpec) -> type[ctypes.Structure]:
    """The struct that a kernel takes by value."""
    return FAMILIES[spec.op].block(spec)


def spill_objection(spec: KernelSpec, spill_bytes: int) -> str:
    """What is too much about a kernel's spills; empty when the build accepts them.

    The numbers are PROVEN_NVCC's. What another version adds is worth a warning: the kernel is right all the same.
    """
    allowed = allowed_spill_bytes(spec)
    return f"{spill_bytes} bytes of spills where {allowed} are allowed" if spill_bytes > allowed else ""

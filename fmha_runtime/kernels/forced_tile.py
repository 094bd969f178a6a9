# SPDX-License-Identifier: Apache-2.0
"""Tiles that a caller forces, for experiments: from a few words to a tile that the kernel's family can have."""

from __future__ import annotations

import re
from dataclasses import replace

from ..errors import InputError
from . import catalog
from .spec import Arch, KernelSpec
from .tile import Tile

_FORCED = re.compile(r"(\d+)x(\d+)(?: w(\d+))?(?: s(\d+))?(?: c(\d+))?( q)?")


def parse(spec: KernelSpec, text: str) -> Tile:
    """The tile that a caller forces on a kernel: as ``Tile.parse`` reads it, or with words left out ("128x176").

    Left-out words are those of the kernel's own tile, warps those that the rows need, stages no more than fit shared
    memory. Whether registers suffice shows when it is built.

    Raises:
        InputError: the text is not a tile, or no kernel of this family can have it.
    """
    own, found = catalog.tile(spec), _FORCED.fullmatch(text.strip())
    if found is None:
        raise InputError(
            f"tile {text!r} is not understood; it is 'BLOCK_MxBLOCK_N[ wWARPS][ sSTAGES][ cCTAS_PER_SM][ q]', for "
            f"example '{own.block_m}x{own.block_n}' or '{own}' (the tile of {spec.name}), with a target in front where "
            "the GPU has two ('sm90 128x64')"
        )
    m, n = int(found[1]), int(found[2])
    hopper = spec.arch is Arch.SM90A
    warps = m // 16 + 4 if hopper else own.warps if m % (16 * own.warps) == 0 else max(1, m // 16)
    whole = all(found.group(3, 4, 5))
    w, s, c = (
        int(word or default)
        for word, default in zip(found.group(3, 4, 5), (warps, own.stages, own.ctas_per_sm), strict=True)
    )
    q = found[6] is not None or (own.q_in_regs and not whole)
    chosen = Tile.parse(f"{m}x{n} w{w} s{s} c{c}" + (" q" if q else ""))
    while not found[4] and chosen.stages > 2 and not _fits(spec, chosen):
        chosen = replace(chosen, stages=chosen.stages - 1)
    if hopper and (m % 64 or w != m // 16 + 4 or n > 256 or q):
        raise InputError(
            f"tile {chosen} does not fit {spec.name}: a Hopper kernel has 64 rows a consumer warpgroup and four "
            "warps more than those need, at most 256 keys a step, and keeps Q in shared memory"
        )
    if not hopper and (w > 32 or m % (16 * w)):
        raise InputError(f"tile {chosen} does not fit {spec.name}: each warp of an mma.sync kernel has whole m16 tiles")
    catalog.smem_bytes(spec, chosen)
    return chosen


def _fits(spec: KernelSpec, tile: Tile) -> bool:
    try:
        catalog.smem_bytes(spec, tile)
    except InputError:
        return False
    return True

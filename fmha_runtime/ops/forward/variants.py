# SPDX-License-Identifier: Apache-2.0
"""Which tiles of a kernel are worth building: the candidates of ``fmha tune``. Arithmetic only.

A candidate fits shared memory and, by an estimate, the registers; whether it spills, compiles and is right shows later.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...errors import InputError
from ...kernels import catalog
from ...kernels.spec import Arch, KernelSpec, Mask, Op
from ...kernels.tile import Tile

_CONSUMER_ROOM = {2: 216, 3: 136, 4: 92}
"""Registers a thread of a Hopper consumer has for S, P and O (setmaxnreg 232, 160 and 112), and a little over."""
_MOST_STAGES = 8
_ADDRESSES = 44  # registers that are neither S nor P nor O nor Q
_SM_KIB = {(8, 0): 164, (9, 0): 228}  # shared memory of an SM; elsewhere 100


def variants(spec: KernelSpec) -> tuple[Tile, ...]:
    """Tiles to try for a kernel, the catalogue's first.

    Raises:
        InputError: it computes no attention.
    """
    if spec.op is not Op.FWD:
        raise InputError(f"{spec.name} computes no attention: there is nothing to tune")
    found = _hopper(spec) if spec.arch is Arch.SM90A else _mma(spec)
    return tuple(dict.fromkeys((catalog.tile(spec), *found)))


def _hopper(spec: KernelSpec) -> Iterator[Tile]:
    """Two to four consumers; from the widest step that registers and shared memory allow downwards."""
    for consumers, room in _CONSUMER_ROOM.items():

        def tile(n: int, stages: int = 2, consumers: int = consumers) -> Tile:
            return Tile(64 * consumers, n, 4 * consumers + 4, stages, 1)

        fits = [n for n in range(256, 31, -16) if n * 3 // 4 + spec.head_dim_v // 2 <= room and _fits(spec, tile(n))]
        # Deeper rings hide more latency: three stages where they fit, and as many as fit.
        for n in _ladder(fits):
            deepest = max(stages for stages in range(2, _MOST_STAGES + 1) if _fits(spec, tile(n, stages)))
            yield from (tile(n, stages) for stages in sorted({min(3, deepest), deepest}))


def _ladder(fits: list[int]) -> list[int]:
    """The three widest, a middle and a narrow one, and 128, which powers of two like."""
    if not fits:
        return []
    wanted = {*fits[:3], fits[len(fits) * 2 // 5], fits[len(fits) * 3 // 5], 128}
    return [n for n in fits if n in wanted]


def _mma(spec: KernelSpec) -> Iterator[Tile]:
    """One or two m16 tiles a warp, and as many CTAs as make eight or twelve warps a SM."""
    best: list[tuple[int, Tile]] = []
    for rows, warps in ((64, 2), (64, 4), (128, 4), (128, 8)):
        for keys in (32, 48, 64, 96, 128):
            for stages in (2, 3) if keys == 32 and spec.mask is not Mask.PACKED else (2,):
                for q_in_regs in (False, True) if keys == 64 else (False,):
                    for ctas in range(1, 5):
                        tile = Tile(rows, keys, warps, stages, ctas, q_in_regs)
                        if _fits(spec, tile) and _registers(spec, tile) <= min(255, 65536 // (32 * warps * ctas)):
                            best.append((warps * ctas, tile))
    least = 8 if sum(warps >= 8 for warps, _ in best) >= 4 else 4  # small shared memory leaves no choice
    yield from (tile for warps, tile in best if least <= warps <= 12)


def _registers(spec: KernelSpec, tile: Tile) -> int:
    """Estimate of a thread's registers: fp32 S and O, 16-bit P and perhaps Q, of each m16 tile."""
    tiles = tile.block_m // (16 * tile.warps)
    q = spec.head_dim // 4 if tile.q_in_regs else 0
    return tiles * (spec.head_dim_v // 2 + tile.block_n * 3 // 4 + q) + _ADDRESSES


def _fits(spec: KernelSpec, tile: Tile) -> bool:
    try:
        need = catalog.smem_bytes(spec, tile)
    except InputError:
        return False
    return tile.ctas_per_sm * (need + 1024) <= _SM_KIB.get(spec.arch.capability, 100) * 1024

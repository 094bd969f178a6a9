# SPDX-License-Identifier: Apache-2.0
"""How a kernel is cut: a value with a text form."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import InputError

_TILE = re.compile(r"(\d+)x(\d+) w(\d+) s(\d+) c(\d+)( q)?")


@dataclass(frozen=True)
class Tile:
    """Query rows and keys of a step, warps of a CTA, K/V stages in shared memory.

    ``ctas_per_sm`` is the second number of ``__launch_bounds__``; ``q_in_regs`` keeps Q's fragments in registers.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    ctas_per_sm: int
    q_in_regs: bool = False

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return self.warps * 32

    def __str__(self) -> str:
        text = f"{self.block_m}x{self.block_n} w{self.warps} s{self.stages} c{self.ctas_per_sm}"
        return text + (" q" if self.q_in_regs else "")

    @classmethod
    def parse(cls, text: str) -> Tile:
        """The tile that ``str()`` writes as ``text``.

        Raises:
            InputError: the text is not a tile, or one that the kernels cannot be instantiated with.
        """
        found = _TILE.fullmatch(text)
        if found is None:
            raise InputError(
                f"{text!r} is not a tile; the form is "
                "'BLOCK_MxBLOCK_N wWARPS sSTAGES cCTAS_PER_SM[ q]', for example '128x64 w4 s2 c2'"
            )
        m, n, warps, stages, ctas = (int(number) for number in found.groups()[:5])
        # mma.sync kernels give each warp whole m16 tiles; Hopper's have a warpgroup a 64 rows and one more to produce.
        # The mask packer's several warps share 16 rows, those of a decode kernel share the keys of a step.
        packer = (m, n) == (64, 2048) and warps % 4 == 0
        decode = m in (16, 32) and warps == 4 and n % (16 * 64 // m) == 0
        whole = warps > 0 and (m % (16 * warps) == 0 or (m % 64 == 0 and warps == m // 16 + 4) or packer or decode)
        if not whole or ctas < 1 or stages < 2 or m < 1 or n < 1 or n % 16:
            raise InputError(
                f"tile {text!r} cannot be built: block_m must be a multiple of 16 * warps, "
                "block_n of 16, with at least 2 stages and 1 CTA per SM"
            )
        return cls(m, n, warps, stages, ctas, found[6] is not None)

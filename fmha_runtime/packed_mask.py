# SPDX-License-Identifier: Apache-2.0
"""Arbitrary boolean masks, one bit per query and key, in the order in which the matrix instructions want them.

A block of 64 rows x 64 columns is 128 words of 32 bits. Word ``32 * w + 4 * g + t`` (w < 4, g < 8, t < 4) belongs to
rows ``16 * w + g`` and ``+ 8``, columns ``8 * n + 2 * t`` and ``+ 1`` for n < 8; its bit ``4 * n + 2 * half + k`` is
row ``16 * w + g + 8 * half``, column ``8 * n + 2 * t + k``. Blocks lie row-major, and beside them ``any`` holds a bit
per block that says whether one of its bits is set: kernels skip the others. Rows of a varlen sequence b begin at row
block ``cu_seqlens_q[b] // 64 + b``. Rows and columns outside the mask are 0. kernel_src/fmha/mask.cuh reads all this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import interop
from .errors import InputError

if TYPE_CHECKING:
    import torch

BLOCK = 64
"""Rows and columns of a block."""


@dataclass(frozen=True, eq=False)
class PackedMask:
    """A mask as kernels read it; ``pack_mask`` makes it. Reusable as long as the mask stays the same.

    Attributes:
        words: int32 [B or 1, H or 1, row blocks, column blocks, 128] (varlen: batch is 1).
        any: int32 [B or 1, H or 1, row blocks, ceil(column blocks / 32)].
        rows: queries of a sequence; varlen: tokens of all.
        cols: keys.
        sequences: of a varlen mask; None: dense.
    """

    words: torch.Tensor
    any: torch.Tensor
    rows: int
    cols: int
    sequences: int | None = None

    @property
    def batch(self) -> int:
        """1 when all sequences share the mask."""
        return int(self.words.shape[0])

    @property
    def heads(self) -> int:
        """1 when all heads share the mask."""
        return int(self.words.shape[1])

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.words.device

    @property
    def key(self) -> tuple[Any, ...]:
        """What a plan depends on."""
        return (self.words.shape, self.rows, self.cols, self.sequences, self.device)

    def __str__(self) -> str:
        kind = "dense" if self.sequences is None else f"varlen of {self.sequences}"
        return f"{kind} mask [{self.batch}, {self.heads}, {self.rows}, {self.cols}] on {self.device}"


def pack_mask(mask: Any, *, cu_seqlens_q: torch.Tensor | None = None) -> PackedMask:
    """Packs a mask on the device where it lies. Nothing waits for the device.

    Args:
        mask: True (or nonzero) = attend; a torch tensor or other array of bool, integers or floats.
            [Sq, Sk], [B or 1, H or 1, Sq, Sk]; with cu_seqlens_q [Tq, columns] or [H or 1, Tq, columns], where column
            j of a token's row is key j of its own sequence.
        cu_seqlens_q: int32 [B + 1] for varlen queries.

    Raises:
        InputError: a shape that is none of these.
    """
    import torch

    mask, cu_seqlens_q = interop.view("mask", mask), interop.view("cu_seqlens_q", cu_seqlens_q)
    bits = torch.as_tensor(mask) != 0
    if cu_seqlens_q is None:
        if bits.ndim == 2:
            bits = bits[None, None]
        if bits.ndim != 4:
            raise InputError(
                f"mask has shape {tuple(bits.shape)}; [Sq, Sk] or [B or 1, H or 1, Sq, Sk] is needed "
                "(a varlen mask needs cu_seqlens_q)"
            )
        rows, cols = bits.shape[2:]
        return _pack(bits, rows, cols, None)
    if bits.ndim == 2:
        bits = bits[None]
    if bits.ndim != 3:
        raise InputError(f"mask has shape {tuple(bits.shape)}; varlen needs [Tq, columns] or [H or 1, Tq, columns]")
    _, rows, cols = bits.shape
    sequences = cu_seqlens_q.shape[0] - 1
    places = _row_places(rows, cu_seqlens_q.to(bits.device))
    padded = bits.new_zeros(bits.shape[0], BLOCK * varlen_row_blocks(rows, sequences), cols)
    padded[:, places] = bits
    return _pack(padded[None], rows, cols, sequences)


def varlen_row_blocks(tokens: int, sequences: int) -> int:
    """Row blocks of a varlen mask."""
    return tokens // BLOCK + sequences + 1


def _row_places(tokens: int, cu_seqlens_q: torch.Tensor) -> torch.Tensor:
    """The padded row of each token; tokens after the last sequence get rows that no sequence has."""
    import torch

    cu = cu_seqlens_q.long()
    token = torch.arange(tokens, device=cu.device)
    sequence = torch.searchsorted(cu[1:].contiguous(), token, right=True)
    first = cu[sequence]
    return BLOCK * (first // BLOCK + sequence) + token - first


def _pack(bits: torch.Tensor, rows: int, cols: int, sequences: int | None) -> PackedMask:
    import torch.nn.functional

    batch, heads, height, width = bits.shape
    pad = (-width % BLOCK, -height % BLOCK)
    bits = torch.nn.functional.pad(bits, (0, pad[0], 0, pad[1]))
    row_blocks, col_blocks = (n // BLOCK for n in bits.shape[2:])
    # rows: block, w, half, g; columns: block, n, t, k
    parts = bits.reshape(batch, heads, row_blocks, 4, 2, 8, col_blocks, 8, 4, 2)
    fragments = parts.permute(0, 1, 2, 6, 3, 5, 8, 7, 4, 9).flatten(7)  # ..., w, g, t, (n, half, k)
    words = _bits_to_words(fragments).squeeze(-1).flatten(4)
    seen = (words != 0).any(-1)
    seen = torch.nn.functional.pad(seen, (0, -seen.shape[-1] % 32))
    return PackedMask(words.contiguous(), _bits_to_words(seen).contiguous(), rows, cols, sequences)


def _bits_to_words(bits: torch.Tensor) -> torch.Tensor:
    """int32 words of the last axis, 32 bits each, least significant first."""
    import torch

    weights = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    octets = bits.to(torch.uint8).unflatten(-1, (bits.shape[-1] // 8, 8)) * weights
    words = octets.sum(-1, dtype=torch.uint8)
    shape = (*words.shape[:-1], words.shape[-1] // 4)
    return words.flatten().view(torch.int32).view(shape)


def unpack_mask(mask: PackedMask, *, cu_seqlens_q: torch.Tensor | None = None) -> torch.Tensor:
    """The bool mask that ``pack_mask`` packed: [B or 1, H or 1, Sq, Sk], or [H or 1, Tq, columns] of a varlen one.

    Raises:
        InputError: a varlen mask without cu_seqlens_q.
    """
    import torch

    if (mask.sequences is None) != (cu_seqlens_q is None):
        raise InputError(f"a {mask} needs {'no ' if mask.sequences is None else ''}cu_seqlens_q to be unpacked")
    batch, heads, row_blocks, col_blocks, _ = mask.words.shape
    shifts = torch.arange(32, dtype=torch.int32, device=mask.device)
    bits = (mask.words[..., None] >> shifts & 1).bool()
    parts = bits.reshape(batch, heads, row_blocks, col_blocks, 4, 8, 4, 8, 2, 2)
    # rows: block, w, half, g; columns: block, n, t, k
    rows = parts.permute(0, 1, 2, 4, 8, 5, 3, 7, 6, 9)
    full = rows.reshape(batch, heads, row_blocks * BLOCK, col_blocks * BLOCK)[..., : mask.cols]
    if cu_seqlens_q is None:
        return full[:, :, : mask.rows]
    return full[0][:, _row_places(mask.rows, cu_seqlens_q.to(mask.device))]

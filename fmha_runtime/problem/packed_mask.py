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

from ..errors import InputError

if TYPE_CHECKING:
    import torch

BLOCK = 64
"""Rows and columns of a block."""


@dataclass(frozen=True, eq=False)
class PackedMask:
    """A mask as kernels read it; ``pack_mask`` (ops/pack/packer.py) makes it. Reusable as long as the mask stays
    the same.

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

    def __post_init__(self) -> None:
        """
        Raises:
            InputError: built or sliced by hand, so that kernels would read it wrongly.
        """
        import torch

        words, some = self.words, self.any
        if not (isinstance(words, torch.Tensor) and words.ndim == 5):
            raise InputError(f"words of a PackedMask is {_form(words)}; {_REMEDY}")
        rows = -(-self.rows // BLOCK) if self.sequences is None else varlen_row_blocks(self.rows, self.sequences)
        batch, heads = words.shape[:2]
        wanted = shapes(batch, heads, rows, -(-self.cols // BLOCK))
        for name, tensor, shape in (("words", words, wanted[0]), ("any", some, wanted[1])):
            good = isinstance(tensor, torch.Tensor) and tensor.shape == shape and tensor.dtype is torch.int32
            if not good or not tensor.is_contiguous() or tensor.device != words.device:
                raise InputError(
                    f"{name} of a PackedMask is {_form(tensor)}; a contiguous torch.int32 {shape} on {words.device} "
                    f"goes with {self.rows} rows and {self.cols} columns"
                    + ("" if self.sequences is None else f" of {self.sequences} sequences")
                    + f": {_REMEDY}"
                )

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


_REMEDY = "let pack_mask make it, and slice the mask before it is packed"


def _form(x: Any) -> str:
    if not hasattr(x, "shape"):
        return f"a {type(x).__name__}"
    contiguous = "" if x.is_contiguous() else ", not contiguous,"
    return f"{x.dtype} {tuple(x.shape)}{contiguous} on {x.device}"


def pack(mask: Any, *, cu_seqlens_q: torch.Tensor | None = None) -> PackedMask:
    """What ``pack_mask`` returns, without a kernel of this library: with numpy on the CPU, with torch's operations on
    other devices, so that verification of an attention kernel does not depend on another kernel.

    Raises:
        InputError: see ``planes`` and ``attended``.
    """
    import torch

    bits = attended(planes(torch.as_tensor(mask), cu_seqlens_q is not None))
    rows, cols = bits.shape[2:]
    sequences = None
    if cu_seqlens_q is not None:
        sequences = cu_seqlens_q.shape[0] - 1
        padded = bits.new_zeros(1, bits.shape[1], BLOCK * varlen_row_blocks(rows, sequences), cols)
        padded[:, :, _row_places(rows, cu_seqlens_q.to(bits.device))] = bits
        bits = padded
    words, seen = (_pack_numpy if bits.device.type == "cpu" else _pack_torch)(bits)
    return PackedMask(words, seen, rows, cols, sequences)


def planes(mask: torch.Tensor, varlen: bool) -> torch.Tensor:
    """A mask as [batch, heads, rows, columns]; varlen ones have one batch entry, whose rows are all tokens.

    Raises:
        InputError: a shape that ``pack_mask`` does not take.
    """
    if varlen:
        if mask.ndim not in (2, 3):
            raise InputError(f"mask has shape {tuple(mask.shape)}; varlen needs [Tq, columns] or [H or 1, Tq, columns]")
    elif mask.ndim not in (2, 4):
        raise InputError(
            f"mask has shape {tuple(mask.shape)}; [Sq, Sk] or [B or 1, H or 1, Sq, Sk] is needed "
            "(a varlen mask needs cu_seqlens_q)"
        )
    return mask[(None,) * (4 - mask.ndim)]


def attended(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask lets a query see a key, as bool: True and nonzero integers do; of floats, which are added to the
    scores as in torch's scaled_dot_product_attention, 0 does and -inf does not. Floats on a GPU are waited for.

    Raises:
        InputError: a float that is neither 0 nor -inf, or floats on a stream that is being captured into a graph.
    """
    import torch

    if not mask.dtype.is_floating_point:
        return mask != 0
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        raise InputError(
            f"mask has dtype {mask.dtype}, whose values have to be read, and a CUDA graph is being captured: pass "
            "mask == 0, or pack it before the capture"
        )
    seen = mask == 0
    other = ~(seen | (mask == -torch.inf))
    if bool(other.any()):
        value = mask[other][0].item()
        raise InputError(
            f"mask has dtype {mask.dtype} and the value {value:.6g}; floats are added to the scores, as in torch's "
            "scaled_dot_product_attention, and only 0 (attend) and -inf (hide) can be packed to bits: pass a bool "
            "mask, True = attend, for example mask > torch.finfo(mask.dtype).min / 2, or mask != 0, as is meant"
        )
    return seen


def shapes(batch: int, heads: int, row_blocks: int, col_blocks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of ``words`` and of ``any``."""
    lead = (batch, heads, row_blocks)
    return (*lead, col_blocks, 128), (*lead, -(-col_blocks // 32))


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


def _pack_numpy(bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and seen blocks of a bool mask [batch, heads, rows, columns] on the CPU."""
    import numpy
    import torch

    found = bits.numpy()
    batch, heads, height, width = found.shape
    row_blocks, col_blocks = -(-height // BLOCK), -(-width // BLOCK)
    whole = numpy.zeros((batch, heads, row_blocks * BLOCK, col_blocks * BLOCK), bool)
    whole[:, :, :height, :width] = found
    # rows: block, w, half, g; columns: block, n, t, k
    parts = whole.reshape(batch, heads, row_blocks, 4, 2, 8, col_blocks, 8, 4, 2)
    fragments = parts.transpose(0, 1, 2, 6, 3, 5, 8, 7, 4, 9).reshape(batch, heads, row_blocks, col_blocks, 4096)
    words = numpy.packbits(fragments, axis=-1, bitorder="little").view("<i4")
    seen = numpy.zeros((batch, heads, row_blocks, -(-col_blocks // 32) * 32), bool)
    seen[..., :col_blocks] = words.any(-1)
    return torch.from_numpy(words), torch.from_numpy(numpy.packbits(seen, axis=-1, bitorder="little").view("<i4"))


def _pack_torch(bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on any device."""
    import torch.nn.functional

    batch, heads, height, width = bits.shape
    pad = (-width % BLOCK, -height % BLOCK)
    bits = torch.nn.functional.pad(bits, (0, pad[0], 0, pad[1]))
    row_blocks, col_blocks = (n // BLOCK for n in bits.shape[2:])
    parts = bits.reshape(batch, heads, row_blocks, 4, 2, 8, col_blocks, 8, 4, 2)
    fragments = parts.permute(0, 1, 2, 6, 3, 5, 8, 7, 4, 9).flatten(7)  # ..., w, g, t, (n, half, k)
    words = _bits_to_words(fragments).squeeze(-1).flatten(4)
    seen = (words != 0).any(-1)
    seen = torch.nn.functional.pad(seen, (0, -seen.shape[-1] % 32))
    return words.contiguous(), _bits_to_words(seen).contiguous()


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

# SPDX-License-Identifier: Apache-2.0
"""What is measured: the cells of each grid, how much work a cell is, and its tensors.

Cells with a feature carry the names that docs/bench/peers_h200.json uses, so that records can be held against it.
Neither torch nor a GPU is needed to list cells; ``inputs`` makes tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..kernels.spec import HEAD_DIMS, DType
from ..ops.pack.packer import pack_mask
from ..problem.alibi import alibi_slopes
from ..problem.packed_mask import PackedMask

if TYPE_CHECKING:
    from torch import Tensor

Window = tuple[int | None, int | None] | None

TOKENS = 16384  # batch * queries of every cell
WIDTH = 2048  # heads * head_dim of every cell, as near as whole heads come from below
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
GRID_LENGTHS = (512, 2048, 8192, 16384)  # of the hopper grid
LONG_LENGTHS = (*LENGTHS, 32768)
MIXED = (512, 8192, 128, 2048, 256, 4096, 128, 1024)
"""Lengths of the varlen cells: 16k tokens, mostly in long sequences, in no order."""
SOFTCAP = 30.0


@dataclass(frozen=True)
class Cell:
    """One problem: self attention of ``batch`` equal sequences unless a field says otherwise."""

    dtype: DType
    head_dim: int
    head_dim_v: int
    seqlen: int  # keys of a sequence
    causal: bool
    window: Window = None
    queries: int | None = None  # of a sequence, the last ones; None: as many as keys
    grouped: tuple[int, int] | None = None  # (query heads, key heads); None: equally many, WIDTH columns in all
    lengths: tuple[int, ...] = ()  # varlen: of each sequence; seqlen is the longest
    softcap: float = 0.0
    alibi: bool = False
    packed: bool = False  # the causal mask comes as bits, not as an option
    page_size: int = 0  # K and V in pages; 0: contiguous
    keys: tuple[int, ...] = ()  # of each sequence of a cache; seqlen is the longest. (): all have seqlen
    sequences: int = 0  # the batch, at every length; 0: as many as make TOKENS tokens
    name: str = ""  # overrides the key

    @property
    def seqlen_q(self) -> int:
        """Queries of a sequence."""
        return self.queries or self.seqlen

    @property
    def batch(self) -> int:
        return len(self.lengths or self.keys) or self.sequences or max(1, TOKENS // self.seqlen_q)

    @property
    def heads(self) -> int:
        return self.grouped[0] if self.grouped else max(1, WIDTH // self.head_dim)

    @property
    def heads_k(self) -> int:
        return self.grouped[1] if self.grouped else self.heads

    @property
    def key(self) -> str:
        """For example bf16_d64_s512_c: c is causal, n neither causal nor windowed. Where the batch is fixed, it and the
        heads come first: b1_h8_bf16_d64_s512_c."""
        if self.name:
            return self.name
        dims = f"d{self.head_dim}"
        dims += "" if self.head_dim_v == self.head_dim else f"x{self.head_dim_v}"
        mask = "c" if self.causal else "n"
        if self.window is not None:
            left, right = ("inf" if x is None else x for x in self.window)
            mask += f"_w{left}-{right}"
        batch = f"b{self.sequences}_h{self.heads}_" if self.sequences else ""
        return f"{batch}{self.dtype.value}_{dims}_s{self.seqlen}_{mask}"

    @property
    def pairs(self) -> float:
        """Query-key pairs of a head and sequence that count (of a head for varlen): for causal half of a square, the
        band for a window."""
        if self.lengths:
            return float(sum(n * n / 2 if self.causal else n * n for n in self.lengths))
        m, n = self.seqlen_q, self.seqlen
        if self.keys:
            n = sum(self.keys) // len(self.keys)  # as many pairs as a sequence has on average
        if self.window is None:
            return m * n - m * m / 2 if self.causal else float(m * n)
        left, right = self.window
        left = n if left is None else left
        right = 0 if self.causal else (n if right is None else right)
        at = range(n - m, n)  # bottom-right: the last query sits at the last key
        return float(sum(max(0, min(n - 1, i + right) - max(0, i - left) + 1) for i in at))

    @property
    def flops(self) -> float:
        """Multiply and add of both matrix products: 4 * B * H * Sq * Sk * D where D = Dv."""
        sequences = 1 if self.lengths else self.batch
        return 2 * sequences * self.heads * self.pairs * (self.head_dim + self.head_dim_v)

    @property
    def bytes(self) -> int:
        """What must cross the memory at least: K and V once, Q and O."""
        keys = sum(self.keys) or self.batch * self.seqlen
        rows = keys * self.heads_k + self.batch * self.seqlen_q * self.heads
        return rows * (self.head_dim + self.head_dim_v) * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    """The tensors of a cell.

    Attributes:
        q: [B, Sq, H, D]; varlen: [T, H, D].
        k, v: [B, Sk, Hk, D] and [.., Dv]; varlen: [T, Hk, D]; paged: the pool [pages, page_size, Hk, D].
        cu_seqlens: [B + 1] int32 of a varlen cell.
        table: [B, pages of a sequence] int32 of a paged cell, in random order.
        used: [B] int32, keys of each sequence of a paged or ragged cell.
        slopes: [H] fp32 of an ALiBi cell.
        bits: bool [Sq, Sk] of a packed cell, True = attend; ``mask`` is the same, packed.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor | None = None
    table: Tensor | None = None
    used: Tensor | None = None
    slopes: Tensor | None = None
    bits: Tensor | None = None
    mask: PackedMask | None = None


def inputs(cell: Cell, device: str) -> Inputs:
    """Random normal tensors of a cell, the same ones every time."""
    import torch

    dtype = {DType.BF16: torch.bfloat16, DType.FP16: torch.float16}[cell.dtype]
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device, dtype=dtype)

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    d, dv, heads, heads_k, batch = cell.head_dim, cell.head_dim_v, cell.heads, cell.heads_k, cell.batch
    if cell.lengths:
        tokens = sum(cell.lengths)
        starts = [sum(cell.lengths[:i]) for i in range(batch + 1)]
        q, k, v = normal(tokens, heads, d), normal(tokens, heads_k, d), normal(tokens, heads_k, dv)
        return Inputs(q, k, v, cu_seqlens=ints(starts))
    extras: dict[str, Any] = {}
    rows: tuple[int, int] = (batch, cell.seqlen)
    if cell.page_size:
        pages = -(-cell.seqlen // cell.page_size)
        order = torch.randperm(batch * pages, generator=random, device=device)
        extras["table"] = order.view(batch, pages).int()
        rows = (batch * pages, cell.page_size)
    if cell.page_size or cell.keys:
        extras["used"] = ints(cell.keys or [cell.seqlen] * batch)
    if cell.alibi:
        extras["slopes"] = alibi_slopes(heads, device=device)
    if cell.packed:
        bits = torch.ones(cell.seqlen_q, cell.seqlen, dtype=torch.bool, device=device)
        bits = bits.tril(cell.seqlen - cell.seqlen_q)
        extras |= {"bits": bits, "mask": pack_mask(bits)}
    q = normal(batch, cell.seqlen_q, heads, d)
    return Inputs(q, normal(*rows, heads_k, d), normal(*rows, heads_k, dv), **extras)


def grid(
    dtypes: Iterable[DType] = (DType.BF16, DType.FP16),
    head_dims: Iterable[tuple[int, int]] = ((64, 64), (80, 80), (128, 128)),
    lengths: Iterable[int] = LENGTHS,
    masks: Iterable[bool] = (False, True),
    window: Window = None,
) -> tuple[Cell, ...]:
    """dtypes x head dims x lengths x (full, causal)."""
    dtypes, lengths, masks = tuple(dtypes), tuple(lengths), tuple(masks)
    return tuple(
        Cell(dtype, d, dv, n, causal, window)
        for dtype in dtypes
        for d, dv in head_dims
        for n in lengths
        for causal in masks
    )


def hopper() -> tuple[Cell, ...]:
    """Every square head dim in bf16, 96 cells, then fp16 at three head dims."""
    square = [dims for dims in HEAD_DIMS if dims[0] == dims[1]]
    some = [(d, d) for d in (64, 128, 256)]
    return grid((DType.BF16,), square, GRID_LENGTHS) + grid((DType.FP16,), some, GRID_LENGTHS)


def features() -> tuple[Cell, ...]:
    """bf16, head dim 128: what is more than plain self attention."""
    plain = Cell(DType.BF16, 128, 128, 4096, True)
    gqa = (32, 8)
    varlen = replace(plain, seqlen=max(MIXED), lengths=MIXED)
    paged = replace(plain, seqlen=8192, queries=2048, page_size=64)
    cells = [
        replace(plain, causal=False, grouped=gqa, name="gqa32_8_d128_s4096_n"),
        replace(plain, grouped=gqa, name="gqa32_8_d128_s4096_c"),
        replace(varlen, name="varlen_d128_c"),
        replace(varlen, grouped=gqa, name="varlen_gqa32_8_d128_c"),
        # A window of 1024 keys, the query's own among them.
        *(replace(plain, seqlen=n, window=(1023, 0), name=f"win1024_d128_s{n}") for n in (8192, 16384)),
    ]
    for n in (2048, 8192):
        cells += [
            replace(plain, seqlen=n, softcap=SOFTCAP, name=f"softcap_d128_s{n}_c"),
            replace(plain, seqlen=n, alibi=True, name=f"alibi_d128_s{n}_c"),
            replace(plain, seqlen=n, packed=True, name=f"packed_d128_s{n}_c"),
        ]
    cells += [
        replace(paged, name="paged64_d128_2k_on_8k_c"),
        replace(paged, grouped=gqa, name="paged64_gqa32_8_d128_2k_on_8k_c"),
    ]
    return tuple(cells)


def quick() -> tuple[Cell, ...]:
    """A dozen cells that show a regression."""
    return grid((DType.BF16,), ((64, 64), (128, 128)), (512, 2048, 16384))


def length() -> tuple[Cell, ...]:
    """One sequence of 8 heads, from short to long: what time and memory grow like."""
    shapes = grid((DType.BF16,), ((64, 64), (128, 128)), LONG_LENGTHS)
    return tuple(replace(cell, sequences=1, grouped=(8, 8)) for cell in shapes)


RAGGED = tuple(round(128 * 2 ** (8 * ((i * 19) % 32) / 31)) for i in range(32))
"""Keys of 32 sequences, evenly spread in log from 128 to 32k, in no order."""


def decode() -> tuple[Cell, ...]:
    """One new token of each sequence (and a few drafts) on its cache: the cells of peers_h200.json, which say pages of
    64 or contiguous, batch, keys."""
    plain = Cell(DType.BF16, 128, 128, 0, False, queries=1, grouped=(32, 8))
    found = []
    for word, page in (("pg64", 64), ("con", 0)):
        for batch, lengths in ((1, (2048, 16384, 131072)), (8, (2048, 16384)), (64, (512, 2048, 16384))):
            for n in lengths:
                name = f"dec_{word}_b{batch}_kv{n}"
                found.append(replace(plain, seqlen=n, sequences=batch, page_size=page, name=name))
        ragged = replace(plain, seqlen=max(RAGGED), keys=RAGGED, page_size=page, name=f"dec_{word}_mixed32")
        found.append(ragged)
    large = replace(plain, seqlen=16384, sequences=8, page_size=64)
    return (
        *found,
        replace(large, grouped=(64, 8), name="dec_pg64_b8_kv16384_h64_8"),
        replace(large, grouped=(32, 32), name="dec_pg64_b8_kv16384_mha32"),
        replace(large, head_dim=64, head_dim_v=64, grouped=(64, 8), name="dec_pg64_b8_kv16384_d64_h64_8"),
        replace(large, head_dim=256, head_dim_v=256, grouped=(16, 8), name="dec_pg64_b8_kv16384_d256_h16_8"),
        replace(large, queries=4, causal=True, name="dec_pg64_b8_kv16384_sq4"),
        # Not among them: small pages, and one KV head.
        replace(large, page_size=16, name="dec_pg16_b8_kv16384"),
        replace(large, page_size=1, name="dec_pg1_b8_kv16384"),
        replace(large, page_size=528, name="dec_pg528_b8_kv16384"),
        replace(large, seqlen=65536, sequences=1, grouped=(128, 1), page_size=0, name="dec_con_b1_kv65536_h128_1"),
    )


GRIDS: dict[str, Callable[[], tuple[Cell, ...]]] = {
    "standard": grid,
    "hopper": hopper,
    "mma": grid,  # the same cells, on the mma.sync kernels
    "features": features,
    "decode": decode,
    "quick": quick,
    "length": length,
}


def select(
    name: str = "standard",
    dtypes: Sequence[DType] | None = None,
    head_dims: Sequence[tuple[int, int]] | None = None,
    lengths: Sequence[int] | None = None,
    masks: Sequence[bool] | None = None,
) -> tuple[Cell, ...]:
    """The cells of a grid. The standard grid takes other axes; of the others axes only leave cells out.

    Raises:
        InputError: no such grid, or nothing is left of it.
    """
    if name not in GRIDS:
        raise InputError(f"grid {name!r} is unknown; it is one of {', '.join(GRIDS)}")
    if GRIDS[name] is grid:
        axes: dict[str, Any] = {"dtypes": dtypes, "head_dims": head_dims, "lengths": lengths, "masks": masks}
        return grid(**{axis: values for axis, values in axes.items() if values is not None})
    found = tuple(
        cell
        for cell in GRIDS[name]()
        if (dtypes is None or cell.dtype in dtypes)
        and (head_dims is None or (cell.head_dim, cell.head_dim_v) in head_dims)
        and (lengths is None or cell.seqlen in lengths)
        and (masks is None or cell.causal in masks)
    )
    if not found:
        raise InputError(f"no cell of the grid {name!r} has these dtypes, head dims, lengths and masks")
    return found

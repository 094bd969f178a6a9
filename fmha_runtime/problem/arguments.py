# SPDX-License-Identifier: Apache-2.0
"""What a call asks, checked and normalised: options, tensors, and the shape of the problem.

Nothing here knows kernels or launches. ``Extras`` are the tensors that few calls have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InputError, UnsupportedProblem
from ..kernels.forward.params import UNLIMITED
from ..kernels.spec import KvLayout, Mask, Score
from . import overlap, tensors
from .packed_mask import PackedMask

if TYPE_CHECKING:
    import torch

PAGE_SIZES = (8, 16, 32, 64, 128, 256)
"""Tokens of a page that every kernel for pages reads."""
LARGEST_PAGE = 1024


def is_page_size(tokens: int) -> bool:
    """Whether there are kernels for pages of so many tokens."""
    return tokens in (1, 2, 4) or (0 < tokens <= LARGEST_PAGE and tokens % 8 == 0)


@dataclass(frozen=True)
class Options:
    """What a call asks besides its tensors, checked and normalised by ``options``."""

    window_left: int = UNLIMITED
    window_right: int = UNLIMITED
    scale: float | None = None  # None: 1 / sqrt(head dim)
    causal: bool = False
    softcap: float = 0.0  # 0: off
    attention_chunk: int = 0  # 0: off

    @property
    def window(self) -> tuple[int | None, int | None]:
        """(left, right) with None for unlimited."""
        left, right = self.window_left, self.window_right
        return (None if left == UNLIMITED else left, None if right == UNLIMITED else right)


def options(
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    attention_chunk: int | None = None,
) -> Options:
    """Checks the run-time options of a call. numpy's scalars are numbers, too.

    Raises:
        InputError: a window that is not two bounds, a bound that is negative or absurd, a window that reaches right
            of the diagonal of a causal call, a scale that is not a positive finite number, a softcap that is not a
            finite number >= 0, either of them beyond what fp32 holds, or a chunk that is not a positive int.
    """
    if not _is_bool(causal):
        raise InputError(f"causal is {causal!r}; True or False is needed")
    bounds = (None, None) if window is None else window
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise InputError(
            f"window is {window!r}; a pair (left, right) of visible keys on either side of the diagonal is needed, "
            "None = unlimited"
        )
    left = _bound("left", bounds[0])
    right = _bound("right", bounds[1])
    if causal:
        if right not in (0, UNLIMITED):
            raise InputError(
                f"causal=True and window right bound {right} contradict each other: "
                "causal means a right bound of 0; drop one of the two"
            )
        right = 0
    if scale is not None:
        if not isinstance(scale, Real) or _is_bool(scale):
            raise InputError(f"scale is {scale!r}; a Python float is needed (default 1/sqrt(head_dim))")
        scale = float(scale)
        if not (math.isfinite(scale) and scale > 0):
            raise InputError(f"scale is {scale}; it must be a positive finite number (default 1/sqrt(head_dim))")
        if not _SMALLEST <= scale <= _LARGEST:
            raise InputError(f"scale is {scale}; fp32 takes {_SMALLEST:.3g} to {_LARGEST:.3g}")
    if not isinstance(softcap, Real) or _is_bool(softcap) or not 0 <= softcap < math.inf:
        raise InputError(f"softcap is {softcap!r}; a finite number >= 0 is needed, 0 = off")
    softcap = float(softcap)
    if softcap and not _SMALLEST <= softcap <= _LARGEST:
        raise InputError(f"softcap is {softcap}; fp32 takes {_SMALLEST:.3g} to {_LARGEST:.3g}, and 0 is off")
    if softcap and scale is not None and not _SMALLEST <= scale / softcap <= _LARGEST:
        raise InputError(
            f"scale / softcap is {scale / softcap:.3g} (scale {scale}, softcap {softcap}); fp32 takes "
            f"{_SMALLEST:.3g} to {_LARGEST:.3g}"
        )
    chunk = 0 if attention_chunk is None else attention_chunk
    if not isinstance(chunk, Integral) or _is_bool(chunk) or not 0 <= chunk <= tensors.MAX_SEQLEN:
        raise InputError(
            f"attention_chunk is {attention_chunk!r}; an int from 1 to {tensors.MAX_SEQLEN} is needed, "
            "None (or 0) = off"
        )
    return Options(left, right, scale, bool(causal), softcap, int(chunk))


_SMALLEST, _LARGEST = 2.0**-120, 2.0**120
"""Of scale, softcap and their quotient: within fp32, with room for the factor log2(e)."""


def plainly(causal: object, window: object, scale: object, softcap: object, chunk: object) -> bool:
    """Whether options are of the types that ``options`` takes as far as a look-up cannot tell: 1 == True."""
    if (causal is not False and causal is not True) or scale is True or softcap is True or softcap is False:
        return False
    if chunk is True or chunk is False:
        return False
    return window is None or not any([x is True or x is False for x in window])  # type: ignore[attr-defined]


def _is_bool(value: object) -> bool:
    return isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__.startswith("bool"))


def _bound(side: str, value: object) -> int:
    if value is None or (isinstance(value, Integral) and not _is_bool(value) and value == -1):
        return UNLIMITED
    if not isinstance(value, Integral) or _is_bool(value):
        raise InputError(f"the {side} window bound is {value!r}; an int or None is needed")
    if not 0 <= int(value) <= tensors.MAX_SEQLEN:
        raise InputError(
            f"the {side} window bound is {value}; it counts visible keys, 0 to {tensors.MAX_SEQLEN}, "
            "and None (or -1) means unlimited"
        )
    return int(value)


def stream(value: Any) -> int:
    """The handle of a stream that is not given as one: of torch's streams and others that carry it.

    Raises:
        InputError: it is no stream.
    """
    for name in ("cuda_stream", "handle", "ptr"):  # torch's, cuda.core's, CuPy's
        found = getattr(value, name, None)
        if isinstance(found, Integral) and not _is_bool(found):
            return int(found)
    if isinstance(value, Integral) and not _is_bool(value):
        return int(value)
    raise InputError(
        f"stream is {value!r}; the handle of a CUDA stream as an int is needed, or a torch.cuda.Stream; None = current"
    )


@dataclass(eq=False, slots=True)  # not frozen: that would cost a microsecond in every call that has one
class Extras:
    """The tensors that few calls have; None: not asked for."""

    alibi_slopes: torch.Tensor | None = None  # [H] or [B, H] fp32
    sinks: torch.Tensor | None = None  # [H] fp32
    page_table: torch.Tensor | None = None  # [B, pages] int32
    mask: PackedMask | None = None

    @property
    def key(self) -> tuple[Any, ...] | None:
        """What a plan depends on; None: none of them is there."""
        slopes, sinks, table, mask = self.alibi_slopes, self.sinks, self.page_table, self.mask
        if slopes is None and sinks is None and table is None and mask is None:
            return None
        return (
            None if slopes is None else tensors.geometry(slopes),
            None if sinks is None else tensors.geometry(sinks),
            None if table is None else tensors.geometry(table),
            None if mask is None else mask.key,
        )

    @property
    def requires_grad(self) -> bool:
        """Whether one of them does."""
        slopes, sinks = self.alibi_slopes, self.sinks
        return (slopes is not None and slopes.requires_grad) or (sinks is not None and sinks.requires_grad)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that are there."""
        bits = () if self.mask is None else (self.mask.words, self.mask.any)
        each = (self.alibi_slopes, self.sinks, self.page_table, *bits)
        return tuple(x for x in each if x is not None)


NO_EXTRAS = Extras()


class Shape(NamedTuple):  # a dataclass takes five times as long to make, and every new geometry makes one
    """Sizes of a checked call. For varlen, seqlen_q and seqlen_k are the caller's upper bounds."""

    batch: int
    heads: int
    heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    total_q: int | None = None  # tokens of a varlen batch
    page_size: int | None = None  # tokens of a page of K and V

    @property
    def varlen(self) -> bool:
        """Whether q is [tokens, heads, dim]."""
        return self.total_q is not None

    @property
    def kv(self) -> KvLayout:
        """How K and V lie in memory."""
        return KvLayout.CONTIGUOUS if self.page_size is None else KvLayout.PAGED

    @property
    def out(self) -> tuple[int, ...]:
        """Shape of the output."""
        rows = (self.batch, self.seqlen_q) if self.total_q is None else (self.total_q,)
        return (*rows, self.heads, self.head_dim_v)

    @property
    def lse(self) -> tuple[int, ...]:
        """Shape of the log-sum-exp."""
        if self.total_q is None:
            return (self.batch, self.heads, self.seqlen_q)
        return (self.heads, self.total_q)


def check_call(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_k: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    out: Any = None,
    extras: Extras = NO_EXTRAS,
    cache: bool = False,
) -> Shape:
    """All rules about the tensors of one call.

    Args:
        extras: the optional tensors.
        cache: K and V are a cache, [batch, seq, heads_k, dim] or a pool of pages, whatever the form of q.

    Raises:
        InputError: names the rule, the offender and what to do.
    """
    varlen = cu_seqlens_q is not None
    if cache:
        if cu_seqlens_k is not None:
            raise InputError("a cache has no cu_seqlens_k: its lengths are cache_seqlens")
        if seqused_k is None:
            raise InputError("cache_seqlens is missing: an int32 tensor [batch] of keys in the cache is needed")
    elif varlen != (cu_seqlens_k is not None):
        raise InputError("cu_seqlens_q and cu_seqlens_k come together: one of them is missing")
    rank = 3 if varlen else 4
    rows = "[tokens" if varlen else "[batch, seq"
    rank_k = 4 if cache else rank
    rows_k = rows if not cache else "[batch, seq" if extras.page_table is None else "[pages, page_size"
    tensors.check_tensor("q", q, rank, rows, "heads, head_dim]")
    tensors.check_tensor("k", k, rank_k, rows_k, "heads_k, head_dim]")
    tensors.check_tensor("v", v, rank_k, rows_k, "heads_k, head_dim_v]")
    device, q_shape, k_shape, v_shape = q.device, q.shape, k.shape, v.shape
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype is not q.dtype:
            raise InputError(f"{name} has dtype {tensor.dtype}, q has {q.dtype}: all three must agree")
        if tensor.device != device:
            raise InputError(f"{name} is on {tensor.device}, q is on {device}: all tensors of a call are on one device")
    heads, heads_k, head_dim, head_dim_v = q_shape[-2], k_shape[-2], q_shape[-1], v_shape[-1]
    if k_shape[-1] != head_dim:
        raise InputError(f"q has head dim {head_dim}, k has {k_shape[-1]}: they must be equal")
    if k_shape != v_shape and k_shape[:-1] != v_shape[:-1]:
        raise InputError(f"k has shape {tuple(k_shape)}, v has {tuple(v_shape)}: all but the head dim must be equal")
    if heads_k == 0 or heads % heads_k:
        raise InputError(
            f"{heads} query heads cannot share {heads_k} key/value heads evenly: heads must be a multiple of heads_k"
        )
    total = None
    if varlen:
        length_q = _max_seqlen("max_seqlen_q", max_seqlen_q)
        if not hasattr(cu_seqlens_q, "shape") or len(cu_seqlens_q.shape) != 1 or cu_seqlens_q.shape[0] < 1:
            raise InputError(
                "cu_seqlens_q must be an int32 tensor of batch + 1 offsets that start at 0, got "
                f"{tuple(cu_seqlens_q.shape) if hasattr(cu_seqlens_q, 'shape') else cu_seqlens_q!r}"
            )
        batch = cu_seqlens_q.shape[0] - 1
        tensors.check_index("cu_seqlens_q", cu_seqlens_q, batch + 1, device)
        total = q_shape[0]
    else:
        batch = q_shape[0]
        length_q = _max_seqlen("q's length", q_shape[1])
    page_size = None
    if extras.page_table is not None:
        page_size = k_shape[1]
        length_k = _check_pages(extras.page_table, page_size, batch, device)
    elif varlen and not cache:
        tensors.check_index("cu_seqlens_k", cu_seqlens_k, batch + 1, device)
        length_k = _max_seqlen("max_seqlen_k", max_seqlen_k)
    else:
        if k_shape[0] != batch:
            raise InputError(f"q has batch {batch}, k and v have {k_shape[0]}: they must be equal")
        length_k = _max_seqlen("k's length", k_shape[1])
    if seqused_k is not None:
        tensors.check_index("cache_seqlens" if cache else "seqused_k", seqused_k, batch, device)
    shape = Shape(batch, heads, heads_k, length_q, length_k, head_dim, head_dim_v, total, page_size)
    if extras is not NO_EXTRAS:
        _check_extras(extras, shape, device)
    if out is not None:
        tensors.check_tensor("out", out, rank, rows, "heads, head_dim_v]")
        if tuple(out.shape) != shape.out or out.dtype is not q.dtype or out.device != q.device:
            raise InputError(
                f"out is {out.dtype} {tuple(out.shape)} on {out.device}; this call needs "
                f"{q.dtype} {shape.out} on {q.device}"
            )
        overlap.check_out(out)
    return shape


def _max_seqlen(name: str, value: object) -> int:
    if type(value) is int and 0 <= value <= tensors.MAX_SEQLEN:
        return value
    if not isinstance(value, Integral) or _is_bool(value) or not 0 <= int(value) <= tensors.MAX_SEQLEN:
        raise InputError(
            f"{name} is {value!r}; a Python int from 0 to {tensors.MAX_SEQLEN} is needed "
            "(an upper bound is allowed; it is not read from the device)"
        )
    return int(value)


def _check_pages(table: Any, page_size: int, batch: int, device: torch.device) -> int:
    """The rules of a page table; returns how many keys its rows can name."""
    import torch

    if not is_page_size(page_size):
        raise InputError(
            f"the cache has pages of {page_size} tokens (shape [pages, page_size, heads_k, dim]); "
            f"1, 2, 4 and multiples of 8 up to {LARGEST_PAGE} are supported: an HND pool goes in as "
            "pool.transpose(1, 2)"
        )
    if not isinstance(table, torch.Tensor) or table.dtype is not torch.int32:
        got = table.dtype if isinstance(table, torch.Tensor) else type(table).__name__
        raise InputError(f"page_table is {got}; an int32 tensor [batch, pages of a sequence] is needed")
    if table.ndim != 2 or table.shape[0] != batch:
        raise InputError(f"page_table has shape {tuple(table.shape)}; [{batch}, pages of a sequence] is needed")
    if table.shape[1] > 1 and table.stride(1) != 1:
        raise InputError("the rows of page_table must be contiguous: call page_table.contiguous()")
    if table.device != device:
        raise InputError(f"page_table is on {table.device}, q is on {device}: move it with .to({str(device)!r})")
    return _max_seqlen("the longest sequence of page_table", table.shape[1] * page_size)


def _check_extras(extras: Extras, shape: Shape, device: torch.device) -> None:
    each, own = (shape.heads,), (shape.batch, shape.heads)
    if extras.alibi_slopes is not None:
        _check_floats("alibi_slopes", extras.alibi_slopes, (each, own), device)
    if extras.sinks is not None:
        _check_floats("sinks", extras.sinks, (each,), device)
    if extras.mask is not None:
        _check_mask(extras.mask, shape, device)


def _check_mask(mask: PackedMask, shape: Shape, device: torch.device) -> None:
    if mask.device != device:
        raise InputError(f"the mask is on {mask.device}, q is on {device}: pack it there")
    if (mask.sequences is not None) != shape.varlen:
        raise InputError(
            f"{mask} for {'varlen' if shape.varlen else 'dense'} queries: pack_mask(mask, cu_seqlens_q=...) packs for "
            "varlen, pack_mask(mask) for dense"
        )
    if mask.heads not in (1, shape.heads) or mask.batch not in (1, shape.batch):
        raise InputError(f"{mask} for batch {shape.batch} and {shape.heads} heads: both must be equal to these, or 1")
    if mask.sequences is not None:
        if (mask.sequences, mask.rows) != (shape.batch, shape.total_q):
            raise InputError(f"{mask} for {shape.batch} sequences of {shape.total_q} tokens together")
    elif mask.rows != shape.seqlen_q:
        raise InputError(f"{mask} for {shape.seqlen_q} queries: the rows must be equal")


def _check_floats(name: str, tensor: Any, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> None:
    import torch

    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) not in shapes:
        got = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else repr(tensor)
        allowed = " or ".join(map(str, shapes))
        raise InputError(f"{name} is {got}; a tensor of shape {allowed} is needed")
    if tensor.dtype is not torch.float32 or tensor.device != device:
        raise InputError(f"{name} is {tensor.dtype} on {tensor.device}; torch.float32 on {device} is needed")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise InputError(f"the heads of {name} must be contiguous: call {name}.contiguous()")


def score(opts: Options, extras: Extras) -> Score:
    """Which scores a call asks for.

    Raises:
        UnsupportedProblem: a cap and a bias together.
    """
    if extras.alibi_slopes is None:
        return Score.SOFTCAP if opts.softcap else Score.PLAIN
    if opts.softcap:
        raise UnsupportedProblem(
            "softcap and alibi_slopes together: no kernel computes both (a score is either capped or biased)"
        )
    return Score.ALIBI


def mask(extras: Extras) -> Mask:
    """Which family of masks a call asks for."""
    return Mask.BAND if extras.mask is None else Mask.PACKED

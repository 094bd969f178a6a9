# SPDX-License-Identifier: Apache-2.0
"""What the kernels must compute, in plain torch: an fp64 reference and a low-precision baseline.

Written to be read next to docs/semantics.md, not to be fast. Every sequence is cut to the keys that
exist before any arithmetic, so what lies in padding, NaN included, cannot reach a result. Scores
are formed for a bounded block of query rows at a time. torch is imported at the first call:
importing this module is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Window = Sequence[int | None] | None

# Scores held at once: 2**24 doubles are 128 MiB, and a handful of such temporaries exist together.
_MAX_SCORES = 1 << 24


@dataclass(frozen=True)
class _Maths:
    """Everything about a call that is not a tensor of one sequence."""

    matmul_dtype: torch.dtype  # of both matrix products and of the result
    softmax_dtype: torch.dtype
    left: int | None
    right: int | None
    scale: float
    softcap: float
    chunk: int  # 0: none


@dataclass(frozen=True)
class _Extras:
    """The optional tensors of a call."""

    slopes: Tensor | None
    sinks: Tensor | None
    page_table: Tensor | None
    mask: Tensor | None  # [B or 1, H or 1, Sq, columns]; varlen: [Tq, columns] or [H or 1, Tq, columns]

    def of(self, b: int, rows: slice | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """ALiBi slopes, sinks and mask of one sequence; ``rows`` are its tokens of a varlen batch."""
        slopes, mask = self.slopes, self.mask
        if slopes is not None and slopes.ndim == 2:
            slopes = slopes[b]
        if mask is not None:
            if rows is not None:
                mask = (mask if mask.ndim == 3 else mask[None])[:, rows]
            else:
                mask = mask[None, None] if mask.ndim == 2 else mask
                mask = mask[b if mask.shape[0] > 1 else 0]
        return slopes, self.sinks, mask


def band(causal: bool = False, window: Window = None) -> tuple[int | None, int | None]:
    """The visible keys around the diagonal as inclusive ``(left, right)``; None is unlimited.

    Raises:
        InputError: ``window`` is not a pair of None, -1 or non-negative integers.
    """
    pair = (None, None) if window is None else tuple(window)
    if len(pair) != 2 or any(x is not None and x < -1 for x in pair):
        raise InputError(
            f"window={window!r} is not a pair (left, right) of counts of keys; each is >= 0, or "
            "None (or -1) for unlimited, for example window=(127, 0)"
        )
    left, right = (None if x == -1 else x for x in pair)
    return left, (0 if causal else right)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float = 0.0,
    attention_chunk: int | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of ``q [B, Sq, H, D]``, ``k [B, Sk, Hk, D]``, ``v [B, Sk, Hk, Dv]``, on any device.

    Returns:
        ``out [B, Sq, H, Dv]`` and ``lse [B, H, Sq]`` (natural log), both in ``compute_dtype``
        (default float64). A query that sees no key has output 0 and LSE -inf (with sinks: the sink).

    Raises:
        InputError: ``window`` is malformed. Shapes are the caller's business.
    """
    import torch

    dtype = compute_dtype or torch.float64
    maths = _maths(dtype, dtype, q, causal, window, scale, softcap, attention_chunk)
    extras = _Extras(alibi_slopes, sinks, page_table, mask)
    return _dense(maths, q, k, v, seqused_k, extras)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    *,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float = 0.0,
    attention_chunk: int | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences: ``q [Tq, H, D]``, ``k [Tk, Hk, D]``, ``v [Tk, Hk, Dv]``.

    Sequence b is the tokens ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]`` (int32 ``[B + 1]``).

    Returns:
        ``out [Tq, H, Dv]`` and ``lse [H, Tq]``, otherwise as ``attention``. Tokens outside every
        sequence have output 0 and LSE -inf.

    Raises:
        InputError: ``window`` is malformed. Shapes are the caller's business.
    """
    import torch

    dtype = compute_dtype or torch.float64
    maths = _maths(dtype, dtype, q, causal, window, scale, softcap, attention_chunk)
    extras = _Extras(alibi_slopes, sinks, page_table, mask)
    return _varlen(maths, q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, extras)


def baseline(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float = 0.0,
    attention_chunk: int | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same maths with both matrix products in the input dtype and the softmax in float32.

    How wrong an honest low-precision implementation may be: the yardstick of verify.py.

    Returns:
        ``out [B, Sq, H, Dv]`` in the dtype of q and ``lse [B, H, Sq]`` in float32.
    """
    import torch

    maths = _maths(q.dtype, torch.float32, q, causal, window, scale, softcap, attention_chunk)
    extras = _Extras(alibi_slopes, sinks, page_table, mask)
    return _dense(maths, q, k, v, seqused_k, extras)


def baseline_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    *,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float = 0.0,
    attention_chunk: int | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``baseline`` of packed sequences: ``out [Tq, H, Dv]``, ``lse [H, Tq]`` in float32."""
    import torch

    maths = _maths(q.dtype, torch.float32, q, causal, window, scale, softcap, attention_chunk)
    extras = _Extras(alibi_slopes, sinks, page_table, mask)
    return _varlen(maths, q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, extras)


def _maths(
    matmul_dtype: torch.dtype,
    softmax_dtype: torch.dtype,
    q: Tensor,
    causal: bool,
    window: Window,
    scale: float | None,
    softcap: float,
    attention_chunk: int | None,
) -> _Maths:
    left, right = band(causal, window)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _Maths(matmul_dtype, softmax_dtype, left, right, scale, float(softcap), attention_chunk or 0)


def _dense(
    maths: _Maths, q: Tensor, k: Tensor, v: Tensor, seqused_k: Tensor | None, extras: _Extras
) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = q.shape
    out = q.new_zeros(batch, rows, heads, v.shape[-1], dtype=maths.matmul_dtype)
    lse = q.new_full((batch, heads, rows), float("-inf"), dtype=maths.softmax_dtype)
    keys = [k.shape[1]] * batch if seqused_k is None else seqused_k.tolist()
    for b in range(batch):
        part = _sequence(maths, q[b], *_cached(k, v, b, keys[b], extras), *extras.of(b, None))
        out[b], lse[b] = part
    return out, lse


def _varlen(
    maths: _Maths,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    extras: _Extras,
) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    out = q.new_zeros(tokens, heads, v.shape[-1], dtype=maths.matmul_dtype)
    lse = q.new_full((heads, tokens), float("-inf"), dtype=maths.softmax_dtype)
    first_q = cu_seqlens_q.tolist()
    first_k = None if cu_seqlens_k is None else cu_seqlens_k.tolist()
    used = None if seqused_k is None else seqused_k.tolist()
    for b in range(len(first_q) - 1):
        q_range = slice(first_q[b], first_q[b + 1])
        if first_k is None:  # K and V are a cache
            assert used is not None
            keys, values = _cached(k, v, b, used[b], extras)
        else:
            begin, end = first_k[b : b + 2]
            k_range = slice(begin, end if used is None else min(end, begin + max(0, used[b])))
            keys, values = k[k_range], v[k_range]
        part = _sequence(maths, q[q_range], keys, values, *extras.of(b, q_range))
        out[q_range], lse[:, q_range] = part
    return out, lse


def _cached(k: Tensor, v: Tensor, b: int, length: int, extras: _Extras) -> tuple[Tensor, Tensor]:
    """The keys and values of one sequence: rows of a dense tensor, or gathered from its pages."""
    table, length = extras.page_table, max(0, length)  # a length below 0 is 0, one past the room is the room
    if table is None:
        return k[b, :length], v[b, :length]
    pages = table[b, : -(-length // k.shape[1])].long()
    return k[pages].flatten(0, 1)[:length], v[pages].flatten(0, 1)[:length]


def _sequence(
    maths: _Maths,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One sequence whose keys all exist: q [Sq, H, D] -> out [Sq, H, Dv] and lse [H, Sq]."""
    import torch

    (sq, heads, _), (sk, kv_heads, _), dv = q.shape, k.shape, v.shape[-1]
    if sq == 0 or sk == 0:
        out = q.new_zeros(sq, heads, dv, dtype=maths.matmul_dtype)
        lse = q.new_full((heads, sq), float("-inf"), dtype=maths.softmax_dtype)
        return out, lse if sinks is None else sinks.to(lse.dtype)[:, None].expand_as(lse).clone()
    group = heads // kv_heads  # query head h reads KV head h // group
    q = q.to(maths.matmul_dtype).transpose(0, 1).unflatten(0, (kv_heads, group)) * maths.scale
    k = k.to(maths.matmul_dtype).permute(1, 2, 0)
    v = v.to(maths.matmul_dtype).transpose(0, 1)
    bias = None if slopes is None else -slopes.to(maths.softmax_dtype).view(kv_heads, group, 1, 1)
    sink = None if sinks is None else sinks.to(maths.softmax_dtype).view(kv_heads, group, 1, 1)
    hidden = None if mask is None else _hidden(mask, sk, kv_heads, group)
    step = max(1, _MAX_SCORES // (heads * sk))
    parts = []
    for begin in range(0, sq, step):
        block = q[:, :, begin : begin + step]
        rows = block.shape[2]
        score = torch.matmul(block.flatten(1, 2), k).unflatten(1, (group, rows))
        score = score.to(maths.softmax_dtype)
        if maths.softcap:
            score = maths.softcap * torch.tanh(score / maths.softcap)
        # Distance of each key to the diagonal, which ends at the bottom right corner.
        i = torch.arange(begin, begin + rows, device=q.device)[:, None] + (sk - sq)
        past = i - torch.arange(sk, device=q.device)
        if bias is not None:
            score = score + bias * past.abs().to(maths.softmax_dtype)
        if maths.left is not None:
            score = score.masked_fill(past > maths.left, float("-inf"))
        if maths.right is not None:
            score = score.masked_fill(-past > maths.right, float("-inf"))
        if maths.chunk:
            other = (i - past).div(maths.chunk, rounding_mode="floor") != i.div(maths.chunk, rounding_mode="floor")
            score = score.masked_fill(other, float("-inf"))
        if hidden is not None:
            part_hidden = hidden[..., begin : begin + rows, :]
            score = score.masked_fill(part_hidden, float("-inf"))
        if sink is not None:  # one more key, whose value is nothing
            score = torch.cat([score, sink.expand(*score.shape[:-1], 1)], -1)
        top = score.amax(-1, keepdim=True)
        if sink is not None:  # one that is infinite has all the weight
            score = torch.where(top == float("inf"), torch.where(score == float("inf"), 0.0, float("-inf")), score)
        weight = torch.exp(score - top.masked_fill(top.isinf(), 0.0))
        total = weight.sum(-1, keepdim=True)
        weight = (weight / total.masked_fill(total == 0, 1.0)).to(maths.matmul_dtype)
        weight = weight[..., :sk]
        part = torch.matmul(weight.flatten(1, 2), v).unflatten(1, (group, rows))
        parts.append((part, (top + torch.log(total)).squeeze(-1)))
    out = torch.cat([part for part, _ in parts], 2).flatten(0, 1).transpose(0, 1)
    return out, torch.cat([part for _, part in parts], 2).flatten(0, 1)


def _hidden(mask: Tensor, keys: int, kv_heads: int, group: int) -> Tensor:
    """The keys that a mask [H or 1, Sq, columns] hides, [kv heads or 1, group or 1, Sq, keys]."""
    import torch.nn.functional

    seen = (mask != 0)[..., :keys]
    hidden = ~torch.nn.functional.pad(seen, (0, keys - seen.shape[-1]))
    return hidden[None] if len(hidden) == 1 else hidden.unflatten(0, (kv_heads, group))

# SPDX-License-Identifier: Apache-2.0
"""``flash_attn_with_kvcache`` of FlashAttention 2 and 3: torch rotates and appends, one kernel attends.

Nothing reads a device value on the host, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError, UnsupportedProblem
from ..problem.arguments import PAGE_SIZES
from . import shared

if TYPE_CHECKING:
    import torch

FURTHER = ("cu_seqlens_q", "cu_seqlens_k_new", "max_seqlen_q", "rotary_seqlens", "page_table")
"""Keywords of FlashAttention 3 that ``attend`` honours."""


def attend(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None,
    chosen: dict[str, Any], *, rotary_cos: torch.Tensor | None, rotary_sin: torch.Tensor | None,
    cache_seqlens: torch.Tensor | int | None, cache_batch_idx: torch.Tensor | None,
    cache_leftpad: torch.Tensor | None, table: torch.Tensor | None, rotary_interleaved: bool,
    further: dict[str, Any], lse: bool,
) -> tuple[torch.Tensor, Any]:  # fmt: skip
    """(out, lse or None) of queries over a cache that first takes in the new keys.

    Args:
        q: [B, Sq, H, D], or [Tq, H, D] with cu_seqlens_q and max_seqlen_q in ``further``.
        k_cache, v_cache: [rows, S, Hk, D] and Dv, or pools [pages, page, Hk, D] with ``table`` [B, pages].
        k, v: [B, Sn, Hk, D] and Dv, or [Tn, Hk, D] with cu_seqlens_k_new; written behind cache_seqlens[b] keys.
        chosen: of ``shared.options``.
        cache_seqlens: int32 [B] or an int, keys before the new ones; None: the cache is full.
        cache_batch_idx: [B], the row of the cache that each sequence has.
        cache_leftpad: [B], where each sequence starts in its row.
        further: keywords of FlashAttention 3.

    Raises:
        InputError, UnsupportedProblem: before the cache is touched, as far as this module can see.
    """
    import torch

    from .. import attention_with_kvcache

    _check(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, table)
    cu_q, cu_new = further.get("cu_seqlens_q"), further.get("cu_seqlens_k_new")
    max_q = further.get("max_seqlen_q")
    batch = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
    full = k_cache.shape[1] * (1 if table is None else table.shape[1])
    if cache_seqlens is None or isinstance(cache_seqlens, int):
        lengths = torch.full(
            (batch,), full if cache_seqlens is None else cache_seqlens, dtype=torch.int32, device=q.device
        )
    else:
        lengths = cache_seqlens.contiguous()
    q, k_cache, v_cache = (*shared.contiguous(q), k_cache, v_cache)
    if k is not None and v is not None:
        sequence, offset = _tokens(k, cu_new, batch)
        if rotary_cos is not None and rotary_sin is not None:
            first = lengths if further.get("rotary_seqlens") is None else further["rotary_seqlens"]
            k = _rotate(k, rotary_cos, rotary_sin, first.long()[sequence] + offset, rotary_interleaved)
            of_q, steps = _tokens(q, cu_q, batch)
            if not chosen["causal"] and chosen["window"] == (None, None):
                steps = steps * 0  # all queries stand where the first new key does
            q = _rotate(q, rotary_cos, rotary_sin, first.long()[of_q] + steps, rotary_interleaved)
        place = lengths.long()[sequence] + offset
        if table is not None:
            page = k_cache.shape[1]
            row, place = table.long()[sequence, place // page], place % page
        else:
            row = sequence if cache_batch_idx is None else cache_batch_idx.long()[sequence]
        k_cache[row, place] = k
        v_cache[row, place] = v
        lengths = lengths + (k.shape[1] if cu_new is None else cu_new.diff())
    if cache_batch_idx is not None:
        k_cache, v_cache, table = _rows(k_cache, v_cache, cache_batch_idx, cache_leftpad is not None)
    if cache_leftpad is not None:
        return _leftpadded(q, k_cache, v_cache, lengths, cache_leftpad, cu_q, max_q, chosen, lse)
    if table is not None:
        k_cache, v_cache, table = shared.pages((k_cache, v_cache), table.contiguous())
    if chosen["scale"] is None:
        chosen["scale"] = q.shape[-1] ** -0.5
    found: Any = attention_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, page_table=table, cu_seqlens_q=cu_q, max_seqlen_q=max_q,
        **chosen, return_lse=lse, device=shared.device,
    )  # fmt: skip
    return found if lse else (found, None)


def _check(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k: Any, v: Any, cos: Any, sin: Any, lengths: Any,
    rows: Any, leftpad: Any, table: Any,
) -> None:  # fmt: skip
    import torch

    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k_cache, v_cache, k, v)):
        raise UnsupportedProblem(
            "a tensor of flash_attn_with_kvcache requires a gradient and it has no backward pass (nor has "
            "FlashAttention's): call it under torch.no_grad()"
        )
    if (k is None) != (v is None):
        raise InputError("k and v come together: one of them is missing")
    if k is not None and (k.shape[-2:] != k_cache.shape[-2:] or v.shape[-2:] != v_cache.shape[-2:]):
        raise InputError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; their last two axes must be those of the caches, "
            f"{tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if k is not None and k.ndim == 4 and not q.shape[0] == k.shape[0] == v.shape[0] and q.ndim == 4:
        raise InputError(f"q has batch {q.shape[0]}, k {k.shape[0]} and v {v.shape[0]}: they must be equal")
    if (cos is None) != (sin is None):
        raise InputError("rotary_cos and rotary_sin come together: one of them is missing")
    if k is not None and lengths is None:
        raise InputError("new keys need cache_seqlens: where in the cache they go")
    if cos is not None and k is None:
        raise InputError("rotary_cos and rotary_sin rotate q and the new keys, and k and v are missing")
    if k is not None and not k.dtype == v.dtype == k_cache.dtype == v_cache.dtype:
        raise InputError(
            f"k is {k.dtype}, v {v.dtype}, k_cache {k_cache.dtype}, v_cache {v_cache.dtype}: all must agree"
        )
    if table is not None and (rows is not None or leftpad is not None):
        raise UnsupportedProblem(
            "a paged cache goes with neither cache_batch_idx nor cache_leftpad (as in FlashAttention): its table says "
            "where each sequence is"
        )


def _tokens(x: torch.Tensor, cu_seqlens: torch.Tensor | None, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequence of each token and its place among the tokens there: [B, 1] and [1, S], or both [T]."""
    import torch

    if cu_seqlens is None:
        return (
            torch.arange(batch, device=x.device).unsqueeze(1), torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        )  # fmt: skip
    token = torch.arange(x.shape[0], device=x.device)
    first = cu_seqlens.long()
    sequence = torch.searchsorted(first[1:].contiguous(), token, right=True)
    return sequence, token - first[sequence]


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """x [..., heads, D], its first 2 * cos.shape[-1] dims rotated by the angles of ``position`` [...]; fp32 inside."""
    import torch

    half = cos.shape[-1]
    if 2 * half > x.shape[-1]:
        raise InputError(f"rotary_cos has {half} columns; the head dim {x.shape[-1]} has room for {x.shape[-1] // 2}")
    c, s = (angle[position].float().unsqueeze(-2) for angle in (cos, sin))
    turned = x[..., : 2 * half].float()
    pairs = turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).transpose(-1, -2)
    a, b = pairs.unbind(-1)
    out = torch.stack((a * c - b * s, a * s + b * c), -1 if interleaved else -2).flatten(-2)
    return torch.cat((out.to(x.dtype), x[..., 2 * half :]), -1)


def _rows(
    k_cache: torch.Tensor, v_cache: torch.Tensor, rows: torch.Tensor, copy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The rows of a cache that the sequences have: as pages of it where its layout allows, else copied."""
    import torch

    length = k_cache.shape[1]
    page = max((p for p in PAGE_SIZES if length and length % p == 0), default=0)
    if copy or not page or not (shared.joinable(k_cache) and shared.joinable(v_cache)):
        return k_cache[rows.long()], v_cache[rows.long()], None
    parts = length // page
    k, v = (x.unflatten(1, (parts, page)).flatten(0, 1) for x in (k_cache, v_cache))
    first = rows.to(torch.int32).unsqueeze(1) * parts
    return k, v, first + torch.arange(parts, dtype=torch.int32, device=rows.device)


def _leftpadded(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, leftpad: torch.Tensor,
    cu_q: torch.Tensor | None, max_q: int | None, chosen: dict[str, Any], lse: bool,
) -> tuple[torch.Tensor, Any]:  # fmt: skip
    """Sequence b is the keys leftpad[b] to lengths[b] - 1 of row b: a packed batch whose segments have gaps."""
    import torch

    rows, length = k_cache.shape[:2]
    start = torch.arange(rows + 1, dtype=torch.int32, device=q.device) * length
    start[:-1] += leftpad
    dense = cu_q is None
    batch = rows if cu_q is None else cu_q.shape[0] - 1
    if dense:
        max_q = q.shape[1]
        cu_q = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * max_q
        q = q.flatten(0, 1)
    out, state = shared.attend(
        q, k_cache.flatten(0, 1), v_cache.flatten(0, 1), chosen, cu_q, start, max_q, length,
        lse=lse, seqused_k=lengths - leftpad,
    )  # fmt: skip
    if dense:
        out = out.unflatten(0, (batch, max_q))
        state = state if state is None else state.unflatten(1, (batch, max_q)).transpose(0, 1).contiguous()
    return out, state

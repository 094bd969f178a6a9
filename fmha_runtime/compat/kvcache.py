# SPDX-License-Identifier: Apache-2.0
"""``flash_attn_with_kvcache`` of FlashAttention 2 and 3: torch rotates and appends, one kernel attends.

Nothing reads a device value on the host, so all of it can be captured in a CUDA graph. Lengths past the room of a cache
are an error where the host knows them. On a GPU they count as the room, and new keys without a place in the cache are
not written: what such a sequence gives is of no use, but nothing is read or written out of bounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError, UnsupportedProblem
from . import append, shared

if TYPE_CHECKING:
    import torch

FURTHER = ("cu_seqlens_q", "cu_seqlens_k_new", "max_seqlen_q", "rotary_seqlens", "page_table")
"""Keywords of FlashAttention 3 that ``attend`` honours."""


def attend(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None,
    chosen: dict[str, Any], *, rotary_cos: torch.Tensor | None = None, rotary_sin: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | int | None = None, cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None, table: torch.Tensor | None = None, rotary_interleaved: bool = True,
    further: dict[str, Any], lse: bool, version: int = 2,
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
        further: keywords of FlashAttention 3 and vLLM.
        version: of FlashAttention; 2 wants a rotary table as long as the cache, 3 only for pages.

    Raises:
        InputError, UnsupportedProblem: before the cache is touched, as far as this module can see.
    """
    cu_q = further.get("cu_seqlens_q")
    max_q = None if cu_q is None else shared.integer("max_seqlen_q", further.get("max_seqlen_q"))
    batch = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
    indices = {
        "cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad, "block_table": table,
        **{name: further.get(name) for name in ("rotary_seqlens", "cu_seqlens_q", "cu_seqlens_k_new")},
    }  # fmt: skip
    _check(q, k_cache, v_cache, k, v, cache_seqlens, indices, batch)
    room = append.capacity(k_cache, table)
    lengths = append.lengths(cache_seqlens, batch, room, q.device)
    (q,) = shared.contiguous(q)
    if k is None or v is None:
        _check_rotary(rotary_cos, rotary_sin, k, room=0)
        append.fits(cache_seqlens, lengths, 0, room)
    else:
        _check_rotary(rotary_cos, rotary_sin, k, room=room if version == 2 or table is not None else 0)
        rows = table if cache_batch_idx is None else cache_batch_idx
        q, lengths = _take_in(
            q, (k_cache, v_cache), (k, v), lengths, rows, further, chosen, (rotary_cos, rotary_sin, rotary_interleaved),
            cache_seqlens,
        )  # fmt: skip
    if cache_batch_idx is not None:
        k_cache, v_cache, table = _rows(k_cache, v_cache, cache_batch_idx, cache_leftpad is not None)
    elif table is None:
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]  # rows that no sequence has, at the end
    if cache_leftpad is not None:
        return _leftpadded(
            q, k_cache, v_cache, lengths, cache_leftpad, cu_q, max_q, chosen, lse, further.get("out")
        )  # fmt: skip
    return _attend(q, k_cache, v_cache, lengths, table, cu_q, max_q, chosen, lse, further.get("out"))


def _attend(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor | None,
    cu_q: torch.Tensor | None, max_q: int | None, chosen: dict[str, Any], lse: bool, out: torch.Tensor | None,
) -> tuple[torch.Tensor, Any]:  # fmt: skip
    """One kernel over a cache that holds all keys. A head dim without a kernel is padded: the cache is copied."""
    from .. import attention_with_kvcache

    if table is not None:
        k_cache, v_cache, table = shared.pages((k_cache, v_cache), table.contiguous())
    dims = (q.shape[-1], v_cache.shape[-1])
    if table is not None and shared.room(dims) != dims:
        k_cache, v_cache, table = _named(k_cache, v_cache, table)
    return shared.padded(
        attention_with_kvcache, q, k_cache, v_cache, chosen, lse=lse, out=out, cache_seqlens=lengths,
        page_table=table, cu_seqlens_q=cu_q, max_seqlen_q=max_q,
    )  # fmt: skip


def _named(
    k_cache: torch.Tensor, v_cache: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pools that are about to be copied: only the pages that the table names, where these are fewer."""
    import torch

    if table.numel() >= k_cache.shape[0]:
        return k_cache, v_cache, table
    own = table.flatten().long().clamp(0, k_cache.shape[0] - 1)  # entries behind the lengths may be anything
    order = torch.arange(table.numel(), dtype=torch.int32, device=table.device)
    return k_cache[own], v_cache[own], order.view(table.shape)


def _take_in(
    q: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], new: tuple[torch.Tensor, torch.Tensor],
    lengths: torch.Tensor, rows: torch.Tensor | None, further: dict[str, Any], chosen: dict[str, Any], rotary: Any,
    given: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(q, the lengths with the new keys); q and the new keys are rotated, and the new keys lie in the cache.

    Args:
        rows: [B], the row of each sequence, or a page table [B, pages]; None: row b.
        rotary: (cos, sin, whether interleaved).
        given: cache_seqlens as it was given.
    """
    from .rotary import places

    (k, v), batch = new, lengths.shape[0]
    cu_new, paged = further.get("cu_seqlens_k_new"), rows is not None and rows.ndim == 2
    count, size = caches[0].shape[:2]
    room = append.capacity(caches[0], rows if paged else None)
    added = k.shape[1] if cu_new is None else cu_new.diff()
    known = append.fits(given, lengths, added, room)
    lengths = lengths.clamp(0, room)
    sequence, offset = places(k, cu_new, batch)
    if cu_new is not None:
        real, sequence = sequence < batch, sequence.clamp(max=batch - 1)  # tokens behind the last sequence
    place = lengths.long()[sequence] + offset
    valid = None if known else place < room
    if cu_new is not None:
        valid = real if valid is None else valid & real
    if rotary[0] is not None:
        q, k = _rotated(q, k, sequence, offset, lengths, rotary, further, chosen)
    place = place.clamp(max=room - 1)
    row = sequence
    if rows is not None:
        row = rows.long()[sequence, place // size] if paged else rows.long()[sequence]
        exists = (row >= 0) & (row < count)
        valid = exists if valid is None else valid & exists
        row = row.clamp(0, count - 1)
    append.write(caches, (k, v), row, place % size if paged else place, valid)
    return q, lengths + added


def _rotated(
    q: torch.Tensor, k: torch.Tensor, sequence: torch.Tensor, offset: torch.Tensor, lengths: torch.Tensor, rotary: Any,
    further: dict[str, Any], chosen: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """q and the new keys, turned to their positions."""
    from .rotary import places, rotate

    cos, sin, interleaved = rotary
    first = lengths if further.get("rotary_seqlens") is None else further["rotary_seqlens"]
    of_q, steps = places(q, further.get("cu_seqlens_q"), lengths.shape[0])
    if not chosen["causal"] and chosen["window"] == (None, None):
        steps = steps * 0  # all queries stand where the first new key does
    turned = []
    for x, which, step in ((q, of_q, steps), (k, sequence, offset)):
        at = first.long()[which.clamp(max=lengths.shape[0] - 1)] + step
        at = at.clamp(0, cos.shape[0] - 1)  # of tokens that have no place
        turned.append(rotate(x, cos[at], sin[at], interleaved))
    return turned[0], turned[1]


def _check(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k: Any, v: Any, lengths: Any,
    indices: dict[str, Any], batch: int,
) -> None:  # fmt: skip
    import torch

    if torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in (q, k_cache, v_cache, k, v)]):
        raise UnsupportedProblem(
            "a tensor of flash_attn_with_kvcache requires a gradient and it has no backward pass (nor has "
            "FlashAttention's): call it under torch.no_grad()"
        )
    if k is not None or v is not None:
        _check_new(q, k_cache, v_cache, k, v, lengths, indices["cu_seqlens_k_new"] is not None)
    rows, leftpad, table = indices["cache_batch_idx"], indices["cache_leftpad"], indices["block_table"]
    if table is not None and (rows is not None or leftpad is not None):
        raise UnsupportedProblem(
            "a paged cache goes with neither cache_batch_idx nor cache_leftpad (as in FlashAttention): its table says "
            "where each sequence is"
        )
    for name, given in indices.items():
        shape: tuple[int, ...] = (batch + 1,) if name.startswith("cu_") else (batch,)
        if name == "block_table" and given is not None:
            shape = (batch, given.shape[1] if isinstance(given, torch.Tensor) and given.ndim == 2 else -1)
        append.check_index(name, given, shape, q.device)
    if table is None and rows is None and k_cache.shape[0] < batch:
        raise InputError(f"the cache has {k_cache.shape[0]} rows for {batch} sequences: one each is needed")
    limits = (("cache_batch_idx", rows, k_cache.shape[0] - 1), ("cache_leftpad", leftpad, k_cache.shape[1]))
    for name, given, last in limits:
        if given is not None and shared.readable(given) and not all(0 <= x <= last for x in given.tolist()):
            raise InputError(f"{name} is {given.tolist()}; numbers from 0 to {last} are needed for this cache")


def _check_new(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k: Any, v: Any, lengths: Any, packed: bool
) -> None:
    if k is None or v is None:
        raise InputError("k and v come together: one of them is missing")
    if lengths is None:
        raise InputError("new keys need cache_seqlens: where in the cache they go")
    if k.shape[-2:] != k_cache.shape[-2:] or v.shape[-2:] != v_cache.shape[-2:]:
        raise InputError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; their last two axes must be those of the caches, "
            f"{tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if k.ndim != (3 if packed else 4) or k.shape[:-1] != v.shape[:-1]:
        layout = "[tokens, heads_k, dim] with cu_seqlens_k_new" if packed else "[batch, new, heads_k, dim]"
        raise InputError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; both must be {layout}")
    if not packed and q.ndim == 4 and not q.shape[0] == k.shape[0]:
        raise InputError(f"q has batch {q.shape[0]}, k and v have {k.shape[0]}: they must be equal")
    if not k.dtype == v.dtype == k_cache.dtype == v_cache.dtype:
        raise InputError(
            f"k is {k.dtype}, v {v.dtype}, k_cache {k_cache.dtype}, v_cache {v_cache.dtype}: all must agree"
        )


def _check_rotary(cos: Any, sin: Any, k: Any, *, room: int) -> None:
    if (cos is None) != (sin is None):
        raise InputError("rotary_cos and rotary_sin come together: one of them is missing")
    if cos is None:
        return
    if k is None:
        raise InputError("rotary_cos and rotary_sin rotate q and the new keys, and k and v are missing")
    if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[0] < room:
        raise InputError(
            f"rotary_cos has shape {tuple(cos.shape)} and rotary_sin {tuple(sin.shape)}; both must be [positions, "
            f"rotary_dim / 2] with at least {room} positions, as many as the cache has"
        )


def _rows(
    k_cache: torch.Tensor, v_cache: torch.Tensor, rows: torch.Tensor, copy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The rows of a cache that the sequences have: as pages of it where its layout allows, else copied."""
    import torch

    length = k_cache.shape[1]
    page = shared.page_within(length)
    rows = rows.clamp(0, k_cache.shape[0] - 1)
    if copy or not page or not (shared.joinable(k_cache) and shared.joinable(v_cache)):
        return k_cache[rows.long()], v_cache[rows.long()], None
    parts = length // page
    k, v = (x.unflatten(1, (parts, page)).flatten(0, 1) for x in (k_cache, v_cache))
    first = rows.unsqueeze(1) * parts
    return k, v, first + torch.arange(parts, dtype=torch.int32, device=rows.device)


def _leftpadded(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, leftpad: torch.Tensor,
    cu_q: torch.Tensor | None, max_q: int | None, chosen: dict[str, Any], lse: bool, given: torch.Tensor | None,
) -> tuple[torch.Tensor, Any]:  # fmt: skip
    """Sequence b is the keys leftpad[b] to lengths[b] - 1 of row b: a packed batch whose segments have gaps.

    A segment ends where the next begins, so it may be longer than a row; ``seqused_k`` says what of it counts.
    """
    import torch

    rows, length = k_cache.shape[:2]
    leftpad = leftpad.clamp(0, length)
    start = torch.arange(rows + 1, dtype=torch.int32, device=q.device) * length
    start[:-1] += leftpad
    dense = cu_q is None
    batch = rows if cu_q is None else cu_q.shape[0] - 1
    if dense:
        max_q = q.shape[1]
        cu_q = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * max_q
        q = q.flatten(0, 1)
    out, state = shared.attend(
        q, k_cache.flatten(0, 1), v_cache.flatten(0, 1), chosen, cu_q, start, max_q, 2 * length,
        lse=lse, seqused_k=lengths.clamp(max=length) - leftpad,
    )  # fmt: skip
    if dense:
        out = out.unflatten(0, (batch, max_q))
        state = state if state is None else state.unflatten(1, (batch, max_q)).transpose(0, 1).contiguous()
    return shared.finish((out, state), True, out.shape[-1], given)

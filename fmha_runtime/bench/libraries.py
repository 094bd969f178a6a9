# SPDX-License-Identifier: Apache-2.0
"""Adapters of the attention libraries that one may have installed; each refuses what its library cannot run.

Written from the libraries' documented signatures. What a version refuses for reasons of its own is recorded with its
own words by bench.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from .cells import Cell, Inputs
from .provider import Absent, Peer, Runnable

if TYPE_CHECKING:
    from torch import Tensor

_FLASHINFER_WORKSPACE = 256 << 20
_FLASHINFER_DIMS = (64, 128, 256)


def peers() -> tuple[Peer, ...]:
    """The libraries, installed or not."""
    return (
        Peer("flash_attn", "flash_attn", _flash_attn_2, "flash_attn (FlashAttention-2)"),
        Peer("flash_attn_3", "flash_attn_interface", _flash_attn_3, "flash_attn_interface (FlashAttention-3)"),
        Peer("flash_attn_4", "flash_attn.cute", _flash_attn_4, "flash_attn.cute (FlashAttention-4)"),
        Peer("flashinfer", "flashinfer", _flashinfer, "FlashInfer, the backend that it chooses"),
        Peer("xformers", "xformers.ops", _xformers, "xFormers, the operator that it chooses"),
    )


def features(cell: Cell) -> Iterator[str]:
    """What a cell asks for besides plain attention."""
    for word, asked in (
        ("softcap", cell.softcap),
        ("ALiBi", cell.alibi),
        ("window", cell.window is not None),
        ("packed mask", cell.packed),
        ("varlen", cell.lengths),
        ("paged KV", cell.page_size),
        ("ragged keys", cell.keys),
        ("GQA", cell.heads != cell.heads_k),
        ("two head dims", cell.head_dim != cell.head_dim_v),
    ):
        if asked:
            yield word


def only(who: str, cell: Cell, *allowed: str) -> None:
    """Refuse a cell that asks for anything else.

    Raises:
        Absent: it does.
    """
    beyond = [word for word in features(cell) if word not in allowed]
    if beyond:
        raise Absent(f"{who} has no {' and no '.join(beyond)}")


def _first(result: Any) -> Tensor:
    """Some versions return (out, lse, ...), others out."""
    found: Tensor = result[0] if isinstance(result, tuple | list) else result
    return found


def _window(cell: Cell, unlimited: int | None) -> tuple[int | None, int | None]:
    """(left, right) as the flash_attn family wants it; causal has its own argument."""
    left, right = cell.window or (None, None)
    return unlimited if left is None else left, unlimited if right is None else right


def _varlen(cell: Cell, x: Inputs) -> dict[str, Any]:
    longest = max(cell.lengths)
    return {
        "cu_seqlens_q": x.cu_seqlens, "cu_seqlens_k": x.cu_seqlens, "max_seqlen_q": longest, "max_seqlen_k": longest
    }  # fmt: skip


def _flash_attn_2(cell: Cell, x: Inputs) -> Runnable:
    library = importlib.import_module("flash_attn")
    only("flash_attn 2", cell, "softcap", "ALiBi", "window", "varlen", "paged KV", "ragged keys", "GQA")
    options: dict[str, Any] = {"causal": cell.causal, "window_size": _window(cell, -1)}
    if cell.softcap:
        options["softcap"] = cell.softcap
    if cell.alibi:
        options["alibi_slopes"] = x.slopes
    if x.used is not None:
        if cell.page_size % 256:
            raise Absent(f"flash_attn 2 wants pages of a multiple of 256 tokens, these have {cell.page_size}")
        options |= {"cache_seqlens": x.used, "block_table": x.table}
        return Runnable(partial(library.flash_attn_with_kvcache, x.q, x.k, x.v, **options), output=_first)
    if cell.lengths:
        options |= _varlen(cell, x)
        return Runnable(partial(library.flash_attn_varlen_func, x.q, x.k, x.v, **options), output=_first)
    return Runnable(partial(library.flash_attn_func, x.q, x.k, x.v, **options), output=_first)


def _flash_attn_3(cell: Cell, x: Inputs) -> Runnable:
    library = importlib.import_module("flash_attn_interface")
    only("flash_attn 3", cell, "softcap", "window", "varlen", "paged KV", "ragged keys", "GQA", "two head dims")
    options: dict[str, Any] = {"causal": cell.causal, "window_size": _window(cell, -1)}
    if cell.softcap:
        options["softcap"] = cell.softcap
    if x.used is not None:
        options |= {"cache_seqlens": x.used, "page_table": x.table}
        return Runnable(partial(library.flash_attn_with_kvcache, x.q, x.k, x.v, **options), output=_first)
    if cell.lengths:
        options |= _varlen(cell, x)
        return Runnable(partial(library.flash_attn_varlen_func, x.q, x.k, x.v, **options), output=_first)
    return Runnable(partial(library.flash_attn_func, x.q, x.k, x.v, **options), output=_first)


def _flash_attn_4(cell: Cell, x: Inputs) -> Runnable:
    library = importlib.import_module("flash_attn.cute")
    only("flash_attn 4", cell, "softcap", "window", "varlen", "paged KV", "ragged keys", "GQA", "two head dims")
    options: dict[str, Any] = {"causal": cell.causal, "window_size": _window(cell, None)}
    if cell.softcap:
        options["softcap"] = cell.softcap
    if x.used is not None:
        options |= {"seqused_k": x.used, "page_table": x.table}
    elif cell.lengths:
        options |= _varlen(cell, x)
    else:
        return Runnable(partial(library.flash_attn_func, x.q, x.k, x.v, **options), output=_first)
    return Runnable(partial(library.flash_attn_varlen_func, x.q, x.k, x.v, **options), output=_first)


def _flashinfer(cell: Cell, x: Inputs) -> Runnable:
    """Its batch wrappers: ragged for dense and varlen cells, paged for the others."""
    import torch

    library = importlib.import_module("flashinfer")
    only("FlashInfer", cell, "softcap", "ALiBi", "window", "varlen", "paged KV", "GQA")
    if cell.head_dim not in _FLASHINFER_DIMS:
        raise Absent(f"FlashInfer has kernels for head dims {', '.join(map(str, _FLASHINFER_DIMS))}")
    if cell.window is not None and cell.window[1] != 0:
        raise Absent("FlashInfer bounds a window on its left only")

    def ints(values: Any) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=x.q.device)

    starts = ints(accumulate(cell.lengths or (cell.seqlen_q,) * cell.batch, initial=0))
    options: dict[str, Any] = {
        "causal": cell.causal,
        "pos_encoding_mode": "ALIBI" if cell.alibi else "NONE",
        "window_left": cell.window[0] if cell.window and cell.window[0] is not None else -1,
        "logits_soft_cap": cell.softcap or None,
        "q_data_type": x.q.dtype,
        "kv_data_type": x.k.dtype,
    }
    workspace = torch.empty(_FLASHINFER_WORKSPACE, dtype=torch.uint8, device=x.q.device)
    q = x.q.flatten(0, -3)
    heads = (cell.heads, cell.heads_k, cell.head_dim)
    if x.table is not None:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        pages = x.table.shape[1]
        last = ints([(cell.seqlen - 1) % cell.page_size + 1] * cell.batch)
        indptr = ints(pages * b for b in range(cell.batch + 1))
        wrapper.plan(starts, indptr, x.table.flatten(), last, *heads, cell.page_size, **options)
        call = partial(wrapper.run, q, (x.k, x.v))
    else:
        wrapper = library.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        keys = starts if cell.lengths else ints(cell.seqlen * b for b in range(cell.batch + 1))
        wrapper.plan(starts, keys, *heads, **options)
        call = partial(wrapper.run, q, x.k.flatten(0, -3), x.v.flatten(0, -3))
    return Runnable(call, output=lambda out: _first(out).view(*x.q.shape[:-1], cell.head_dim_v))


def _xformers(cell: Cell, x: Inputs) -> Runnable:
    ops = importlib.import_module("xformers.ops")
    biases = importlib.import_module("xformers.ops.fmha.attn_bias")
    only("xFormers", cell, "window", "varlen", "GQA", "two head dims")
    if cell.lengths and cell.window is not None:
        raise Absent("xFormers: windows of varlen batches are not measured")
    q, k, v = x.q, x.k, x.v
    bias = biases.LowerTriangularMask() if cell.causal else None
    if cell.window is not None:
        left, right = cell.window
        if left is None or right is None:
            raise Absent("xFormers bounds a window on both sides")
        bias = biases.LocalAttentionFromBottomRightMask(window_left=left, window_right=0 if cell.causal else right)
    if cell.lengths:
        kind = biases.BlockDiagonalCausalMask if cell.causal else biases.BlockDiagonalMask
        bias = kind.from_seqlens(list(cell.lengths))
        q, k, v = (t[None] for t in (q, k, v))
    if cell.heads != cell.heads_k:  # [B, S, Hk, H / Hk, D], K and V without a copy
        group = cell.heads // cell.heads_k
        q = q.unflatten(2, (cell.heads_k, group))
        k, v = (t.unsqueeze(3).expand(-1, -1, -1, group, -1) for t in (k, v))
    call = partial(ops.memory_efficient_attention_forward, q, k, v, attn_bias=bias)
    return Runnable(call, output=lambda out: out.reshape(*x.q.shape[:-1], cell.head_dim_v))

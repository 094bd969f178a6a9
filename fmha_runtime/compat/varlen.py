# SPDX-License-Identifier: Apache-2.0
"""``flash_attn_varlen_func`` of FlashAttention 2, 3 and vLLM: packed keys, or packed queries over a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import kvcache, shared

if TYPE_CHECKING:
    import torch


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: dict[str, Any], cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None, max_q: int | None, max_k: int | None, *, used: torch.Tensor | None,
    table: torch.Tensor | None, lse: bool, out: torch.Tensor | None,
) -> tuple[torch.Tensor, Any]:  # fmt: skip
    """(out, lse or None) of packed queries q [Tq, H, D].

    Args:
        k, v: [Tk, Hk, D] with ``cu_k``; pools [pages, page, Hk, D] with ``table``; else a dense cache [B, S, Hk, D].
        max_q, max_k: ints, or tensors that they are read from (which waits for the device).
        used: [B], keys of each sequence; with ``table`` it may be missing where ``cu_k`` tells it.

    Raises:
        InputError: arguments of another order, or too few.
    """
    if isinstance(cu_q, int):
        raise InputError(
            f"cu_seqlens_q is {cu_q}, an int: vLLM's flash_attn_varlen_func has max_seqlen_q in its place; pass all "
            "arguments behind q, k and v by name"
        )
    if cu_q is None:
        raise InputError("cu_seqlens_q is missing: int32 [batch + 1], where the queries of each sequence begin")
    if table is None and cu_k is not None:
        longest = shared.integer("max_seqlen_q", max_q), shared.integer("max_seqlen_k", max_k)
        return shared.attend(q, k, v, chosen, cu_q, cu_k, *longest, seqused_k=used, lse=lse, out=out)
    if table is not None and used is None:
        if cu_k is None:
            raise InputError("block_table needs the lengths of the sequences: seqused_k [batch], or cu_seqlens_k")
        used = cu_k.diff()
    if k.ndim != 4:
        raise InputError(
            f"k has shape {tuple(k.shape)}; without cu_seqlens_k a cache [batch, seq, heads_k, dim], or with "
            "block_table pages [pages, page, heads_k, dim], is needed"
        )
    return kvcache.attend(
        q, k, v, None, None, chosen, cache_seqlens=used, table=table, lse=lse,
        further={"cu_seqlens_q": cu_q, "max_seqlen_q": max_q, "out": out},
    )  # fmt: skip

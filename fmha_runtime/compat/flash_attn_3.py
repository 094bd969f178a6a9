# SPDX-License-Identifier: Apache-2.0
"""FlashAttention 3's functions on this library, forward only. Its module is called ``flash_attn_interface``, and
``flash_attn_3.flash_attn_interface``.

Positions after q, k, v differ from version 2, so these are functions of their own. ``num_splits``, ``pack_gqa``,
``scheduler_metadata`` and ``deterministic`` are hints that the result does not depend on. ``qv``, ``seqused_q`` and an
``sm_margin`` other than 0 are refused. FP8 tensors are refused with their scales; beside 16-bit tensors scales mean
nothing, there as here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..ops.combine.merge import merge
from . import kvcache, shared, varlen

if TYPE_CHECKING:
    import torch

    Window = tuple[int | None, int | None] | None

FUNCTIONS = (
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q [B, Sq, H, D] over k [B, Sk, Hk, D] and v [B, Sk, Hk, Dv].

    Returns:
        out [B, Sq, H, Dv], or with return_attn_probs (out, softmax_lse [B, H, Sq]).

    Raises:
        UnsupportedProblem: an option that no kernel computes, or gradients.
    """
    more = {"qv": qv, "q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale, "sm_margin": sm_margin}
    chosen = shared.options(
        "flash_attn_func", q, {**more, "attention_chunk": attention_chunk}, softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, softcap=softcap,
    )  # fmt: skip
    out, lse = shared.attend(q, k, v, chosen, lse=return_attn_probs)
    return (out, lse) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_func`` of qkv [B, S, 3, H, D], or [B, S, H + 2 Hk, D] with num_heads_q = H."""
    q, k, v = shared.split_qkv(qkv, num_heads_q)
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap,
        sm_margin=sm_margin, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of packed sequences: q [Tq, H, D], k [Tk, Hk, D], v [Tk, Hk, Dv]; with cu_seqlens_k None a cache [B, S,
    Hk, D] of which seqused_k [B] keys count.

    Returns:
        out [Tq, H, Dv], or with return_attn_probs (out, softmax_lse [H, Tq]).

    Raises:
        UnsupportedProblem: as ``flash_attn_func``.
    """
    more = {
        "qv": qv, "q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale, "seqused_q": seqused_q,
        "sm_margin": sm_margin, "attention_chunk": attention_chunk,
    }  # fmt: skip
    chosen = shared.options(
        "flash_attn_varlen_func", q, more, softmax_scale=softmax_scale, causal=causal, window_size=window_size,
        softcap=softcap,
    )  # fmt: skip
    out, lse = varlen.attend(
        q, k, v, chosen, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, used=seqused_k, table=None,
        lse=return_attn_probs, out=None,
    )  # fmt: skip
    return (out, lse) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | int | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """As FlashAttention 2's; also packed queries (cu_seqlens_q, max_seqlen_q) and new keys (cu_seqlens_k_new).

    Returns:
        out in the form of q, or (out, softmax_lse, two empty tensors: the parts of split-KV kernels).

    Raises:
        UnsupportedProblem: as ``flash_attn_func``; InputError: arguments that contradict each other.
    """
    more = {"qv": qv, "q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale, "sm_margin": sm_margin}
    chosen = shared.options(
        "flash_attn_with_kvcache", q, {**more, "attention_chunk": attention_chunk}, softmax_scale=softmax_scale,
        causal=causal, window_size=window_size, softcap=softcap,
    )  # fmt: skip
    further = {
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k_new": cu_seqlens_k_new, "max_seqlen_q": max_seqlen_q,
        "rotary_seqlens": rotary_seqlens,
    }  # fmt: skip
    out, lse = kvcache.attend(
        q, k_cache, v_cache, k, v, chosen, rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, table=page_table,
        rotary_interleaved=rotary_interleaved, further=further, lse=return_softmax_lse, version=3,
    )  # fmt: skip
    return (out, lse, out.new_empty(0), out.new_empty(0)) if return_softmax_lse else out


def flash_attn_combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all keys from attention over parts of them.

    Args:
        out_partial: [parts, B, S, H, D], or [parts, T, H, D].
        lse_partial: [parts, B, S, H] or [parts, T, H], natural log.
        out: [B, S, H, D] to write; None: a new tensor of ``out_dtype``, or of the dtype of the parts.

    Returns:
        (out, lse fp32 [B, S, H]).

    Raises:
        InputError: shapes that do not fit each other, or an ``out`` that does not fit them.
    """
    import torch

    if out_partial.ndim not in (4, 5) or lse_partial.shape != out_partial.shape[:-1] or out_partial.shape[0] == 0:
        raise InputError(
            f"out_partial is {tuple(out_partial.shape)} and lse_partial {tuple(lse_partial.shape)}; [parts, B, S, H, "
            "D] and [parts, B, S, H] are needed, or [parts, T, H, D] and [parts, T, H], with one part at least"
        )
    dtype = out_dtype or (out_partial.dtype if out is None else out.dtype)
    if out is not None and (out.shape != out_partial.shape[1:] or out.dtype is not dtype):
        raise InputError(f"out is {out.dtype} {tuple(out.shape)}; {dtype} {tuple(out_partial.shape[1:])} is needed")
    parts = list(out_partial.float().unbind(0))
    merged, lse = merge(parts, [x.transpose(-1, -2) for x in lse_partial.float().unbind(0)])
    result = torch.empty_like(merged, dtype=dtype) if out is None else out
    result.copy_(merged)
    return result, lse.transpose(-1, -2)


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: torch.Tensor,
    qkv_dtype: torch.dtype | None = None,
    headdim_v: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> torch.Tensor:
    """What ``flash_attn_with_kvcache`` takes as ``scheduler_metadata``: nothing, since the kernels here share out the
    keys by the lengths that they find on the device.

    Returns:
        an empty int32 tensor on the device of ``cache_seqlens``.

    Raises:
        InputError: ``cache_seqlens`` is not int32 [batch_size], or ``num_splits`` is negative.
        UnsupportedProblem: an ``sm_margin``.
    """
    from .append import check_index

    check_index("cache_seqlens", cache_seqlens, (batch_size,), cache_seqlens.device)
    if num_splits < 0:
        raise InputError(f"num_splits is {num_splits}; an int >= 0 is needed, 0 = as the kernel sees fit")
    shared.options(
        "get_scheduler_metadata", cache_seqlens, {"sm_margin": sm_margin}, softmax_scale=None, causal=causal,
        window_size=window_size, softcap=0.0,
    )  # fmt: skip
    return cache_seqlens.new_empty(0)

# SPDX-License-Identifier: Apache-2.0
"""FlashAttention 2's functions on this library: signatures, layouts and alignment of ``flash_attn`` 2.8, forward only.

Keywords of FlashAttention 3 and of vLLM's fork (``out``, ``return_softmax_lse``, ``s_aux``, ``fa_version``) are taken
where they mean the same here; what changes the result and has no kernel is refused by name. ``deterministic`` and
``num_splits`` are hints that the result does not depend on. Head dims without a kernel are padded with zeros, as
FlashAttention does. One difference is left: the log-sum-exp of a query that sees no key is -inf, as in FlashAttention
3; version 2 says +inf.

``install()`` puts this into ``sys.modules`` as ``flash_attn``, so that code which imports that runs unchanged.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from . import installation, kvcache, shared, varlen
from .installation import uninstall as uninstall

if TYPE_CHECKING:
    import torch

    Window = tuple[int | None, int | None] | None

VERSION = "2.8.3"
"""The version of flash_attn whose interface this is."""

FUNCTIONS = (
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **further: Any,
) -> Any:
    """Attention of q [B, Sq, H, D] over k [B, Sk, Hk, D] and v [B, Sk, Hk, Dv].

    Args:
        window_size: (left, right) keys around the bottom-right diagonal, -1 = unlimited; causal sets right to 0.
        deterministic: the forward pass always is.
        further: keywords of FlashAttention 3 and vLLM, among them out [B, Sq, H, Dv], which is written and returned.

    Returns:
        out [B, Sq, H, Dv], or with return_attn_probs (out, softmax_lse [B, H, Sq], an empty S_dmask: there are
        probabilities with dropout only, there as here), or with return_softmax_lse (out, softmax_lse).

    Raises:
        UnsupportedProblem: dropout, gradients, or another option that no kernel computes.
    """
    chosen = shared.options(
        "flash_attn_func", q, further, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    lse = bool(return_attn_probs or further.get("return_softmax_lse"))
    return _result(shared.attend(q, k, v, chosen, lse=lse, out=further.get("out")), return_attn_probs, further)


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **further: Any,
) -> Any:
    """``flash_attn_func`` with k and v in one tensor [B, Sk, 2, Hk, D]; slices of it are read in place."""
    return flash_attn_func(
        q, kv[:, :, 0], kv[:, :, 1], dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs, **further,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **further: Any,
) -> Any:
    """``flash_attn_func`` with q, k and v in one tensor [B, S, 3, H, D]."""
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, **further,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    **further: Any,
) -> Any:
    """Attention of packed sequences: q [Tq, H, D], k [Tk, Hk, D], v [Tk, Hk, Dv], cu_seqlens int32 [B + 1].

    vLLM's form goes in by name: ``block_table`` with ``seqused_k`` and no ``cu_seqlens_k``, ``out=``, ``s_aux=``.

    Args:
        max_seqlen_q, max_seqlen_k: ints, or tensors, which are read. Over pages only max_seqlen_q counts.
        block_table: [B, pages of a sequence] int32; k and v are pools [pages, page, Hk, D] then, and lengths are
            seqused_k, or the differences of cu_seqlens_k. Lengths past the table: see ``flash_attn_with_kvcache``.
        further: keywords of FlashAttention 3 and vLLM: seqused_k [B], out [Tq, H, Dv], s_aux [H] (sinks).

    Returns:
        out [Tq, H, Dv], or with return_attn_probs (out, softmax_lse [H, Tq], an empty S_dmask), or with
        return_softmax_lse (out, softmax_lse).

    Raises:
        UnsupportedProblem: as ``flash_attn_func``; InputError: too few arguments.
    """
    chosen = shared.options(
        "flash_attn_varlen_func", q, further, ("seqused_k",), dropout_p=dropout_p, softmax_scale=softmax_scale,
        causal=causal, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    found = varlen.attend(
        q, k, v, chosen, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, used=further.get("seqused_k"),
        table=block_table, lse=bool(return_attn_probs or further.get("return_softmax_lse")), out=further.get("out"),
    )  # fmt: skip
    return _result(found, return_attn_probs, further)


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **further: Any,
) -> Any:
    """``flash_attn_varlen_func`` with k and v in one tensor [Tk, 2, Hk, D]."""
    return flash_attn_varlen_func(
        q, kv[:, 0], kv[:, 1], cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, **further,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **further: Any,
) -> Any:
    """``flash_attn_varlen_func`` with q, k and v in one tensor [T, 3, H, D]."""
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs, **further,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | int | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    **further: Any,
) -> Any:
    """Attention of q [B, Sq, H, D] over caches [B, S, Hk, D], after k and v are written behind cache_seqlens in place.

    Args:
        k, v: [B, Sn, Hk, D]: new keys and values; q and k are rotated first where rotary_cos and rotary_sin are given.
        rotary_cos, rotary_sin: [positions, rotary_dim / 2]. Key i stands at cache_seqlens[b] + i, and so does query i
            of a causal or windowed call; else all queries stand at cache_seqlens[b].
        cache_seqlens: int32 [B] or an int: keys in the cache before the new ones. None: it is full. Lengths for which
            the cache or the block table has no room are an InputError where the host knows them (an int, CPU tensors).
            On a GPU they are never read on the host: they count as the room, and new keys behind it are not written.
        cache_batch_idx: int32 [B]: the row of the cache of each sequence.
        cache_leftpad: int32 [B]: where each sequence starts in its row.
        block_table: int32 [B, pages of a sequence]; the caches are pools [pages, page, Hk, D] then.
        num_splits: a hint.
        further: keywords of FlashAttention 3 and vLLM, among them page_table, cu_seqlens_q, max_seqlen_q,
            cu_seqlens_k_new, out.

    Returns:
        out [B, Sq, H, Dv], or (out, softmax_lse [B, H, Sq]).

    Raises:
        UnsupportedProblem: as ``flash_attn_func``; InputError: arguments that contradict each other.
    """
    chosen = shared.options(
        "flash_attn_with_kvcache", q, further, kvcache.FURTHER, softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    out, lse = kvcache.attend(
        q, k_cache, v_cache, k, v, chosen, rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad,
        table=further.get("page_table") if block_table is None else block_table,
        rotary_interleaved=rotary_interleaved, further=further, lse=return_softmax_lse,
    )  # fmt: skip
    return (out, lse) if return_softmax_lse else out


def install(*, fa3: bool = False, device: str | None = None, force: bool = False) -> None:
    """``import flash_attn`` means these functions from now on, in this process; ``uninstall()`` undoes it.

    Modules: ``flash_attn`` (with ``__version__``), ``flash_attn.flash_attn_interface``, ``flash_attn.bert_padding``,
    ``flash_attn.layers.rotary`` and ``flash_attn.ops.triton.rotary``. Libraries that ask pip for the flash-attn package
    (transformers does) still see none.

    Args:
        fa3: also FlashAttention 3's module, under both of its names: ``flash_attn_interface`` and
            ``flash_attn_3.flash_attn_interface``. Off by default: much code prefers it when it finds it.
        device: passed to every call; ``"emulator"`` runs CPU tensors through the kernels themselves.
        force: replace a flash_attn that was imported already. Names that others imported from it keep the old one.

    Raises:
        FmhaError: a real flash_attn was imported already.
    """
    installation.put(sys.modules[__name__], fa3=fa3, device=device, force=force)


def _result(found: tuple[torch.Tensor, Any], probs: bool, further: dict[str, Any]) -> Any:
    """What a function of version 2, or of vLLM with its own keyword, returns of (out, lse or None)."""
    out, lse = found
    if further.get("return_softmax_lse"):
        return out, lse
    return (out, lse, out.new_empty(0)) if probs else out

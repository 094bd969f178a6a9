# SPDX-License-Identifier: Apache-2.0
"""FlashAttention 2's functions on this library: signatures, layouts and alignment of ``flash_attn`` 2.8, forward only.

Keywords of FlashAttention 3 are taken where they mean the same here; what changes the result and has no kernel is
refused by name. ``deterministic`` and ``num_splits`` are hints that the result does not depend on. Head dims without a
kernel are padded with zeros, as FlashAttention does (not those of caches). One difference is left: the log-sum-exp
of a query that sees no key is -inf, as in FlashAttention 3; version 2 says +inf.

``install()`` puts this into ``sys.modules`` as ``flash_attn``, so that code which imports that runs unchanged.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import FmhaError
from . import bert_padding, flash_attn_3, kvcache, shared

if TYPE_CHECKING:
    import torch

    Window = tuple[int | None, int | None]

VERSION = "2.8.3"
"""The version of flash_attn whose interface this is."""

_FUNCTIONS = (
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
        further: keywords of FlashAttention 3.

    Returns:
        out [B, Sq, H, Dv], or with return_attn_probs (out, softmax_lse [B, H, Sq], an empty S_dmask).

    Raises:
        UnsupportedProblem: dropout, gradients, or another option that no kernel computes.
    """
    chosen = shared.options(
        "flash_attn_func", further, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    return _result(*shared.attend(q, k, v, chosen, lse=return_attn_probs))


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
    block_table: torch.Tensor | None = None,
    **further: Any,
) -> Any:
    """Attention of packed sequences: q [Tq, H, D], k [Tk, Hk, D], v [Tk, Hk, Dv], cu_seqlens int32 [B + 1].

    Args:
        block_table: [B, pages of a sequence] int32; k and v are pools [pages, page, Hk, D] then, and only the
            differences of cu_seqlens_k count.
        further: keywords of FlashAttention 3, among them seqused_k [B].

    Returns:
        out [Tq, H, Dv], or with return_attn_probs (out, softmax_lse [H, Tq], an empty S_dmask).

    Raises:
        UnsupportedProblem: as ``flash_attn_func``.
    """
    chosen = shared.options(
        "flash_attn_varlen_func", further, ("seqused_k",), dropout_p=dropout_p, softmax_scale=softmax_scale,
        causal=causal, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    # Lengths come as ints, or as tensors that they are read from (which waits for the device).
    longest = int(max_seqlen_q), int(max_seqlen_k)
    used = further.get("seqused_k")
    if block_table is None:
        found = shared.attend(
            q, k, v, chosen, cu_seqlens_q, cu_seqlens_k, *longest, seqused_k=used, lse=return_attn_probs
        )
    else:
        found = kvcache.attend(
            q, k, v, None, None, chosen, rotary_cos=None, rotary_sin=None,
            cache_seqlens=cu_seqlens_k.diff() if used is None else used, cache_batch_idx=None, cache_leftpad=None,
            table=block_table, rotary_interleaved=True,
            further={"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": longest[0]}, lse=return_attn_probs,
        )  # fmt: skip
    return _result(*found)


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
        cache_seqlens: int32 [B] or an int: keys in the cache before the new ones. None: it is full.
        cache_batch_idx: int32 [B]: the row of the cache of each sequence.
        cache_leftpad: int32 [B]: where each sequence starts in its row.
        block_table: int32 [B, pages of a sequence]; the caches are pools [pages, page, Hk, D] then.
        num_splits: a hint.
        further: keywords of FlashAttention 3, among them page_table, cu_seqlens_q, max_seqlen_q, cu_seqlens_k_new.

    Returns:
        out [B, Sq, H, Dv], or (out, softmax_lse [B, H, Sq]).

    Raises:
        UnsupportedProblem: as ``flash_attn_func``; InputError: arguments that contradict each other.
    """
    chosen = shared.options(
        "flash_attn_with_kvcache", further, kvcache.FURTHER, softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    out, lse = kvcache.attend(
        q, k_cache, v_cache, k, v, chosen, rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad,
        table=further.get("page_table") if block_table is None else block_table,
        rotary_interleaved=rotary_interleaved, further=further, lse=return_softmax_lse,
    )  # fmt: skip
    return (out, lse) if return_softmax_lse else out


def _result(out: torch.Tensor, lse: torch.Tensor | None) -> Any:
    """FlashAttention 2 fills S_dmask with dropout only; it is empty here, as there."""
    return out if lse is None else (out, lse, out.new_empty(0))


_replaced: dict[str, ModuleType | None] = {}  # what install() found in sys.modules under the names that it took


def install(*, fa3: bool = False, device: str | None = None, force: bool = False) -> None:
    """``import flash_attn`` means this module from now on, in this process; ``uninstall()`` undoes it.

    Modules: ``flash_attn`` (with ``__version__``), ``flash_attn.flash_attn_interface``, ``flash_attn.bert_padding``.
    Libraries that ask pip for the flash-attn package (transformers does) still see none.

    Args:
        fa3: also ``flash_attn_interface``, FlashAttention 3's module. Off by default: much code prefers it when it
            finds it.
        device: passed to every call; ``"emulator"`` runs CPU tensors through the kernels themselves.
        force: replace a flash_attn that was imported already. Names that others imported from it keep the old one.

    Raises:
        FmhaError: a real flash_attn was imported already.
    """
    uninstall()
    names = ["flash_attn", *(["flash_attn_interface"] if fa3 else [])]
    real = [name for name in sys.modules if name in names or name.startswith("flash_attn.")]
    if real and not force:
        raise FmhaError(
            f"{', '.join(sorted(real))} was imported already: call install() before whatever imports it, or "
            "install(force=True) to replace it for imports from now on"
        )
    interface = _module("flash_attn.flash_attn_interface", sys.modules[__name__], _FUNCTIONS)
    padding = _module("flash_attn.bert_padding", bert_padding, tuple(vars(bert_padding)))
    package = _module("flash_attn", sys.modules[__name__], _FUNCTIONS)
    package.__path__ = []  # a package: a module of it that is not here is a ModuleNotFoundError
    package.__dict__.update(__version__=VERSION, flash_attn_interface=interface, bert_padding=padding)
    ours = [package, interface, padding]
    if fa3:
        ours.append(_module("flash_attn_interface", flash_attn_3, flash_attn_3.FUNCTIONS))
    for name in {*real, *(module.__name__ for module in ours)}:
        _replaced[name] = sys.modules.pop(name, None)
    sys.modules.update((module.__name__, module) for module in ours)
    shared.device = device


def uninstall() -> None:
    """Puts back what ``install()`` found. Without an installation it does nothing."""
    for name, before in _replaced.items():
        sys.modules.pop(name, None)
        if before is not None:
            sys.modules[name] = before
    _replaced.clear()
    shared.device = None


def _module(name: str, source: ModuleType, names: tuple[str, ...]) -> ModuleType:
    module = ModuleType(name, f"{name} by fmha_runtime.compat.\n\n{source.__doc__}")
    module.__spec__ = ModuleSpec(name, None, is_package=name == "flash_attn")  # importlib.util.find_spec looks at it
    module.__dict__.update((each, getattr(source, each)) for each in names if not each.startswith("_"))
    return module

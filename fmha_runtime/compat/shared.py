# SPDX-License-Identifier: Apache-2.0
"""What the look-alikes of FlashAttention 2 and 3 share: their options in terms of ours, and refusals by name."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from ..errors import InputError, UnsupportedProblem
from ..kernels.spec import HEAD_DIMS
from ..problem.arguments import LARGEST_PAGE, PAGE_SIZES, is_page_size
from ..problem.kinds import are_special, traced
from ..problem.tensors import MAX_SEQLEN

if TYPE_CHECKING:
    import torch

device: str | None = None
"""Handed to every call as ``device=``; ``install(device="emulator")`` sets it."""

OWN = ("out", "return_softmax_lse", "s_aux")
"""Keywords of vLLM's functions that all of ours honour."""

_HINTS = ("num_splits", "pack_gqa", "scheduler_metadata", "deterministic")  # speed only: the result is the same
_SCALES = ("q_descale", "k_descale", "v_descale")
_REFUSED = {
    "qv": "a second query that meets V",
    "q_v": "a second query that meets V",
    "seqused_q": "queries that do not exist",
    "output_scale": "an FP8 output",
    "cp_tot_seqused_k": "context parallelism",
    "mask_mod": "a mask that is a function",
    "block_sparse_tensors": "block-sparse attention",
    "aux_tensors": "a mask that is a function",
    "aux_tensor_leading_dims": "a mask that is a function",
    "dynamic_causal": "causality by sequence",
}
_NEUTRAL = {
    "sm_margin": (0, "they run on all multiprocessors of the GPU, and none is kept free"),
    "cp_world_size": (1, "there is no context parallelism"),
    "cp_rank": (0, "there is no context parallelism"),
}
"""Numbers that are refused unless they ask for nothing, and why."""

_ROOMS = sorted(HEAD_DIMS)


def options(
    function: str, q: torch.Tensor, further: dict[str, Any], own: tuple[str, ...] = (), *, dropout_p: float = 0.0,
    **plain: Any,
) -> dict[str, Any]:  # fmt: skip
    """The options of a call in the words of ``fmha_runtime.attention``.

    Args:
        function: whose call this is, for messages.
        q: the queries. Scales of FP8 tensors mean nothing where they have 16 bits, there as here.
        further: keywords of FlashAttention 3 and of vLLM that came along.
        own: those of them that the caller honours itself, besides ``OWN``.
        dropout_p: must be 0.
        plain: softmax_scale, causal, window_size, softcap, alibi_slopes.

    Raises:
        UnsupportedProblem: an option that no kernel computes.
        TypeError: a keyword that FlashAttention does not have either.
        InputError: a window that is no pair of whole numbers.
    """
    if dropout_p:
        raise UnsupportedProblem(
            f"{function}: dropout_p is {dropout_p} and no kernel computes dropout: pass dropout_p=0.0 (model.eval() "
            "does so in most models)"
        )
    for name, value in further.items():
        if name not in own and name not in OWN and name != "attention_chunk":
            _judge(function, q, name, value)
    causal = bool(plain["causal"])
    scale, softcap = plain["softmax_scale"], plain["softcap"]
    chosen = {
        "causal": causal,
        "window": window(plain["window_size"], causal),
        "scale": None if scale is None else float(scale),
        "softcap": float(softcap) if softcap > 0 else 0.0,  # there as well, 0 or less means off
        "alibi_slopes": plain.get("alibi_slopes"),
        "attention_chunk": further.get("attention_chunk"),
    }
    if further.get("s_aux") is not None:
        chosen["sinks"] = further["s_aux"].float()  # vLLM keeps them in the dtype of the model
    return chosen


def _judge(function: str, q: torch.Tensor, name: str, value: Any) -> None:
    """Refuses a keyword that would change the result, or that nobody knows."""
    if name in _HINTS:
        return
    if name in _SCALES:
        if value is not None and q.element_size() == 1:
            raise UnsupportedProblem(
                f"{function}: no kernel computes an FP8 scale ({name}=): pass fp16 or bf16 tensors"
            )
    elif name in _REFUSED:
        if value is not None:
            raise UnsupportedProblem(f"{function}: no kernel computes {_REFUSED[name]} ({name}=): leave it out")
    elif name in _NEUTRAL:
        neutral, why = _NEUTRAL[name]
        if value is not None and value != neutral:
            raise UnsupportedProblem(
                f"{function}: {name} is {value} and the kernels cannot honour it: {why}. Pass {name}={neutral}, or "
                "leave it out"
            )
    elif name == "fa_version":
        if value is not None and value not in (2, 3, 4):
            raise InputError(f"{function}: fa_version is {value!r}; 2, 3 and 4 are known, and all mean these kernels")
    else:
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def window(size: Any, causal: bool) -> tuple[int | None, int | None]:
    """``(left, right)`` of FlashAttention in ours: a negative bound is none, and causal means a right bound of 0.

    None is unlimited, as for vLLM. Bounds may be numpy's integers or tensors, which are read.
    """
    if size is None:
        size = (-1, -1)
    elif not isinstance(size, tuple | list) and hasattr(size, "tolist"):
        size = size.tolist()
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise InputError(f"window_size is {size!r}; a pair (left, right) is needed, (-1, -1) = unlimited")
    left, right = _bound("left", size[0]), _bound("right", size[1])
    return left, None if causal else right


def _bound(side: str, value: Any) -> int | None:
    if value is None:
        return None
    found = integer(f"the {side} bound of window_size", value)
    return None if found < 0 or found >= MAX_SEQLEN else found  # no sequence is longer than that


def integer(name: str, value: Any) -> int:
    """A whole number; that of a tensor is read, which waits for its device.

    Raises:
        InputError: it is none.
    """
    if type(value) is int:
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} is {value!r}; an int is needed (or an integer tensor with one element)") from None


def readable(*given: Any) -> bool:
    """Whether the host may look at these tensors: they lie in its memory and nothing traces."""
    if traced():
        return False
    found = [x for x in given if x is not None]
    return all(x.device.type == "cpu" for x in found) and not are_special(found)


def contiguous(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """As FlashAttention does: a head dim that is not contiguous is copied."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def room(dims: tuple[int, int]) -> tuple[int, int]:
    """The head dims of the smallest kernel that takes those of q and v; they themselves where there is none."""
    for each in _ROOMS:
        if each[0] >= dims[0] and each[1] >= dims[1]:
            return each
    return dims


def widen(x: torch.Tensor, width: int) -> torch.Tensor:
    """x with zeros behind its head dim."""
    import torch.nn.functional as F

    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def pad(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v with zeros up to a head dim that has kernels; as they are where there is none or no need."""
    if k.shape[-1] != q.shape[-1]:
        return q, k, v
    depth, width = room((q.shape[-1], v.shape[-1]))
    return widen(q, depth), widen(k, depth), widen(v, width)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: dict[str, Any], *lengths: Any, lse: bool,
    out: torch.Tensor | None = None, **more: Any,
) -> tuple[torch.Tensor, Any]:  # fmt: skip
    """(out, lse or None) of dense tensors, or of packed ones with ``lengths`` cu_seqlens_q, _k, max_seqlen_q, _k."""
    from .. import attention, attention_varlen

    call: Any = attention_varlen if lengths else attention
    q, k, v = contiguous(q, k, v)
    return padded(call, q, k, v, chosen, *lengths, lse=lse, out=out, **more)


def padded(
    call: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: dict[str, Any], *lengths: Any, lse: bool,
    out: torch.Tensor | None, **more: Any,
) -> tuple[torch.Tensor, Any]:  # fmt: skip
    """(out, lse or None) of one of our calls on tensors that are padded where their head dims have no kernel."""
    if chosen["scale"] is None:
        chosen["scale"] = q.shape[-1] ** -0.5  # of the head dim before padding
    width = v.shape[-1]
    q, k, v = pad(q, k, v)
    direct = out if v.shape[-1] == width else None
    found = call(q, k, v, *lengths, **chosen, **more, out=direct, return_lse=lse, device=device)
    return finish(found, lse, width, None if direct is not None else out)


def finish(found: Any, lse: bool, width: int, out: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    """(out, lse or None) of a call: without the padding, and in the tensor ``out`` where the call has not written it.

    Raises:
        InputError: that tensor has another shape, dtype or device.
    """
    result, state = found if lse else (found, None)
    if result.shape[-1] != width:
        result = result[..., :width]
    if out is None:
        return result, state
    if out.shape != result.shape or out.dtype != result.dtype or out.device != result.device:
        raise InputError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}; this call needs {result.dtype} "
            f"{tuple(result.shape)} on {result.device}"
        )
    return out.copy_(result), state


def split_qkv(qkv: torch.Tensor, num_heads_q: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v as views of qkv [B, S, 3, H, D], or of [B, S, H + 2 Hk, D] with num_heads_q = H.

    Slices, not the results of one split: autograd lets no one of these be written in place.

    Raises:
        InputError: another shape.
    """
    if qkv.ndim == 5 and qkv.shape[2] == 3:
        return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    if qkv.ndim == 4 and num_heads_q is not None and (qkv.shape[2] - num_heads_q) % 2 == 0:
        first_v = num_heads_q + (qkv.shape[2] - num_heads_q) // 2
        return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q:first_v], qkv[:, :, first_v:]
    raise InputError(
        f"qkv has shape {tuple(qkv.shape)} and num_heads_q is {num_heads_q}; [B, S, 3, H, D], or "
        "[B, S, H + 2 Hk, D] with num_heads_q = H is needed"
    )


def pages(
    cache: tuple[torch.Tensor, torch.Tensor], table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K and V pools and their page table with pages of a size that has kernels. Those that only decode kernels read are
    cut into views of smaller ones, where they can be.

    Raises:
        UnsupportedProblem: pages that are neither such a size nor a multiple of one.
    """
    import torch

    size = cache[0].shape[1]
    if size in PAGE_SIZES:
        return *cache, table
    small = page_within(size)
    if not small or not all(joinable(x) for x in cache):
        if is_page_size(size):
            return *cache, table
        raise UnsupportedProblem(
            f"the cache has pages of {size} tokens; there are kernels for 1, 2, 4 and multiples of 8 up to "
            f"{LARGEST_PAGE}, and for multiples of 8 whose pages follow each other in memory"
        )
    parts = size // small
    k, v = (x.unflatten(1, (parts, small)).flatten(0, 1) for x in cache)
    table = table.unsqueeze(-1) * parts + torch.arange(parts, dtype=table.dtype, device=table.device)
    return k, v, table.flatten(1)


def page_within(length: int) -> int:
    """The largest page that divides a length; 0: none does."""
    for size in reversed(PAGE_SIZES):
        if length and length % size == 0:
            return size
    return 0


def joinable(cache: torch.Tensor) -> bool:
    """Whether the first two axes can be seen as one without a copy."""
    return cache.shape[0] == 1 or cache.stride(0) == cache.shape[1] * cache.stride(1)

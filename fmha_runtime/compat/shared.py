# SPDX-License-Identifier: Apache-2.0
"""What the look-alikes of FlashAttention 2 and 3 share: their options in terms of ours, and refusals by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError, UnsupportedProblem
from ..kernels.spec import HEAD_DIMS
from ..problem.arguments import PAGE_SIZES

if TYPE_CHECKING:
    import torch

device: str | None = None
"""Handed to every call as ``device=``; ``install(device="emulator")`` sets it."""

_HINTS = ("num_splits", "pack_gqa", "sm_margin", "scheduler_metadata")  # speed only: the result is the same
_REFUSED = {
    "qv": "a second query that meets V",
    "q_descale": "an FP8 scale",
    "k_descale": "an FP8 scale",
    "v_descale": "an FP8 scale",
    "seqused_q": "queries that do not exist",
}


def options(
    function: str, further: dict[str, Any], own: tuple[str, ...] = (), *, dropout_p: float = 0.0, **plain: Any
) -> dict[str, Any]:
    """The options of a call in the words of ``fmha_runtime.attention``.

    Args:
        function: whose call this is, for messages.
        further: keywords of FlashAttention 3 that came along.
        own: those of them that the caller honours itself.
        dropout_p: must be 0.
        plain: softmax_scale, causal, window_size, softcap, alibi_slopes.

    Raises:
        UnsupportedProblem: an option that no kernel computes.
        TypeError: a keyword that FlashAttention does not have either.
        InputError: a window that is no pair.
    """
    if dropout_p:
        raise UnsupportedProblem(
            f"{function}: dropout_p is {dropout_p} and no kernel computes dropout: pass dropout_p=0.0 (model.eval() "
            "does so in most models)"
        )
    chunk = None
    for name, value in further.items():
        if name in own or name in _HINTS:
            continue
        if name == "attention_chunk":
            chunk = value
        elif name in _REFUSED:
            if value is not None:
                raise UnsupportedProblem(f"{function}: no kernel computes {_REFUSED[name]} ({name}=): leave it out")
        else:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    causal = bool(plain["causal"])
    scale = plain["softmax_scale"]
    return {
        "causal": causal,
        "window": window(plain["window_size"], causal),
        "scale": None if scale is None else float(scale),
        "softcap": max(0.0, float(plain["softcap"])),  # "<= 0 means off"
        "alibi_slopes": plain.get("alibi_slopes"),
        "attention_chunk": chunk,
    }


def window(size: Any, causal: bool) -> tuple[int | None, int | None]:
    """``(left, right)`` of FlashAttention in ours: a negative bound is none, and causal means a right bound of 0."""
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise InputError(f"window_size is {size!r}; a pair (left, right) is needed, (-1, -1) = unlimited")
    left, right = (None if x is None or x < 0 else int(x) for x in size)
    return left, None if causal else right


def contiguous(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """As FlashAttention does: a head dim that is not contiguous is copied."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def pad(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v with zeros up to a head dim that has kernels; as they are where there is none or no need."""
    import torch.nn.functional as F

    dims = (q.shape[-1], v.shape[-1])
    room = min((d for d in HEAD_DIMS if d[0] >= dims[0] and d[1] >= dims[1]), default=dims)
    if room == dims or k.shape[-1] != dims[0]:
        return q, k, v
    return (
        F.pad(q, (0, room[0] - dims[0])), F.pad(k, (0, room[0] - dims[0])), F.pad(v, (0, room[1] - dims[1]))
    )  # fmt: skip


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: dict[str, Any], *lengths: Any, lse: bool, **more: Any
) -> tuple[torch.Tensor, Any]:
    """(out, lse or None) of dense tensors, or of packed ones with ``lengths`` cu_seqlens_q, _k, max_seqlen_q, _k."""
    from .. import attention, attention_varlen

    if chosen["scale"] is None:
        chosen["scale"] = q.shape[-1] ** -0.5  # of the head dim before padding
    width = v.shape[-1]
    q, k, v = pad(*contiguous(q, k, v))
    call: Any = attention_varlen if lengths else attention
    found = call(q, k, v, *lengths, **chosen, **more, return_lse=lse, device=device)
    out, state = found if lse else (found, None)
    return out if out.shape[-1] == width else out[..., :width], state


def pages(
    cache: tuple[torch.Tensor, torch.Tensor], table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K and V pools and their page table with pages of a size that has kernels: large pages are cut into views.

    Raises:
        UnsupportedProblem: pages that are neither such a size nor a multiple of one.
    """
    import torch

    size = cache[0].shape[1]
    if size in PAGE_SIZES:
        return *cache, table
    small = max((p for p in PAGE_SIZES if size and size % p == 0), default=0)
    if not small or not all(joinable(x) for x in cache):
        raise UnsupportedProblem(
            f"the cache has pages of {size} tokens; there are kernels for {', '.join(map(str, PAGE_SIZES))}, and "
            "multiples of them whose pages follow each other in memory"
        )
    parts = size // small
    k, v = (x.unflatten(1, (parts, small)).flatten(0, 1) for x in cache)
    table = table.unsqueeze(-1) * parts + torch.arange(parts, dtype=table.dtype, device=table.device)
    return k, v, table.flatten(1)


def joinable(cache: torch.Tensor) -> bool:
    """Whether the first two axes can be seen as one without a copy."""
    return cache.shape[0] == 1 or cache.stride(0) == cache.shape[1] * cache.stride(1)

# SPDX-License-Identifier: Apache-2.0
"""One call on exactly one kernel, past the choice of kernels: what verification and tuning run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...device.loader import Kernel
from ...errors import InputError
from ...kernels import catalog
from ...kernels.spec import KernelSpec
from ...kernels.tile import Tile
from ...problem import arguments, tensors
from ...problem.arguments import Extras, Shape
from ...problem.packed_mask import PackedMask, pack
from ..works import WORK
from .binding import Binding
from .plan import Plan

if TYPE_CHECKING:
    import torch


def packed(mask: Any, cu_seqlens_q: Any) -> PackedMask | None:
    """The mask of a call as kernels read it; anything but a PackedMask is packed now, without a kernel."""
    if mask is None or isinstance(mask, PackedMask):
        return mask
    return pack(mask, cu_seqlens_q=cu_seqlens_q)


def run(
    kernel: Kernel,
    spec: KernelSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    attention_chunk: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    mask: Any = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    return_lse: bool = False,
    stream: int | None = None,
    tile: Tile | None = None,
) -> Any:
    """One call on exactly this kernel, with the checks of the public calls: what verification is built on.

    ``lse`` is a contiguous fp32 tensor to write instead of a new one, so that what lies around it can be watched.

    Raises:
        InputError: bad tensors or options, or a problem that this kernel does not compute.
    """
    extras = Extras(alibi_slopes, sinks, page_table, packed(mask, cu_seqlens_q))
    shape = arguments.check_call(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, out=out, extras=extras, cache=page_table is not None,
    )  # fmt: skip
    opts = arguments.options(
        causal=causal, window=window, scale=scale, softcap=softcap, attention_chunk=attention_chunk
    )
    dtype, score, family = tensors.dtype_of("q", q), arguments.score(opts, extras), arguments.mask(extras)
    wanted = (dtype, shape.head_dim, shape.head_dim_v, shape.kv)
    own = (spec.dtype, spec.head_dim, spec.head_dim_v, spec.kv)
    if wanted != own or not catalog.serves(spec, family, score):
        raise InputError(
            f"{spec.name} does not compute {dtype.value} with head dims {wanted[1]}x{wanted[2]}, {family.value} mask, "
            f"{score.value} scores, {shape.kv.value} K and V"
        )
    if lse is not None and not (return_lse and _is_lse(lse, shape, q)):
        raise InputError(
            f"lse is {lse.dtype} {tuple(lse.shape)} on {lse.device}; this call needs return_lse=True and a contiguous "
            f"torch.float32 {shape.lse} on {q.device}"
        )
    binding = Binding(kernel, spec, tile or catalog.tile(spec), opts, shape.page_size, WORK.get(spec.op))
    plan = Plan(binding, shape, q, k, v, out, extras)
    return plan.launch(q, k, v, out, return_lse, cu_seqlens_q, cu_seqlens_k, seqused_k, stream, extras, lse)


def _is_lse(lse: torch.Tensor, shape: Shape, q: torch.Tensor) -> bool:
    import torch

    form = (tuple(lse.shape), lse.dtype, lse.device)
    return form == (shape.lse, torch.float32, q.device) and lse.is_contiguous()

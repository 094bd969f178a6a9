# SPDX-License-Identifier: Apache-2.0
"""The calls as torch.library operators, for tracers: torch.compile, torch.export, FakeTensorMode, make_fx.

=========================== ===========================================================================
``fmha::fwd``               ``attention``
``fmha::fwd_varlen``        ``attention_varlen``
``fmha::fwd_kvcache``       ``attention_with_kvcache``, cache_seqlens a tensor
``fmha::NAME_out``          each of the three with ``out=``, here ``into=``: dynamo has rules of its own for "out"
``fmha::merge``             ``merge_states``
=========================== ===========================================================================

The public calls choose an operator by themselves while something traces; an eager call goes past the dispatcher, which
would cost it microseconds. An operator always returns (out, lse), the ``_out`` ones lse; a log-sum-exp that was not
asked for has no elements. All checks of the calls happen when an operator runs; its fake kernel only knows shapes.
``flops.py`` says what torch's FlopCounterMode counts for them.

No operator but merge has a backward: their Autograd kernel refuses inputs that require a gradient, so that a compiled
call cannot detach one silently. Importing this module does nothing; ``define`` does, once per process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedProblem
from ..ops.forward.plan import NO_BACKWARD
from ..problem import kinds
from ..problem.packed_mask import PackedMask
from . import flops

if TYPE_CHECKING:
    import torch

NAMESPACE = "fmha"

_OPTIONS = (
    "Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? mask=None, Tensor? mask_words=None, "
    "Tensor? mask_any=None, SymInt[]? mask_form=None, bool causal=False, SymInt? window_left=None, "
    "SymInt? window_right=None, float? scale=None, float softcap=0.0, SymInt? attention_chunk=None, "
    "bool return_lse=False, str? device=None, str? fallback=None, str? tile=None"
)
_TENSORS = {
    "fwd": "Tensor q, Tensor k, Tensor v, *, Tensor? seqused_k=None",
    "fwd_varlen": (
        "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
        "SymInt max_seqlen_k, *, Tensor? seqused_k=None"
    ),
    "fwd_kvcache": (
        "Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, *, Tensor? page_table=None, "
        "Tensor? cu_seqlens_q=None, SymInt? max_seqlen_q=None"
    ),
}
OPS = tuple(_TENSORS)

_library: Any = None
_lock = threading.Lock()


def define(run: Callable[..., Any], merge: Callable[..., Any]) -> None:
    """Defines the operators. Later calls do nothing.

    Args:
        run: (name without ``_out``, arguments by name, tensor to write or None) -> (out, lse or None): the eager call.
        merge: (outs, lses) -> (out, lse), eagerly.
    """
    global _library
    import torch

    with _lock:
        if _library is not None:
            flops.teach()
            return
        library = torch.library.Library(NAMESPACE, "DEF")
        for name, tensors in _TENSORS.items():
            _define(library, name, f"{name}({tensors}, {_OPTIONS}) -> (Tensor, Tensor)", run)
            written = tensors.replace("*, ", "*, Tensor(a!) into, ")
            _define(library, f"{name}_out", f"{name}_out({written}, {_OPTIONS}) -> Tensor", run)
        library.define("merge(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)")
        for key in ("CPU", "CUDA"):
            library.impl("merge", merge, key)
        torch.library.register_fake(f"{NAMESPACE}::merge", merge, lib=library)
        torch.library.register_autograd(
            f"{NAMESPACE}::merge", _merge_backward, setup_context=_merge_context, lib=library
        )
        flops.register(getattr(torch.ops, NAMESPACE))
        flops.teach()
        _library = library


def _define(library: torch.library.Library, name: str, schema: str, run: Callable[..., Any]) -> None:
    import torch

    library.define(schema)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    names = [argument.name for argument in op._schema.arguments]
    base, in_place = name.removesuffix("_out"), name.endswith("_out")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        written = given.pop("into", None)
        out, lse = run(base, given, written)
        if lse is None:
            lse = out.new_empty(0, dtype=torch.float32)
        return lse if in_place else (out, lse)

    def fake(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        q, v = args[0], args[2]
        lse_shape: tuple[Any, ...] = (0,)
        if given.get("return_lse"):
            lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
        lse = q.new_empty(lse_shape, dtype=torch.float32)
        return lse if in_place else (q.new_empty((*q.shape[:-1], v.shape[-1])), lse)

    def autograd(*args: Any, **kwargs: Any) -> Any:
        kinds.refuse_tangents((*args, *kwargs.values()))
        if torch.is_grad_enabled():
            tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
            if any(x.requires_grad for x in tensors):
                raise UnsupportedProblem(NO_BACKWARD)
        if in_place and not kwargs["into"].is_inference():
            torch.autograd.graph.increment_version(kwargs["into"])
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    for key in ("CPU", "CUDA"):
        library.impl(name, kernel, key)
    library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)


def mask_arguments(mask: PackedMask | torch.Tensor | None) -> dict[str, Any]:
    """A mask as the operators take it."""
    if mask is None:
        return {}
    if not isinstance(mask, PackedMask):
        return {"mask": mask}
    form = [mask.rows, mask.cols, -1 if mask.sequences is None else mask.sequences]
    return {"mask_words": mask.words, "mask_any": mask.any, "mask_form": form}


def mask_of(given: dict[str, Any]) -> PackedMask | torch.Tensor | None:
    """The mask among an operator's arguments, which it takes away: the inverse of ``mask_arguments``."""
    plain, words, some, form = (given.pop(f"mask{part}", None) for part in ("", "_words", "_any", "_form"))
    if words is None:
        return plain
    rows, cols, sequences = form
    return PackedMask(words, some, rows, cols, None if sequences < 0 else sequences)


def _merge_context(ctx: Any, inputs: Any, output: Any) -> None:
    outs, lses = inputs
    out, lse = output
    ctx.parts = len(outs)
    ctx.save_for_backward(*outs, *lses, out, lse)


def _merge_backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[list[Any], list[Any]]:
    """With w_i = exp(lse_i - lse): d out_i = w_i * g_out, d lse_i = w_i * (<g_out, out_i - out> + g_lse)."""
    import torch

    saved, n = ctx.saved_tensors, ctx.parts
    outs, lses, out, lse = saved[:n], saved[n : 2 * n], saved[2 * n].float(), saved[2 * n + 1]
    grad = grad_out.float()
    finite = torch.where(lse.isinf(), 0.0, lse)
    grad_outs, grad_lses = [], []
    for part, own in zip(outs, lses, strict=True):
        weight = torch.exp(own.float() - finite)
        dot = (grad * (part.float() - out)).sum(-1).transpose(-1, -2)
        grad_outs.append((weight.transpose(-1, -2).unsqueeze(-1) * grad).to(part.dtype))
        grad_lses.append((weight * (dot + grad_lse)).to(own.dtype))
    return grad_outs, grad_lses

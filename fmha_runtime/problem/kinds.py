# SPDX-License-Identifier: Apache-2.0
"""Kinds of torch tensors that are not simply memory: wrappers that see operators, views that are negated on reading,
zeros without storage, numbers with a tangent. A call with one of them becomes an operator, which torch's dispatcher
knows how to treat; a kernel would read addresses that say nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import InputError, UnsupportedProblem
from .packed_mask import PackedMask


def traced() -> bool:
    """Whether something sees the operators of all tensors: dynamo, FakeTensorMode, make_fx and other dispatch modes, or
    vmap, grad, jvp, functionalize. calls/route.py asks the same in line, once a call."""
    import torch

    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def are_special(given: Iterable[Any]) -> bool:
    """Whether one of the tensors is of such a kind."""
    import torch

    if torch.autograd.forward_ad._current_level >= 0:
        return True
    plain = torch.Tensor
    for x in given:
        if x is None:
            continue
        if isinstance(x, PackedMask):
            if are_special((x.words, x.any)):
                return True
        elif isinstance(x, plain):
            if type(x) is not plain and sees_operators(x):
                return True
            if x.is_neg() or x._is_zerotensor():
                return True
    return False


def sees_operators(tensor: Any) -> bool:
    """Whether a tensor of this class sees every operator itself: fake tensors, DTensor and the like."""
    import torch

    plain = torch.Tensor.__torch_dispatch__
    return getattr(type(tensor), "__torch_dispatch__", plain) is not plain


def refuse_out(out: Any) -> None:
    """An output that an operator is to write is memory, and nobody wants to have it written elsewhere.

    Raises:
        InputError: it is a negated view, or zeros without storage.
        UnsupportedProblem: torch.func.functionalize, which lets no operator of a library write.
    """
    import torch

    if out.is_neg() or out._is_zerotensor():
        what = "a view that is negated on reading" if out.is_neg() else "a tensor of zeros without storage"
        raise InputError(f"out is {what}; a plain tensor is needed: torch.empty_like(q)")
    functorch = torch._C._functorch
    top = functorch.peek_interpreter_stack()
    if top is not None and top.key() == functorch.TransformType.Functionalize:
        raise UnsupportedProblem("out= inside torch.func.functionalize: leave out= out, it makes a copy in any case")


def refuse_tangents(given: Iterable[Any]) -> None:
    """No tensor carries a tangent of forward-mode differentiation, which would be lost.

    Raises:
        UnsupportedProblem: one does.
    """
    import torch

    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level < 0:
        return
    for x in given:
        if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise UnsupportedProblem(
                "an input carries a tangent (torch.func.jvp, torch.autograd.forward_ad) and no kernel computes the "
                "derivative: use torch's math attention for it, sdpa_kernel(SDPBackend.MATH)"
            )

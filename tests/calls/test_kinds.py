# SPDX-License-Identifier: Apache-2.0
"""Tensors that are not simply memory, in every place of a call: right, or refused by name, never a wrong address."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fmha_runtime as fmha

pytestmark = pytest.mark.emulator

DEVICES = pytest.mark.parametrize("device", [None, "emulator:sm90"])


def tensors():
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, n, h, 64, generator=g).bfloat16() for n, h in ((5, 4), (7, 2), (7, 2)))


def call(device, *given, **options):
    return fmha.attention(*given, device=device, **options)


@DEVICES
@pytest.mark.parametrize("place", [0, 1, 2])
def test_negated_views_are_read_as_torch_reads_them(device, place):
    given = list(tensors())
    want = call(device, *given)
    given[place] = torch._neg_view(-given[place])
    assert torch.equal(call(device, *given), want)


@DEVICES
def test_vmap_and_functionalize_see_an_operator(device):
    q, k, v = tensors()
    want = call(device, q, k, v)
    one = torch.func.vmap(lambda a, b, c: call(device, a[None], b[None], c[None])[0])(q, k, v)
    assert torch.equal(one, want)
    assert torch.equal(torch.func.functionalize(lambda a: call(device, a, k, v))(q), want)
    with pytest.raises(fmha.UnsupportedProblem, match="leave out= out"):
        torch.func.functionalize(lambda a: call(device, a, k, v, out=torch.empty_like(q)))(q)


@DEVICES
def test_derivatives_are_refused(device):
    q, k, v = tensors()
    with pytest.raises(fmha.UnsupportedProblem, match="tangent"):
        torch.func.jvp(lambda a: call(device, a, k, v), (q,), (q,))
    with pytest.raises(fmha.UnsupportedProblem, match="gradient"):
        torch.func.grad(lambda a: call(device, a, k, v).sum())(q)
    with torch.autograd.forward_ad.dual_level():
        for place in range(3):
            given = [q, k, v]
            given[place] = torch.autograd.forward_ad.make_dual(given[place], given[place])
            with pytest.raises(fmha.UnsupportedProblem, match="tangent"):
                call(device, *given)


@DEVICES
@pytest.mark.parametrize("place", ["k", "v", "out", "alibi_slopes", "sinks", "seqused_k"])
def test_a_fake_tensor_anywhere_makes_a_fake_result(device, place):
    q, k, v = tensors()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {
            "k": torch.empty_like(k),
            "v": torch.empty_like(v),
            "out": torch.empty_like(q),
            "alibi_slopes": torch.empty(4),
            "sinks": torch.empty(4),
            "seqused_k": torch.ones(2, dtype=torch.int32),
        }
    given = {"q": q, "k": k, "v": v, place: fakes[place]}
    found = fmha.attention(**given, device=device)
    assert isinstance(found, FakeTensor) and found.shape == q.shape


@DEVICES
def test_an_output_is_memory(device):
    q, k, v = tensors()
    with pytest.raises(fmha.InputError, match="out is a view that is negated"):
        call(device, q, k, v, out=torch._neg_view(torch.empty_like(q)))
    with pytest.raises(fmha.InputError):
        call(device, q, k, v, out=torch._efficientzerotensor(q.shape, dtype=q.dtype))
    with pytest.raises(fmha.InputError, match="contiguous"):
        call(device, q, k, torch._efficientzerotensor(v.shape, dtype=v.dtype))

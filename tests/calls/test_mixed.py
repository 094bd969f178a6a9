# SPDX-License-Identifier: Apache-2.0
"""Batches that prefill and decode at once: the numbers of one call, whatever the split."""

from __future__ import annotations

import pytest
import torch
from helpers.caches import paged

import fmha_runtime as fmha
from fmha_runtime.kernels.spec import Op
from fmha_runtime.ops.forward.plan import Plan

LENGTHS = (900, 1, 40, 130, 70)
QUERIES = (1, 1, 1, 100, 7)


def batch(dense=False):
    g = torch.Generator().manual_seed(2)
    q = torch.randn(sum(QUERIES), 4, 64, generator=g).bfloat16()
    cu = torch.tensor([0, *QUERIES]).cumsum(0).int()
    if dense:
        k, v = (torch.randn(5, 900, 2, 64, generator=g).bfloat16() for _ in range(2))
        return (
            q,
            k,
            v,
            {"cache_seqlens": torch.tensor(LENGTHS, dtype=torch.int32), "cu_seqlens_q": cu, "max_seqlen_q": 100},
        )
    k, v, table, lengths = paged(LENGTHS, 16, 2, 64)
    return q, k, v, {"cache_seqlens": lengths, "page_table": table, "cu_seqlens_q": cu, "max_seqlen_q": 100}


@pytest.mark.parametrize("device", [None, pytest.param("emulator:sm90", marks=pytest.mark.emulator)])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("decodes", [1, 3])
def test_the_numbers_are_those_of_one_call(device, dense, decodes):
    q, k, v, call = batch(dense)
    call |= {
        "causal": True,
        "return_lse": True,
        "device": device,
        "alibi_slopes": torch.rand(5, 4),
        "window": (60, None),
    }
    want, want_lse = fmha.attention_with_kvcache(q, k, v, **call)
    out = torch.empty_like(q)
    got, lse = fmha.attention_with_kvcache(q, k, v, num_decodes=decodes, out=out, **call)
    assert got is out
    assert (got.float() - want.float()).norm() <= 4e-3 * want.float().norm()
    assert (lse - want_lse).abs().max() < 1e-3
    plain = fmha.attention_with_kvcache(q, k, v, num_decodes=decodes, **{**call, "return_lse": False})
    assert torch.equal(plain, got)


@pytest.mark.emulator
def test_each_part_has_its_kernel(monkeypatch):
    launched = []
    before = Plan.launch
    monkeypatch.setattr(Plan, "launch", lambda self, *given: (launched.append(self.spec.op), before(self, *given))[1])
    q, k, v, call = batch()
    fmha.attention_with_kvcache(q, k, v, num_decodes=3, **call, device="emulator:sm90")
    assert launched == [Op.FWD, Op.DECODE]
    launched.clear()
    only = {**call, "cu_seqlens_q": call["cu_seqlens_q"][:4], "max_seqlen_q": 100}
    only |= {name: call[name][:3] for name in ("cache_seqlens", "page_table")}
    fmha.attention_with_kvcache(q[:3], k, v, num_decodes=3, **only, device="emulator:sm90")
    assert launched == [Op.DECODE]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_decodes": 6}, "num_decodes is 6; 0 to 5"),
        ({"num_decodes": -1}, "num_decodes is -1; 0 to 5"),
        ({"num_decodes": True}, "num_decodes is True"),
        ({"num_decodes": 2.0}, r"num_decodes is 2\.0"),
        ({"num_decodes": 2, "cu_seqlens_q": None}, "without cu_seqlens_q"),
        ({"num_decodes": 2, "mask": torch.ones(110, 900) > 0}, "cannot be cut"),
    ],
    ids=lambda x: None if isinstance(x, str) else "+".join(x),
)
def test_bad_input_is_named(change, message):
    q, k, v, call = batch()
    with pytest.raises((fmha.InputError, fmha.UnsupportedProblem), match=message):
        fmha.attention_with_kvcache(q, k, v, **{**call, **change})

# SPDX-License-Identifier: Apache-2.0
"""Inputs and limits of tests that compare numbers, each once. The limits are those of `fmha verify`."""

from __future__ import annotations

import torch

from fmha_runtime.kernels.spec import DType
from fmha_runtime.ops.forward.check import LSE_LIMIT, REL_L2_LIMIT

REL_L2 = {torch.bfloat16: REL_L2_LIMIT[DType.BF16], torch.float16: REL_L2_LIMIT[DType.FP16]}
"""The largest relative L2 error of a kernel's output, by its dtype."""


def qkv(b, sq, sk, h, hk, d, dv=None, *, dtype=torch.bfloat16, seed=0):
    """q [b, sq, h, d], k [b, sk, hk, d], v [b, sk, hk, dv or d], standard normal."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((b, sq, h, d), (b, sk, hk, d), (b, sk, hk, dv or d))
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def close(out, lse, ref, ref_lse):
    """Asserts that these are the numbers of a good kernel; rows that see nothing are exactly 0 and -inf."""
    assert (out.double() - ref).norm() <= REL_L2[out.dtype] * ref.norm()
    empty = ref_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert not lse.isnan().any() and not ((lse.double() - ref_lse)[~empty].abs() >= LSE_LIMIT).any()
    assert (out.transpose(-3, -2)[empty] == 0).all()

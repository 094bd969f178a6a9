# SPDX-License-Identifier: Apache-2.0
"""What the tests of the look-alikes share: FlashAttention's maths, batches, pages, when numbers agree."""

from __future__ import annotations

import itertools

import pytest
import torch

BF16, INT = torch.bfloat16, torch.int32
CPU_AND_GPU = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def one(q, k, v, *, causal=False, window=(-1, -1), scale=None, softcap=0.0, slopes=None, chunk=0):
    """Attention of one sequence in fp64, written after FlashAttention's documentation: q [Sq, H, D], k [Sk, Hk, D]."""
    q, k, v = q.double(), k.double(), v.double()
    sq, heads, d = q.shape
    sk = k.shape[0]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    score = torch.einsum("ihd,jhd->hij", q, k) * (d**-0.5 if scale is None else scale)
    if softcap:
        score = softcap * (score / softcap).tanh()
    i = torch.arange(sq, device=q.device)[:, None] + sk - sq
    j = torch.arange(sk, device=q.device)[None]
    if slopes is not None:
        score = score - slopes.double()[:, None, None] * (i - j).abs()
    hidden = torch.zeros(sq, sk, dtype=torch.bool, device=q.device)
    if window[0] >= 0:
        hidden |= j < i - window[0]
    if window[1] >= 0:
        hidden |= j > i + window[1]
    if causal:
        hidden |= j > i
    if chunk:
        hidden |= j // chunk != i.div(chunk, rounding_mode="floor")
    score = score.masked_fill(hidden, float("-inf"))
    lse = score.logsumexp(-1)
    weight = (score - lse.masked_fill(lse.isinf(), 0)[..., None]).exp()
    return torch.einsum("hij,jhd->ihd", weight, v), lse


def batched(q, k, v, slopes=None, **options):
    """Of a batch, or of lists of sequences."""
    each = [
        one(*x, slopes=None if slopes is None else slopes if slopes.ndim == 1 else slopes[b], **options)
        for b, x in enumerate(zip(q, k, v, strict=True))
    ]
    return [out for out, _ in each], [lse for _, lse in each]


def close(got, want):
    want = torch.stack(want) if isinstance(want, list) else want
    assert got.shape == want.shape
    assert torch.equal(got.isinf(), want.isinf())
    got, want = got.double().nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0)
    assert (got - want).norm() <= 4e-3 * want.norm() + 1e-6


def tensors(device, b=2, sq=37, sk=53, h=4, hk=2, d=64, dv=None):
    g = torch.Generator().manual_seed(b * sq + sk)
    shapes = (b, sq, h, d), (b, sk, hk, d), (b, sk, hk, dv or d)
    return [torch.randn(s, generator=g).to(device, BF16) for s in shapes]


def split(x, cu):
    return [x[a:b] for a, b in itertools.pairwise(cu)]


def pool(x, page, device):
    """Pages of [B, S, Hk, D] in an order of their own, and the table."""
    b, s, heads, d = x.shape
    parts = s // page
    order = torch.randperm(b * parts + 2, generator=torch.Generator().manual_seed(3))[: b * parts].to(device)
    pages = torch.full((b * parts + 2, page, heads, d), float("nan"), device=device, dtype=x.dtype)
    pages[order] = x.reshape(b * parts, page, heads, d)
    return pages, order.view(b, parts).to(INT)


def ints(*values, device="cpu"):
    return torch.tensor(values, dtype=INT, device=device)

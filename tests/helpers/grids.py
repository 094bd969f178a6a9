# SPDX-License-Identifier: Apache-2.0
"""Helpers of the tests on published grids: a batch of ragged sequences in every layout that the grids have.

The grids are those of TensorRT-LLM's fmha_test.py and of FlashInfer's fmha_v2 tests; their thresholds are 1e-2 to 3e-2
per element. Ours is the number rule of docs/semantics.md against an fp64 reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

import fmha_runtime as fmha
from fmha_runtime.ops.forward import reference
from fmha_runtime.ops.forward.check import LSE_LIMIT
from helpers.numbers import REL_L2

LAYOUTS = ("packed", "contiguous", "separate", "paged 32", "paged 128", "paged 32 HND", "paged 128 HND")


@dataclass
class Batch:
    """Sequences one after the other: q [Tq, H, D], k and v [Tk, Hk, D or Dv], with NaN in no place."""

    q: Any
    k: Any
    v: Any
    lens_q: list[int]
    lens_k: list[int]

    @property
    def cu_q(self) -> Any:
        return offsets(self.lens_q, self.q.device)

    @property
    def cu_k(self) -> Any:
        return offsets(self.lens_k, self.q.device)


def offsets(lens: list[int], device: Any) -> Any:
    return torch.tensor([sum(lens[:i]) for i in range(len(lens) + 1)], dtype=torch.int32, device=device)


def make(
    device: str,
    dtype: Any,
    dims: tuple[int, int],
    heads: int,
    kv_heads: int,
    lens_k: list[int],
    lens_q: list[int] | None = None,
    seed: int = 42,
) -> Batch:
    """Standard normal tensors."""
    lens_q = lens_q or lens_k
    g = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, n: int, d: int) -> Any:
        return torch.randn(rows, n, d, generator=g, device=device).to(dtype)

    q, k = normal(sum(lens_q), heads, dims[0]), normal(sum(lens_k), kv_heads, dims[0])
    return Batch(q, k, normal(sum(lens_k), kv_heads, dims[1]), lens_q, lens_k)


def ragged(batch: int, shortest: int, longest: int, seed: int = 1234) -> list[int]:
    """Lengths, one of them the longest."""
    g = torch.Generator().manual_seed(seed)
    return [longest, *torch.randint(shortest, longest + 1, (batch - 1,), generator=g).tolist()]


def run(x: Batch, layout: str, device: str | None = None, **options: Any) -> Any:
    """(out, lse) of this library with the batch laid out as asked. ``device="emulator"`` for CPU tensors."""
    longest = {"max_seqlen_q": max(x.lens_q), "return_lse": True, "device": device}
    if layout.startswith("paged"):
        k, v, table = pages(x, int(layout.split()[1]), layout.endswith("HND"))
        used = torch.tensor(x.lens_k, dtype=torch.int32, device=x.q.device)
        return fmha.attention_with_kvcache(
            x.q, k, v, cache_seqlens=used, page_table=table, cu_seqlens_q=x.cu_q, **longest, **options
        )
    q, k, v = x.q, x.k, x.v
    if layout == "packed":  # one projection of all three
        sizes = [t.shape[1] * t.shape[2] for t in (q, k, v)]
        parts = torch.cat([t.flatten(1) for t in (q, k, v)], 1).split(sizes, 1)
        q, k, v = (part.unflatten(1, t.shape[1:]) for part, t in zip(parts, (q, k, v), strict=True))
    elif layout == "contiguous":  # keys beside values
        sizes = [t.shape[1] * t.shape[2] for t in (k, v)]
        parts = torch.cat([t.flatten(1) for t in (k, v)], 1).split(sizes, 1)
        k, v = (part.unflatten(1, t.shape[1:]) for part, t in zip(parts, (k, v), strict=True))
    return fmha.attention_varlen(q, k, v, x.cu_q, x.cu_k, max_seqlen_k=max(x.lens_k), **longest, **options)


def pages(x: Batch, size: int, hnd: bool) -> tuple[Any, Any, Any]:
    """Pools of pages in random order and the table; page tails and free pages are NaN, unused entries no pages."""
    counts = [-(-n // size) for n in x.lens_k]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(7))
    table = torch.full((len(counts), max(counts)), 1 << 30, dtype=torch.int32)
    pools = []
    for t in (x.k, x.v):
        shape = (len(order), t.shape[1], size, t.shape[2]) if hnd else (len(order), size, *t.shape[1:])
        pool = t.new_full(shape, math.nan)
        pool = pool.transpose(1, 2) if hnd else pool
        first, row = 0, 0
        for b, (n, count) in enumerate(zip(x.lens_k, counts, strict=True)):
            own = order[first : first + count]
            table[b, :count] = own.int()
            rows = t.new_full((count * size, *t.shape[1:]), math.nan)
            rows[:n] = t[row : row + n]
            pool[own.to(t.device)] = rows.unflatten(0, (count, size))
            first, row = first + count, row + n
        pools.append(pool)
    return pools[0], pools[1], table.to(x.q.device)


def hold(x: Batch, layout: str, device: str | None = None, **options: Any) -> None:
    """Run and hold the result to the number rule."""
    out, lse = run(x, layout, device, **options)
    what = f"{layout} {options}"
    ref, ref_lse = reference.attention_varlen(x.q, x.k, x.v, x.cu_q, x.cu_k, **options)
    base, _ = reference.baseline_varlen(x.q, x.k, x.v, x.cu_q, x.cu_k, **options)
    assert out.dtype == x.q.dtype and out.shape == (*x.q.shape[:2], x.v.shape[2]), what
    error = (out.double() - ref).abs()
    noise = ((ref.to(out.dtype) + 0.3 - 0.3) - ref.to(out.dtype)).abs().max()
    allowed = 2 * (base.double() - ref).abs().max() + 2 * noise
    assert float(error.nan_to_num(nan=math.inf).max()) <= float(allowed), what
    relative = float(error.norm() / ref.norm())
    assert relative <= REL_L2[out.dtype], f"{what}: relative L2 {relative:.2e}"
    empty = ref_lse == -math.inf
    assert torch.equal(empty, lse == -math.inf), what
    assert bool((out.transpose(0, 1)[empty] == 0).all()), what
    assert float((lse.double() - ref_lse).masked_fill(empty, 0.0).abs().max()) <= LSE_LIMIT, what

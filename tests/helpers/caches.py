# SPDX-License-Identifier: Apache-2.0
"""Paged caches in every layout that engines use, poisoned where no sequence is."""

from __future__ import annotations

import torch

LAYOUTS = ("nhd", "hnd", "joint", "sliced")
GARBAGE = (-1, 1 << 30, -(1 << 31), 7_777_777)


def pools(layout, pages, page, heads, d, dv, dtype):
    """K and V pools as views [pages, page, heads, dim], all NaN."""
    nan = float("nan")
    if layout == "joint":  # FlashInfer: [pages, 2, page, heads, dim]
        both = torch.full((pages, 2, page, heads, max(d, dv)), nan, dtype=dtype)
        return both[:, 0, ..., :d], both[:, 1, ..., :dv]
    if layout == "hnd":
        return tuple(torch.full((pages, heads, page, x), nan, dtype=dtype).transpose(1, 2) for x in (d, dv))
    more = 3 if layout == "sliced" else 0
    return tuple(
        torch.full((pages, page, heads + more, x + 8 * more), nan, dtype=dtype)[:, :, more:, :x] for x in (d, dv)
    )


def paged(lengths, page, heads, d, *, dv=None, layout="nhd", dtype=torch.bfloat16, seed=0):
    """A cache whose pages lie in random order; whatever no sequence owns is NaN or garbage."""
    g = torch.Generator().manual_seed(seed)
    need = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(need) + 3, generator=g)
    k, v = pools(layout, sum(need) + 3, page, heads, d, dv or d, dtype)
    width = max([*need, 1]) + 1
    table = torch.tensor(GARBAGE * width)[:width].repeat(len(lengths), 1).to(torch.int32)
    used = 0
    for b, n in enumerate(lengths):
        table[b, : need[b]] = order[used : used + need[b]].int()
        for j in range(n):
            at = int(table[b, j // page]), j % page
            k[at] = torch.randn(k[at].shape, generator=g).to(dtype)
            v[at] = torch.randn(v[at].shape, generator=g).to(dtype)
        used += need[b]
    return k, v, table, torch.tensor(lengths, dtype=torch.int32)


def queries(b, sq, h, d, dtype=torch.bfloat16):
    return torch.randn(b, sq, h, d, generator=torch.Generator().manual_seed(9)).to(dtype)

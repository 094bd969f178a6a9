# SPDX-License-Identifier: Apache-2.0
"""torch's flex_attention as a peer: what torch.compile makes of it is a Triton kernel, so this is the Triton to beat.

Masks become a block mask, so that hidden blocks are skipped; softcap and ALiBi become a function of the score. Both
are made before the clock starts, as for lengths that stay: the time and the memory of making them are not counted.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from .cells import Cell, Inputs
from .libraries import only
from .provider import Peer, Runnable

MODULE = "torch.nn.attention.flex_attention"
_Mod = Callable[..., Any]


def peer() -> Peer:
    """flex_attention, compiled with torch's own choice of tiles."""
    return Peer("flex", MODULE, make, "torch's flex_attention, compiled (Triton)")


def make(cell: Cell, x: Inputs) -> Runnable:
    """It on the tensors of a cell.

    Raises:
        Absent: the cell has pages or lengths, which it has no arguments for.
    """
    only("flex_attention", cell, "softcap", "ALiBi", "window", "packed mask", "GQA", "two head dims")
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
    options: dict[str, Any] = {"score_mod": score_mod(cell, x), "block_mask": None}
    mask = mask_mod(cell, x)
    if mask is not None:
        flex = importlib.import_module(MODULE)
        lengths = {"Q_LEN": cell.seqlen_q, "KV_LEN": cell.seqlen}
        options["block_mask"] = flex.create_block_mask(mask, B=None, H=None, **lengths, device=str(x.q.device))
    if cell.heads != cell.heads_k:
        options["enable_gqa"] = True
    return Runnable(partial(_compiled(), q, k, v, **options), output=lambda out: out.transpose(1, 2))


def mask_mod(cell: Cell, x: Inputs) -> _Mod | None:
    """Which keys a query sees, as flex_attention asks: of (batch, head, query, key); None: all of them."""
    if x.bits is not None:
        bits = x.bits
        return lambda b, h, i, j: bits[i, j]
    left, right = cell.window or (None, None)
    if cell.causal:
        right = 0
    if left is None and right is None:
        return None
    offset = cell.seqlen - cell.seqlen_q  # the last query sits at the last key
    if left is None:
        return lambda b, h, i, j: j <= i + offset + right
    if right is None:
        return lambda b, h, i, j: j >= i + offset - left
    return lambda b, h, i, j: (j <= i + offset + right) & (j >= i + offset - left)


def score_mod(cell: Cell, x: Inputs) -> _Mod | None:
    """What becomes of a score that is scaled already; None: nothing."""
    import torch

    if cell.softcap:
        cap = cell.softcap
        return lambda score, b, h, i, j: cap * torch.tanh(score / cap)
    if x.slopes is not None:
        slopes, offset = x.slopes, cell.seqlen - cell.seqlen_q
        return lambda score, b, h, i, j: score - slopes[h] * (i + offset - j).abs()
    return None


def _compiled() -> _Mod:
    """The compiled function, for one cell.

    Every cell starts with an empty compiler: beyond a number of shapes and masks dynamo would run the uncompiled
    function without a word, which writes out every score. ``fullgraph`` makes that an error.
    """
    import torch

    torch.compiler.reset()
    compiled: _Mod = torch.compile(importlib.import_module(MODULE).flex_attention, dynamic=False, fullgraph=True)
    return compiled

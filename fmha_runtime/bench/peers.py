# SPDX-License-Identifier: Apache-2.0
"""The others: the attention backends of torch, and every attention library that can be imported.

An adapter turns a cell and its tensors into a call, or raises ``Absent`` with the reason. Nothing is imported before
``find`` looks for it. The libraries' adapters are in libraries.py, that of flex_attention in flex.py.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import flex
from . import libraries as bench_libraries
from .cells import Cell, Inputs
from .provider import Absent, Peer, Runnable, reason

if TYPE_CHECKING:
    from torch import Tensor

SDPA = ("cudnn", "flash", "efficient", "math")
MATH_LENGTH = 2048
"""Longest sequence for torch's math backend, which writes out every score; the length grid goes as far as memory."""
_SCORES = 3
"""How often the math backend holds the scores in fp32, at most: before and after the softmax, and a mask."""


def peers() -> dict[str, Peer]:
    """Everyone there is an adapter for, installed or not."""
    torchs = [Peer(name, "torch", partial(_torch, name), f"torch's SDPA, {name} backend") for name in SDPA]
    return {peer.name: peer for peer in (*torchs, flex.peer(), *bench_libraries.peers())}


def find(words: Iterable[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Who of ``words`` can be imported, and for the others why not.

    Args:
        words: names of peers, "sdpa" for torch's backends, "all" for everyone.

    Raises:
        InputError: a word that is none of these.
    """
    known = peers()
    wanted: dict[str, None] = {}
    for word in words:
        names = {"sdpa": SDPA, "all": tuple(known)}.get(word, (word,))
        wanted.update(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise InputError(f"peer {unknown[0]!r} is unknown; there are sdpa, all, {', '.join(known)}")
    found, missing = [], {}
    for name in wanted:
        try:
            importlib.import_module(known[name].module)
            found.append(name)
        except Exception as error:  # a library for another CUDA or torch fails in ways of its own
            missing[name] = f"cannot import {known[name].module}: {reason(error)}"
    return tuple(found), missing


def prepare(name: str, cell: Cell, x: Inputs) -> Runnable:
    """A peer on the tensors of a cell.

    Raises:
        Absent: it does not run this.
    """
    return peers()[name].make(cell, x)


def _torch(name: str, cell: Cell, x: Inputs) -> Runnable:
    """A backend of torch's SDPA on the same memory, seen as [batch, heads, seq, dim]."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    backend = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }[name]
    if cell.softcap:
        raise Absent("torch's SDPA has no softcap")
    if cell.page_size:
        raise Absent("torch's SDPA reads no paged K and V")
    if cell.keys:
        raise Absent("torch's SDPA has one length for all sequences")
    if cell.window is not None or cell.lengths:
        if name == "flash":
            return _torch_flash(cell, x)
        what = "sliding window (other than as a mask tensor)" if cell.window is not None else "varlen batches"
        raise Absent(f"torch's SDPA has no {what} for this backend")
    if name == "flash" and (cell.alibi or cell.packed):
        raise Absent("torch's flash backend takes no mask tensor")
    if name == "math":
        _check_scores(cell, x)
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
    options: dict[str, Any] = {"is_causal": cell.causal}
    if cell.heads != cell.heads_k:
        options["enable_gqa"] = True
    if cell.alibi:
        options = {**options, "is_causal": False, "attn_mask": alibi_bias(cell, x)}
    if x.bits is not None:
        options = {**options, "is_causal": False, "attn_mask": x.bits[None, None]}

    def call() -> Tensor:
        return scaled_dot_product_attention(q, k, v, **options)

    with warnings.catch_warnings(record=True) as notes, sdpa_kernel([backend]):
        warnings.simplefilter("always")
        try:
            call()
        except RuntimeError as error:
            reasons = [str(note.message).split(" (Triggered")[0].strip() for note in notes]
            raise Absent("; ".join(reasons) or reason(error)) from error
    return Runnable(call, lambda: sdpa_kernel([backend]), output=lambda out: out.transpose(1, 2))


def _check_scores(cell: Cell, x: Inputs) -> None:
    """Refuse the math backend where its scores are too many: a fixed length, or in the length grid the free memory.

    Raises:
        Absent: they are.
    """
    if not cell.sequences:
        if cell.seqlen > MATH_LENGTH:
            raise Absent(f"it writes out every score: measured up to {MATH_LENGTH} tokens")
        return
    needed = _SCORES * 4 * cell.batch * cell.heads * cell.seqlen_q * cell.seqlen
    free = _free_bytes(x)
    if free is not None and needed > free:
        gib = 2**30
        raise Absent(f"it writes out every score: up to {needed / gib:.0f} GiB, {free / gib:.0f} GiB are free")


def _free_bytes(x: Inputs) -> int | None:
    """What torch can still get on the device of the inputs; None on the CPU, which is not limited here."""
    import torch

    if not x.q.is_cuda:
        return None
    kept = torch.cuda.memory_reserved(x.q.device) - torch.cuda.memory_allocated(x.q.device)
    return int(torch.cuda.mem_get_info(x.q.device)[0]) + kept


def _torch_flash(cell: Cell, x: Inputs) -> Runnable:
    """The operator beneath torch's flash backend, which takes windows and lengths that SDPA has no words for."""
    import torch

    left, right = (-1 if side is None else side for side in cell.window or (None, None))
    longest = max(cell.lengths) if cell.lengths else cell.seqlen
    call = partial(
        torch.ops.aten._flash_attention_forward,
        *(x.q, x.k, x.v, x.cu_seqlens, x.cu_seqlens, longest, longest, 0.0, cell.causal, False),
        window_size_left=left,
        window_size_right=0 if cell.causal else right,
    )
    return Runnable(call, output=lambda result: result[0])


def alibi_bias(cell: Cell, x: Inputs) -> Tensor:
    """ALiBi as the mask tensor that SDPA takes: [1, H, Sq, Sk] in the dtype of q, minus infinity where causal hides."""
    import torch

    assert x.slopes is not None
    rows = torch.arange(cell.seqlen - cell.seqlen_q, cell.seqlen, device=x.q.device)
    distance = (rows[:, None] - torch.arange(cell.seqlen, device=x.q.device)).float()
    bias = torch.empty(1, cell.heads, *distance.shape, dtype=x.q.dtype, device=x.q.device)
    for head in range(cell.heads):  # one head at a time: in fp32 all of them would be 4 GiB at 8k
        row = -x.slopes[head] * distance.abs()
        bias[0, head] = row.masked_fill_(distance < 0, float("-inf")) if cell.causal else row
    return bias

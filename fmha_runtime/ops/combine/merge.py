# SPDX-License-Identifier: Apache-2.0
"""Attention over a union of keys from attention over its parts: what ``merge_states`` checks and computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import InputError

if TYPE_CHECKING:
    import torch


def check(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> None:
    """Raises InputError: no parts, different numbers of outs and lses, or shapes that do not match."""
    if len(outs) == 0 or len(outs) != len(lses):
        raise InputError(f"merge_states got {len(outs)} outs and {len(lses)} lses; at least one of each, equally many")
    shape = outs[0].shape
    rows = (*shape[:-3], shape[-2], shape[-3])
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != shape or tuple(lse.shape) != rows:
            raise InputError(
                f"part {i} has out {tuple(out.shape)} and lse {tuple(lse.shape)}; {tuple(shape)} and {rows} are needed"
            )


def merge(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """``merge_states`` of tensors that were checked."""
    import torch

    stacked = torch.stack([lse.float() for lse in lses])
    total = torch.logsumexp(stacked, dim=0)
    weights = torch.exp(stacked - torch.where(total.isinf(), 0.0, total))
    merged = sum(w.transpose(-1, -2).unsqueeze(-1) * out.float() for w, out in zip(weights, outs, strict=True))
    return torch.as_tensor(merged).to(outs[0].dtype), total

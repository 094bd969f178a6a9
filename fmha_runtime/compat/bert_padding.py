# SPDX-License-Identifier: Apache-2.0
"""``flash_attn.bert_padding`` of FlashAttention 2.8: between padded batches and packed tokens, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def index_first_axis(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows ``indices`` of x."""
    return x[indices]


def index_put_first_axis(values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int) -> torch.Tensor:
    """Zeros [first_axis_dim, ...] with ``values`` at rows ``indices``."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def unpad_input(hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: Any = None) -> tuple[Any, ...]:
    """Packs the tokens of [batch, seq, ...] whose mask [batch, seq] is not 0. Waits for the device.

    Args:
        unused_mask: further tokens to keep that do not count as used.

    Returns:
        (tokens [T, ...], their indices [T] in the flattened batch, cu_seqlens int32 [batch + 1], the longest sequence,
        used tokens of each sequence int32 [batch]).
    """
    import torch

    keep = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = keep.sum(-1, dtype=torch.int32)
    indices = keep.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    used = attention_mask.sum(-1, dtype=torch.int32)
    return hidden_states.flatten(0, 1)[indices], indices, cu_seqlens, int(lengths.max()), used


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """The inverse: [batch, seqlen, ...] with zeros where no token was."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))

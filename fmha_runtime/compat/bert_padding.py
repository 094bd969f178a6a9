# SPDX-License-Identifier: Apache-2.0
"""``flash_attn.bert_padding`` of FlashAttention 2.8: between padded batches and packed tokens, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    import torch

FUNCTIONS = (
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
)


def __getattr__(name: str) -> Any:
    """``rearrange`` and ``repeat`` are einops' own; code imports them from flash_attn's module, which uses them."""
    if name not in ("rearrange", "repeat"):
        raise AttributeError(f"flash_attn.bert_padding has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("einops"), name)


def index_first_axis(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows ``indices`` of x."""
    return x[indices]


def index_first_axis_residual(x: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``indices`` of x, and x."""
    return x[indices], x


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
    used = attention_mask.sum(-1, dtype=torch.int32)
    return *_packed(hidden_states, keep, lengths), used


def unpad_input_for_concatenated_sequences(
    hidden_states: torch.Tensor, attention_mask_in_length: torch.Tensor
) -> tuple[Any, ...]:
    """Packs rows [batch, seq, ...] that hold several short sequences each, one behind the other. Waits for the device.

    Args:
        attention_mask_in_length: int [batch, seq]; each row starts with the lengths of its sequences, and 0 stands for
            none: [3, 2, 0, 0, 0, 0] is a sequence of 3 tokens, one of 2, and a token that is padding.

    Returns:
        (tokens [T, ...], their indices [T] in the flattened batch, cu_seqlens int32 [sequences + 1], the longest
        sequence).

    Raises:
        InputError: a row with more tokens than it has places, or a negative length.
    """
    import torch

    parts = attention_mask_in_length
    seqlen = parts.shape[-1]
    total = parts.sum(-1, keepdim=True)
    wrong = (total > seqlen) | (parts < 0).any(-1, keepdim=True)
    if wrong.any():
        row = int(wrong.flatten().int().argmax())
        raise InputError(
            f"attention_mask_in_length[{row}] is {parts[row].tolist()}; the lengths of the sequences of a row are "
            f"needed, none negative and together at most its {seqlen} tokens"
        )
    keep = torch.arange(seqlen, device=parts.device) < total
    return _packed(hidden_states, keep, parts[parts != 0].to(torch.int32))


def _packed(hidden_states: torch.Tensor, keep: torch.Tensor, lengths: torch.Tensor) -> tuple[Any, ...]:
    """(tokens, their indices, cu_seqlens, the longest sequence) of the tokens to keep and the lengths they make."""
    import torch

    indices = keep.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return hidden_states.flatten(0, 1)[indices], indices, cu_seqlens, longest


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """The inverse: [batch, seqlen, ...] with zeros where no token was."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))

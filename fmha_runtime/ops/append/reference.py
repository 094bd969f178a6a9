# SPDX-License-Identifier: Apache-2.0
"""New keys and values into caches, in plain torch: for the CPU, for what the kernel cannot copy, and to check it by."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def slots_of(
    tokens: tuple[int, ...],
    lengths: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    table: torch.Tensor | None,
    pages: int,
    page_size: int,
) -> torch.Tensor:
    """Where tokens go that follow each other behind the keys of their sequence: page * page_size + row, -1 for nowhere.

    Args:
        tokens: (sequences, tokens of each), or (tokens,) with ``cu_seqlens``.
        lengths: int32 [sequences], keys that are there.
        table: int32 [sequences, ..]; None: a sequence has the page of its own number.

    Returns:
        int64 [all tokens].
    """
    import torch

    device = lengths.device
    if cu_seqlens is None:
        sequence = torch.arange(tokens[0], device=device).repeat_interleave(tokens[1])
        index = torch.arange(tokens[1], device=device).repeat(tokens[0])
        owned = torch.ones_like(sequence, dtype=torch.bool)
    else:
        token = torch.arange(tokens[0], device=device)
        sequence = torch.searchsorted(cu_seqlens[1:].long(), token, right=True)
        owned = sequence < lengths.shape[0]
        sequence = sequence.clamp(max=max(0, lengths.shape[0] - 1))
        index = token - cu_seqlens.long()[sequence]
    position = lengths.long()[sequence] + index
    room = page_size * (1 if table is None else table.shape[1])
    inside = owned & (position >= 0) & (position < room)
    position = torch.where(inside, position, 0)
    page = sequence if table is None else table.long()[sequence, position // page_size]
    inside = inside & (page >= 0) & (page < pages)
    return torch.where(inside, page * page_size + position % page_size, -1)


def write(
    caches: tuple[torch.Tensor, torch.Tensor], new: tuple[torch.Tensor, torch.Tensor], slots: torch.Tensor
) -> None:
    """Copies K and V to their slots. Nothing waits for the device.

    Args:
        caches: [pages, page_size, Hk, D] and [.., Dv].
        new: [tokens, Hk, D] and [.., Dv].
        slots: int64 [tokens]; what is no slot of the cache is nowhere.
    """
    import torch

    if slots.numel() == 0:
        return
    pages, page_size = caches[0].shape[:2]
    valid = (slots >= 0) & (slots < pages * page_size)
    # A token that goes nowhere repeats the first that goes somewhere: same place, same numbers, so that the order of
    # the writes does not matter. Where there is none, what is there is written back.
    first = valid.to(torch.uint8).argmax()
    pick = torch.where(valid, torch.arange(slots.shape[0], device=slots.device), first)
    some = valid.any()
    place = torch.where(some, slots[pick], 0)
    row, at = place // page_size, place % page_size
    for cache, x in zip(caches, new, strict=True):
        cache[row, at] = torch.where(some, x[pick], cache[row, at])

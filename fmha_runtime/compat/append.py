# SPDX-License-Identifier: Apache-2.0
"""Lengths of a cache, and new keys and values into it: tokens without a place in the cache go nowhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..ops.append.appender import append_kv
from . import shared

if TYPE_CHECKING:
    import torch


def capacity(k_cache: torch.Tensor, table: torch.Tensor | None) -> int:
    """How many keys a sequence can have in this cache."""
    return k_cache.shape[1] if table is None else k_cache.shape[1] * table.shape[1]


def check_index(name: str, given: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """A tensor of places or lengths.

    Raises:
        InputError: it is none, or of another dtype, shape or device than it must be.
    """
    import torch

    if given is None:
        return
    if not isinstance(given, torch.Tensor):
        raise InputError(f"{name} is a {type(given).__name__}; an int32 tensor {list(shape)} is needed")
    if given.dtype != torch.int32 or given.shape != shape or given.device != device:
        raise InputError(
            f"{name} is {given.dtype} {list(given.shape)} on {given.device}; torch.int32 {list(shape)} on {device} is "
            "needed"
        )


def lengths(given: torch.Tensor | int | None, batch: int, room: int, device: torch.device) -> torch.Tensor:
    """cache_seqlens as int32 [batch]; None: all rows are full.

    Raises:
        InputError: another kind of tensor, or an int that is no length.
    """
    import torch

    if isinstance(given, torch.Tensor):
        check_index("cache_seqlens", given, (batch,), device)
        return given.contiguous()
    length = room if given is None else shared.integer("cache_seqlens", given)
    if not 0 <= length <= room:
        raise _too_long(str(length), 0, room)
    return torch.full((batch,), length, dtype=torch.int32, device=device)


def fits(given: Any, found: torch.Tensor, new: int | torch.Tensor, room: int) -> bool:
    """Whether the host knows that the keys in the cache and the new ones have room; False: it does not know.

    Args:
        given: cache_seqlens as it was given, ``found`` as ``lengths`` returns it.
        new: new keys of every sequence, or int32 [batch].

    Raises:
        InputError: it knows that they have none.
    """
    import torch

    if isinstance(new, int) and not isinstance(given, torch.Tensor):
        if given is not None and given + new > room:
            raise _too_long(str(given), new, room)
        return True
    if not shared.readable(found, None if isinstance(new, int) else new):
        return False
    more = [new] * len(found) if isinstance(new, int) else new.tolist()
    for b, (length, added) in enumerate(zip(found.tolist(), more, strict=True)):
        if length < 0 or added < 0 or length + added > room:
            raise _too_long(f"{length} of sequence {b}", added, room)
    return True


def _too_long(length: str, new: int, room: int) -> InputError:
    more = f", and {new} new keys go behind them" if new else ""
    return InputError(
        f"cache_seqlens is {length}{more}; this cache has room for 0 to {room} keys of a sequence: make it longer "
        "(with pages, give the table more columns), or pass fewer"
    )


def write(
    caches: tuple[torch.Tensor, torch.Tensor], new: tuple[torch.Tensor, torch.Tensor], row: torch.Tensor,
    place: torch.Tensor, valid: torch.Tensor | None,
) -> None:  # fmt: skip
    """``cache[row, place] = new`` for K and V where ``valid``; None: everywhere. Nothing waits for the device.

    Args:
        new: [..., Hk, D] with the leading axes of ``row`` and ``place``.
    """
    import torch

    slots = row * caches[0].shape[1] + place
    if valid is not None:
        slots = torch.where(valid, slots, -1)
    slots = slots.broadcast_to(new[0].shape[:-2]).flatten().contiguous()
    append_kv(new[0].flatten(0, -3), new[1].flatten(0, -3), *caches, slot_mapping=slots)

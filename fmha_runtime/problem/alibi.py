# SPDX-License-Identifier: Apache-2.0
"""The slopes of ALiBi ("Train Short, Test Long", Press et al. 2022), for any number of heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    import torch


def slope_list(heads: int) -> list[float]:
    """The standard slopes as Python floats.

    A power of two P of heads has 2^(-8 (h + 1) / P). Other counts take those of the next lower power of two, and for
    the rest every other slope of twice that power, as the paper's authors do.

    Raises:
        InputError: ``heads`` is not a positive int.
    """
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise InputError(f"heads is {heads!r}; a positive int is needed")
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    return slopes + [2.0 ** (-4 * (2 * h + 1) / power) for h in range(heads - power)]


def alibi_slopes(heads: int, *, device: Any = None) -> torch.Tensor:
    """The standard slopes, fp32 [heads], ready to be passed as ``alibi_slopes=``.

    Args:
        heads: number of query heads, any.
        device: torch device of the result; default the CPU.

    Raises:
        InputError: ``heads`` is not a positive int.
    """
    import torch

    return torch.tensor(slope_list(heads), dtype=torch.float32, device=device)

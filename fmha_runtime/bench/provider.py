# SPDX-License-Identifier: Apache-2.0
"""What a provider of attention is to a benchmark: a call on the tensors of a cell, or a reason why there is none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from .cells import Cell, Inputs

Call = Callable[[], Any]


class Absent(Exception):
    """A provider does not run a cell; the text is the reason that the record keeps."""


@dataclass(frozen=True)
class Runnable:
    """One provider, ready to run on the tensors of one cell."""

    call: Call
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    kernel: str | None = None
    tile: str | None = None
    output: Callable[[Any], Any] = lambda result: result
    """From what the call returns to [B, Sq, H, Dv], or [T, H, Dv] of a varlen cell."""


@dataclass(frozen=True)
class Peer:
    """A provider that is not this library."""

    name: str
    module: str  # what must be importable
    make: Callable[[Cell, Inputs], Runnable]
    what: str  # as whose fast it is reported


def reason(error: BaseException) -> str:
    """The message on one line; CUDA's own run to pages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."

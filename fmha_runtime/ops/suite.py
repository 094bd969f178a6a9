# SPDX-License-Identifier: Apache-2.0
"""What the verification of every op has in common: a case, what it showed, a broken promise."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..errors import DriverError, EmulatorFault


class Case(Protocol):
    """One problem of an op's list; its id is its place in the list."""

    @property
    def id(self) -> int: ...
    @property
    def quick(self) -> bool: ...
    @property
    def normal(self) -> bool:
        """Whether the relative L2 error counts."""
        ...


@dataclass(frozen=True)
class Failure:
    """One broken promise of one case. The numbers are those at ``coordinate``, the worst place."""

    check: str  # output, l2, lse, empty rows, canary, repeat, options, fault
    message: str
    coordinate: tuple[int, ...] | None = None
    got: float | None = None
    want: float | None = None
    baseline_error: float | None = None

    def __str__(self) -> str:
        text = f"{self.check}: {self.message}"
        if self.coordinate is not None:
            text += f" at {list(self.coordinate)}: got {self.got!r}, want {self.want!r}"
        if self.baseline_error is not None:
            text += f", the low-precision baseline is off by {self.baseline_error:.3e} there"
        return text


@dataclass(frozen=True)
class CaseResult:
    """What one case showed. ``word`` is "ok", "FAIL" or "skipped"; then the numbers are 0."""

    case: Case
    word: str
    reason: str = ""
    failures: tuple[Failure, ...] = ()
    max_error: float = 0.0
    allowed: float = 0.0
    rel_l2: float = 0.0
    lse_error: float = 0.0
    seconds: float = 0.0

    @property
    def ratio(self) -> float:
        """Largest error over what the number rule allows; at most 1 in a passing case."""
        if self.allowed == 0:
            return 0.0 if self.max_error == 0 else math.inf
        return self.max_error / self.allowed


def checked(case: Case, check: Callable[[], tuple[list[Failure], float]]) -> CaseResult:
    """What the check of a kernel that moves bytes showed: its failures, and how many elements are wrong."""
    begin = time.perf_counter()
    try:
        failures, wrong = check()
    except (EmulatorFault, DriverError, RuntimeError) as error:
        failures, wrong = [Failure("fault", f"{type(error).__name__}: {error}")], math.inf
    seconds = time.perf_counter() - begin
    return CaseResult(case, "FAIL" if failures else "ok", "", tuple(failures), wrong, 0.0, seconds=seconds)

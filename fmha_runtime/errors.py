# SPDX-License-Identifier: Apache-2.0
"""The exceptions of this library. Each says what was asked, what exists and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class FmhaError(Exception):
    """Base of every error that this library raises on purpose."""


class InputError(FmhaError, ValueError):
    """An argument is malformed whatever kernels exist: wrong dtype, shape, stride, device or value."""


class UnsupportedProblem(FmhaError, NotImplementedError):
    """A well-formed problem that no kernel of the catalogue computes.

    Attributes:
        problem: what was asked.
        rejections: ``(kernel name, reason)`` for every row that was considered.
        nearest: name of the row that came closest, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        problem: Any = None,
        rejections: Sequence[tuple[str, str]] = (),
        nearest: str | None = None,
    ) -> None:
        super().__init__(message)
        self.problem = problem
        self.rejections = tuple(rejections)
        self.nearest = nearest


class KernelNotBuilt(FmhaError):
    """The catalogue has the kernel but no cubin of it was found.

    Attributes:
        name: the kernel's name.
        command: the shell command that builds it.
    """

    def __init__(self, message: str, *, name: str, command: str) -> None:
        super().__init__(message)
        self.name = name
        self.command = command


class ExtendedKernelNotBuilt(KernelNotBuilt, UnsupportedProblem):
    """No kernel of the catalogue computes the problem; the sources can express one that does, which is built by its
    name and was not. Attributes as for both."""

    def __init__(self, message: str, *, name: str, command: str) -> None:
        UnsupportedProblem.__init__(self, message, nearest=name)
        self.name = name
        self.command = command


class ArtifactError(FmhaError):
    """A cubin, manifest or record on disk is not what it claims to be.

    Attributes:
        path: the file.
        expected, found: the two values that disagree (both may be None).
        command: a shell command that helps; empty where there is none but what the message says.
    """

    def __init__(
        self, message: str, *, path: Any = None, expected: Any = None, found: Any = None, command: str = ""
    ) -> None:
        super().__init__(message)
        self.path = path
        self.expected = expected
        self.found = found
        self.command = command


class BuildError(FmhaError):
    """nvcc or g++ failed, or a kernel missed its gate (spills, shared memory).

    Attributes:
        command: the command line that was run.
        log: its output.
    """

    def __init__(self, message: str, *, command: str = "", log: str = "") -> None:
        super().__init__(message)
        self.command = command
        self.log = log


class ToolchainError(FmhaError):
    """No usable nvcc or host compiler, or parts of one toolkit with different versions."""


class DriverError(FmhaError):
    """The CUDA driver is missing or refused a call.

    Attributes:
        code: the CUresult value, or None when there is no driver.
        name: its name, for example ``CUDA_ERROR_INVALID_VALUE``.
    """

    def __init__(self, message: str, *, code: int | None = None, name: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.name = name


class EmulatorFault(FmhaError):
    """The CPU emulator caught a kernel doing something a GPU would not forgive (or would, silently)."""

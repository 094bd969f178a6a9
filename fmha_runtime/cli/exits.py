# SPDX-License-Identifier: Apache-2.0
"""Exit codes: 0 done, 130 interrupted, and what each kind of error ends the program with."""

from __future__ import annotations

from ..errors import (
    ArtifactError,
    BuildError,
    DriverError,
    EmulatorFault,
    FmhaError,
    KernelNotBuilt,
    ToolchainError,
)

FAILED, USAGE, ENVIRONMENT, ARTIFACT, INTERRUPTED = 1, 2, 3, 4, 130


def exit_code(error: BaseException) -> int:
    """The exit code of an error."""
    if isinstance(error, ArtifactError):
        return ARTIFACT
    if isinstance(error, DriverError | ToolchainError | ImportError):
        return ENVIRONMENT
    if isinstance(error, KernelNotBuilt | BuildError | EmulatorFault):
        return FAILED
    return USAGE if isinstance(error, FmhaError) else FAILED

# SPDX-License-Identifier: Apache-2.0
"""Fused multi-head attention from cubins: a table of kernels, a dispatcher and the CUDA driver API.

Importing this package loads neither torch nor CUDA and touches no file; names resolve on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "attention": "calls.api",
    "attention_varlen": "calls.api",
    "attention_with_kvcache": "calls.api",
    "alibi_slopes": "problem.alibi",
    "append_kv": "ops.append.appender",
    "PackedMask": "problem.packed_mask",
    "pack_mask": "ops.pack.packer",
    "unpack_mask": "problem.packed_mask",
    "explain": "calls.api",
    "is_supported": "calls.api",
    "merge_states": "calls.api",
    "plan": "calls.api",
    "prepare": "calls.api",
    "register_torch_ops": "calls.route",
    "Plan": "ops.forward.plan",
    "Problem": "problem.dispatch",
    "Trace": "problem.dispatch",
    "Arch": "kernels.spec",
    "DType": "kernels.spec",
    "KernelSpec": "kernels.spec",
    "ArtifactError": "errors",
    "BuildError": "errors",
    "DriverError": "errors",
    "EmulatorFault": "errors",
    "FmhaError": "errors",
    "InputError": "errors",
    "KernelNotBuilt": "errors",
    "ToolchainError": "errors",
    "UnsupportedProblem": "errors",
}

__all__ = [
    "Arch",
    "ArtifactError",
    "BuildError",
    "DType",
    "DriverError",
    "EmulatorFault",
    "FmhaError",
    "InputError",
    "KernelNotBuilt",
    "KernelSpec",
    "PackedMask",
    "Plan",
    "Problem",
    "ToolchainError",
    "Trace",
    "UnsupportedProblem",
    "__version__",
    "alibi_slopes",
    "append_kv",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "explain",
    "is_supported",
    "merge_states",
    "pack_mask",
    "plan",
    "prepare",
    "register_torch_ops",
    "unpack_mask",
]

if TYPE_CHECKING:
    from .calls.api import (
        attention,
        attention_varlen,
        attention_with_kvcache,
        explain,
        is_supported,
        merge_states,
        plan,
        prepare,
    )
    from .calls.route import register_torch_ops
    from .errors import (
        ArtifactError,
        BuildError,
        DriverError,
        EmulatorFault,
        FmhaError,
        InputError,
        KernelNotBuilt,
        ToolchainError,
        UnsupportedProblem,
    )
    from .kernels.spec import Arch, DType, KernelSpec
    from .ops.append.appender import append_kv
    from .ops.forward.plan import Plan
    from .ops.pack.packer import pack_mask
    from .problem.alibi import alibi_slopes
    from .problem.dispatch import Problem, Trace
    from .problem.packed_mask import PackedMask, unpack_mask


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

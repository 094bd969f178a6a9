# SPDX-License-Identifier: Apache-2.0
"""Every environment variable and every folder of this library, in one table, read at call time.

The only file that looks at ``os.environ``. Nothing here creates a folder.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .errors import InputError

_BYTES_PER_JOB = 2 << 30  # nvcc's device compiler peaks near 1 GiB on a large kernel; the rest is headroom


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, what an unset one means, and what it does."""

    name: str
    default: str
    meaning: str

    @property
    def value(self) -> str | None:
        """Its present value, None when unset or empty."""
        return os.environ.get(self.name) or None


VARIABLES: tuple[Variable, ...] = (
    Variable(
        "FMHA_CACHE_DIR",
        "$XDG_CACHE_HOME/fmha_runtime or ~/.cache/fmha_runtime",
        "built kernels; created at the first build",
    ),
    Variable("FMHA_COMMIT", "-", "commit that records name, for a copy of the checkout without .git"),
    Variable("FMHA_CUBIN_DIR", "-", "extra folder of cubins, searched first; may be read-only"),
    Variable("FMHA_NVCC", "-", "the nvcc to use, before any other that is found"),
    Variable("FMHA_HOST_CXX", "g++", "host C++ compiler, for nvcc and for the emulator"),
    Variable("FMHA_BUILD_JOBS", "min(cores, RAM / 2 GiB)", "compilers that run at once"),
    Variable("FMHA_BUILD_ON_DEMAND", "0", "1: attention() may build a kernel that is missing"),
    Variable("FMHA_EMULATOR_THREADS", "cores", "host threads that the emulator runs CTAs on"),
    Variable("FMHA_DEBUG", "0", "1: tracebacks in the CLI, one line before each launch"),
)


def _get(name: str) -> str | None:
    return os.environ.get(name) or None


def _flag(name: str) -> bool:
    text = (_get(name) or "0").lower()
    if text not in {"0", "1", "false", "true", "no", "yes"}:
        raise InputError(f"{name}={text!r} is not a switch; set it to 0 or 1")
    return text in {"1", "true", "yes"}


def _folder(text: str) -> Path:
    return Path(text).expanduser().absolute()


def cache_dir() -> Path:
    """Folder of the kernels built on this machine (FMHA_CACHE_DIR, else the XDG rule). It may not
    exist yet.
    """
    own = _get("FMHA_CACHE_DIR")
    if own:
        return _folder(own)
    return _folder(_get("XDG_CACHE_HOME") or "~/.cache") / "fmha_runtime"


def cubin_dir() -> Path | None:
    """The extra root that is searched before all others, or None."""
    text = _get("FMHA_CUBIN_DIR")
    return _folder(text) if text else None


def places() -> tuple[str | None, ...]:
    """What the folders of kernels and the host compiler are named by, as it is in the environment now."""
    get = os.environ.get
    return (get("FMHA_CUBIN_DIR"), get("FMHA_CACHE_DIR"), get("XDG_CACHE_HOME"), get("HOME"), get("FMHA_HOST_CXX"))


def nvcc_override() -> str | None:
    """The nvcc that the user insists on, or None."""
    return _get("FMHA_NVCC")


def host_cxx() -> str:
    """The host C++ compiler: a path, or a name to look up on PATH."""
    return _get("FMHA_HOST_CXX") or "g++"


def build_jobs() -> int:
    """How many compilers may run at once: FMHA_BUILD_JOBS, else bounded by cores and by memory.

    Raises:
        InputError: FMHA_BUILD_JOBS is not a positive integer.
    """
    text = _get("FMHA_BUILD_JOBS")
    if text is None:
        return max(1, min(len(os.sched_getaffinity(0)), _memory_bytes() // _BYTES_PER_JOB))
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"FMHA_BUILD_JOBS={text!r} is not a number of jobs; set it to 1 or more")
    return int(text)


def _memory_bytes() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:  # a container's limit, where there is one
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def build_on_demand() -> bool:
    """Whether a call that lacks its kernel may compile it."""
    return _flag("FMHA_BUILD_ON_DEMAND")


def emulator_threads() -> int:
    """Host threads that the emulator runs CTAs on.

    Raises:
        InputError: FMHA_EMULATOR_THREADS is not a positive integer.
    """
    text = _get("FMHA_EMULATOR_THREADS")
    if text is None:
        return len(os.sched_getaffinity(0))
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"FMHA_EMULATOR_THREADS={text!r} is not a number of threads; set it to 1 or more")
    return int(text)


def debug() -> bool:
    """Whether the CLI shows tracebacks and launches are announced."""
    return _flag("FMHA_DEBUG")


def commit() -> str | None:
    """The commit of a copy that has no ``.git``; None: not named."""
    return _get("FMHA_COMMIT")


def tool_environment() -> dict[str, str]:
    """The environment for compilers: the present one without the variables that would change nvcc's
    flags unseen.
    """
    unseen = {"NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"}
    return {name: value for name, value in os.environ.items() if name not in unseen}


def which(program: str) -> Path | None:
    """An executable on PATH (or the path itself when it is one), or None."""
    found = shutil.which(program)
    return Path(found) if found else None


@cache
def _data(name: str) -> Path:
    # An installed wheel carries the two folders as package data; in a checkout they lie beside the package.
    package = Path(__file__).resolve().parent
    installed = package / "_data" / name
    return installed if installed.is_dir() else package.parent / name


def kernel_src() -> Path:
    """The folder that holds ``fmha/`` and ``emulator/``."""
    return _data("kernel_src")


def package_root() -> Path:
    """The folder of the tables ``manifest/`` and ``verified/`` (and of ``ARCH/*.cubin`` where cubins are shipped)."""
    return _data("cubins")

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

_MOST = 1024  # jobs and threads; more is a slip of the finger
_BYTES_PER_JOB = 2 << 30  # nvcc's device compiler peaks near 1 GiB on a large kernel; the rest is headroom


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, what an unset one means, and what it does."""

    name: str
    default: str
    meaning: str

    @property
    def value(self) -> str | None:
        """Its present value, None when unset or blank."""
        return _get(self.name)


VARIABLES: tuple[Variable, ...] = (
    Variable(
        "FMHA_CACHE_DIR",
        "$XDG_CACHE_HOME/fmha_runtime or ~/.cache/fmha_runtime",
        "built kernels; created at the first build; nobody else may write to it",
    ),
    Variable("FMHA_COMMIT", "-", "commit that records name, for a copy of the checkout without .git"),
    Variable("FMHA_CUBIN_DIR", "-", "extra folder of cubins, searched first; may be read-only; yours or root's"),
    Variable("FMHA_NVCC", "-", "the nvcc to use, before any other that is found"),
    Variable("FMHA_HOST_CXX", "g++", "host C++ compiler, for nvcc and for the emulator"),
    Variable("FMHA_BUILD_JOBS", "min(cores, RAM / 2 GiB)", "compilers that run at once"),
    Variable("FMHA_BUILD_ON_DEMAND", "0", "1: attention() may build a kernel that is missing"),
    Variable("FMHA_EMULATOR_THREADS", "cores", "host threads that the emulator runs CTAs on"),
    Variable("FMHA_DEBUG", "0", "1: tracebacks in the CLI, one line before each launch"),
)


def _get(name: str) -> str | None:
    return os.environ.get(name, "").strip() or None


def _flag(name: str) -> bool:
    text = (_get(name) or "0").lower()
    if text not in {"0", "1", "false", "true", "no", "yes"}:
        raise InputError(f"{name}={text[:40]!r} is not a switch; set it to 0 or 1")
    return text in {"1", "true", "yes"}


def _count(name: str, what: str) -> int | None:
    text = _get(name)
    if text is None:
        return None
    # Digits of other scripts are digits to str.isdigit, and some of them none to int.
    if not text.isascii() or not text.isdigit() or len(text) > 4 or not 1 <= int(text) <= _MOST:
        raise InputError(f"{name}={text[:40]!r} is not a number of {what}; set it to 1 or more, up to {_MOST}")
    return int(text)


def _shown(name: str, text: str) -> str:
    """A name of something, which errors and records have to be able to say."""
    if not text.isprintable():
        raise InputError(f"{name}={text[:80]!r} has characters that cannot be printed; use a name without them")
    if len(os.fsencode(text)) > 4000 or any(len(os.fsencode(part)) > 255 for part in text.split("/")):
        raise InputError(f"{name}={text[:40]!r}... is longer than a name may be; use another")
    return text


def _folder(name: str, text: str) -> Path:
    """The folder that a variable names.

    Raises:
        InputError: there cannot be such a folder, or its name could not be shown.
    """
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError:
        raise InputError(f"{name}={text[:80]!r}: there is no such home folder; give the whole path") from None
    except FileNotFoundError:
        raise InputError(f"{name}={text!r} is relative, and the working folder is gone; give the whole path") from None
    _shown(name, str(path))
    return path


def cache_dir() -> Path:
    """Folder of the kernels built on this machine (FMHA_CACHE_DIR, else the XDG rule). It may not
    exist yet.

    Raises:
        InputError: it cannot be told which folder that is.
    """
    own = _get("FMHA_CACHE_DIR")
    if own:
        return _folder("FMHA_CACHE_DIR", own)
    shared = _get("XDG_CACHE_HOME")
    if shared and os.path.isabs(shared):  # the XDG rule: a relative one does not count
        return _folder("XDG_CACHE_HOME", shared) / "fmha_runtime"
    try:
        return _folder("HOME", "~/.cache") / "fmha_runtime"
    except InputError:
        raise InputError("there is no home folder for built kernels; set FMHA_CACHE_DIR to a folder") from None


def cubin_dir() -> Path | None:
    """The extra root that is searched before all others, or None."""
    text = _get("FMHA_CUBIN_DIR")
    return _folder("FMHA_CUBIN_DIR", text) if text else None


def places() -> tuple[str | None, ...]:
    """What the folders of kernels and the host compiler are named by, as it is in the environment now."""
    get = os.environ.get
    return (get("FMHA_CUBIN_DIR"), get("FMHA_CACHE_DIR"), get("XDG_CACHE_HOME"), get("HOME"), get("FMHA_HOST_CXX"))


def nvcc_override() -> str | None:
    """The nvcc that the user insists on, or None."""
    text = _get("FMHA_NVCC")
    return _shown("FMHA_NVCC", text) if text else None


def host_cxx() -> str:
    """The host C++ compiler: a path, or a name to look up on PATH."""
    return _shown("FMHA_HOST_CXX", _get("FMHA_HOST_CXX") or "g++")


def build_jobs() -> int:
    """How many compilers may run at once: FMHA_BUILD_JOBS, else bounded by cores and by memory.

    Raises:
        InputError: FMHA_BUILD_JOBS is not a positive integer.
    """
    given = _count("FMHA_BUILD_JOBS", "jobs")
    return given or max(1, min(len(os.sched_getaffinity(0)), _memory_bytes() // _BYTES_PER_JOB))


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
    return _count("FMHA_EMULATOR_THREADS", "threads") or len(os.sched_getaffinity(0))


def debug() -> bool:
    """Whether the CLI shows tracebacks and launches are announced."""
    return _flag("FMHA_DEBUG")


def commit() -> str | None:
    """The commit of a copy that has no ``.git``; None: not named.

    Raises:
        InputError: it is no commit's name.
    """
    text = _get("FMHA_COMMIT")
    if text is not None and (not text.isascii() or not text.isprintable() or " " in text or len(text) > 100):
        raise InputError(
            f"FMHA_COMMIT={text[:40]!r} is not the name of a commit; set it to what `git rev-parse HEAD` says"
        )
    return text


def tool_environment() -> dict[str, str]:
    """The environment for compilers: the present one without the variables that would change nvcc's
    flags unseen.
    """
    unseen = {"NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"}
    return {name: value for name, value in os.environ.items() if name not in unseen}


def which(program: str) -> Path | None:
    """An executable on PATH (or the path itself when it is one), or None."""
    found = shutil.which(program)
    return Path(found).absolute() if found else None  # compilers run in folders of their own


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

# SPDX-License-Identifier: Apache-2.0
"""The CUDA source of a kernel: its translation unit, the files it reaches, their hash, the flags it is built with.

Text only; build.py and emulator.py run compilers on it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from .. import config
from ..errors import ArtifactError
from . import catalog
from .code_hash import Flattener
from .spec import Arch, KernelSpec
from .tile import Tile

_ABI = re.compile(r"^#define FMHA_ABI (\d+)$", re.MULTILINE)

EMULATOR_FLAGS = ("-shared", "-O2", "-fPIC", "-std=c++17", "-fvisibility=hidden", "-pthread")
"""The host compiler's flags for a kernel on the CPU emulator."""
EMULATOR_CORE_FLAGS = ("-r", "-nostdlib", "-O3", "-fPIC", "-std=c++17", "-fvisibility=hidden", "-pthread")
"""And for the emulator's scheduler and memory model, which are compiled once for all kernels."""

_FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", "-Xptxas=--warn-on-spills")


def _root() -> Path:
    return _resolved(config.kernel_src(), "fmha")


@lru_cache(maxsize=8)
def _resolved(folder: Path, name: str) -> Path:
    return (folder / name).resolve()


def header(spec: KernelSpec) -> str:
    """The header, inside ``kernel_src/fmha``, that defines this kernel."""
    return catalog.unit(spec, catalog.tile(spec)).header


def render(spec: KernelSpec, tile: Tile) -> str:
    """The translation unit of a kernel: the same text for nvcc and for the emulator's g++."""
    unit = catalog.unit(spec, tile)
    return f"""#include "{unit.header}"
using Traits = fmha::{unit.traits};
static_assert(Traits::kSmemBytes == {catalog.smem_bytes(spec, tile)}, \
"catalog.py and the traits must agree on shared memory");
FMHA_KERNEL({spec.name}, fmha::{unit.params}, {tile.threads}, {tile.ctas_per_sm}) {{ \
fmha::{unit.body}<Traits>(params); }}
"""


def flags(arch: Arch) -> tuple[str, ...]:
    """nvcc's flags for a cubin of this arch. Part of a kernel's identity: another set makes its
    cubins stale.
    """
    number = arch.value[2:]
    return (*_FLAGS, f"-gencode=arch=compute_{number},code=sm_{number}")


def ptx_flags(arch: Arch) -> tuple[str, ...]:
    """nvcc's flags for PTX of this arch's virtual architecture."""
    return (*_FLAGS, f"-arch=compute_{arch.value[2:]}")


def code(spec: KernelSpec, tile: Tile) -> str:
    """``code`` of a kernel: SHA-256 (hex) of its unit and of every file it reaches, as code_hash.py reads them.

    The kernel's name does not count, so that equal code of two archs is seen.

    Raises:
        ArtifactError: a file is missing, or holds what the hash cannot follow.
    """
    return flattener(_root()).digest(render(spec, tile), leave_out=spec.name)


def text(spec: KernelSpec, tile: Tile) -> str:
    """SHA-256 (hex) of a kernel's unit and of every byte of ``kernel_src/fmha``, comments and all. Quick to tell, where
    ``code`` takes tens of milliseconds once a process: equal text is equal code.
    """
    folder = _root()
    tree = _tree(_held.get((folder,)) or _stamps((folder,)))
    return hashlib.sha256(f"{tree}\n{render(spec, tile)}".encode()).hexdigest()


@lru_cache(maxsize=8)
def _tree(stamps: tuple[Any, ...]) -> str:
    """SHA-256 (hex) of the files that stamps tell of, with their names."""
    found = hashlib.sha256()
    for folder, name, _, size in sorted(stamps):
        path = Path(folder, name)
        found.update(f"{path.relative_to(_root())} {size}\n".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def emulated_code(spec: KernelSpec, tile: Tile) -> str:
    """What decides how a kernel runs on the CPU emulator, as SHA-256 (hex): its code over the emulator's twins of the
    instructions that it uses, the scheduler and memory model, the host compiler's flags. Not the compiler itself.

    Raises:
        ArtifactError: as ``code``.
    """
    unit, more = render(spec, tile), (*EMULATOR_FLAGS, emulator_core())
    return flattener(*emulator_folders(), system=True).digest(unit, leave_out=spec.name, more=more)


def emulator_folders() -> tuple[Path, ...]:
    """Where an emulated kernel's headers are looked up: the twins first, they stand in for ``<ptx/...>``."""
    return _resolved(config.kernel_src(), "emulator"), _root()


def emulator_core() -> str:
    """SHA-256 (hex) of the emulator's own source, comments aside, and of the flags it is compiled with."""
    twins = emulator_folders()[0]
    unit = "".join(f'#include "{path.name}"\n' for path in sorted(twins.glob("*.cpp")))
    return flattener(twins, system=True).digest(unit, more=EMULATOR_CORE_FLAGS)


def files(spec: KernelSpec) -> list[Path]:
    """Every file of ``kernel_src/fmha`` that a kernel reaches, in the order of inclusion.

    Raises:
        ArtifactError: as ``code``.
    """
    return flattener(_root()).files(header(spec))


def flattener(*folders: Path, system: bool = False) -> Flattener:
    """The flattener of these folders, made anew when one of their files was written since."""
    return _flattener(folders, system, _held.get(folders) or _stamps(folders))


@contextmanager
def unchanged() -> Iterator[None]:
    """Within this block kernel_src is looked at once, however many kernels are hashed: for tables of all kernels."""
    folders = ((_root(),), emulator_folders(), emulator_folders()[:1])
    mine = {key: _stamps(key) for key in folders if key not in _held}
    _held.update(mine)
    try:
        yield
    finally:
        for key in mine:
            del _held[key]


_held: dict[tuple[Path, ...], tuple[object, ...]] = {}


@lru_cache(maxsize=8)
def _flattener(folders: tuple[Path, ...], system: bool, stamps: tuple[object, ...]) -> Flattener:
    return Flattener(folders, system=system)


def _stamps(folders: tuple[Path, ...]) -> tuple[object, ...]:
    """What tells within one process that a file was written. Identity itself is content, never a time."""
    found = []
    for folder in folders:
        for path, _, names in os.walk(folder):
            for name in names:
                status = os.stat(os.path.join(path, name))
                found.append((path, name, status.st_mtime_ns, status.st_size))
    return tuple(found)


def abi() -> int:
    """The ABI number of params.h: a cubin with another one is never launched."""
    path = _root() / "params.h"
    found = _ABI.search(path.read_text())
    if found is None:
        raise ArtifactError(f"{path} does not define FMHA_ABI; restore the checkout", path=path)
    return int(found[1])

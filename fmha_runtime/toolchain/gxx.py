# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels for the CPU: their source over the emulator's twins, with the host's C++ compiler.

Libraries are kept in the cache, keyed by what they are made of: the code of the kernel, the twins of the instructions
that it uses, the emulator's core, the compiler and its flags. Another kernel's files do not matter.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from .. import config
from ..errors import BuildError, ToolchainError
from ..kernels import cache, catalog, files, sources
from ..kernels.spec import KernelSpec
from ..kernels.tile import Tile
from . import process, publish

_FORM = "sealed"  # of the files; those of earlier versions have another key


def library(spec: KernelSpec, tile: Tile | None = None) -> Path:
    """The shared library that holds the emulated kernel of a spec, compiled when it is not in the cache.

    Args:
        spec: which kernel.
        tile: how it is cut; the catalogue's tile by default.

    Raises:
        ToolchainError: there is no C++ compiler.
        BuildError: the kernel does not compile.
    """
    return library_of(sources.render(spec, tile or catalog.tile(spec)), spec.name)


def library_of(text: str, name: str, include_dirs: Sequence[Path] | None = None) -> Path:
    """The shared library of any translation unit that defines ``FMHA_KERNEL(name, ...)``.

    Args:
        text: the source.
        name: the kernel's name.
        include_dirs: where its headers lie instead of ``kernel_src/fmha``.

    Raises:
        ToolchainError: there is no C++ compiler.
        BuildError: the source does not compile.
        ArtifactError: a header is missing, the cache is damaged, or somebody else can write to it.
    """
    twins, kernels = sources.emulator_folders()
    folders = [twins, *(path.resolve() for path in include_dirs or [kernels])]  # the twins stand in for <ptx/...>
    compiler = _compiler()
    runtime = _runtime(compiler, twins)
    code = sources.flattener(*folders, system=True).digest(text)
    key = _key(compiler, sources.EMULATOR_FLAGS, runtime.name, code)
    target = cache.trusted(config.cache_dir(), cache.EMULATOR) / f"{name}-{key}.so"
    if not target.exists():
        files.check_seal(runtime)
        with publish.workspace() as folder:
            source = folder / f"{name}.cpp"
            source.write_text(text)
            inputs = [*(f"-I{path}" for path in folders), str(source), str(runtime)]
            _compile(compiler, [*sources.EMULATOR_FLAGS, *inputs], target, folder)
    return target


def _runtime(compiler: Path, twins: Path) -> Path:
    """The scheduler and the memory model: one object file, linked into every kernel."""
    key = _key(compiler, sources.EMULATOR_CORE_FLAGS, sources.emulator_core())
    target = cache.trusted(config.cache_dir(), cache.EMULATOR) / f"runtime-{key}.o"
    if not target.exists():
        with publish.workspace() as folder:
            units = [str(path) for path in sorted(twins.glob("*.cpp"))]
            _compile(compiler, [*sources.EMULATOR_CORE_FLAGS, *units], target, folder)
    return target


def _compiler() -> Path:
    wanted = config.host_cxx()
    found = config.which(wanted)
    if found is None:
        raise ToolchainError(
            f"the emulator compiles kernels with a C++17 compiler and {wanted!r} was not found; "
            "install one (Debian, Ubuntu: apt-get install g++) or set FMHA_HOST_CXX"
        )
    return found


@lru_cache
def _version(compiler: Path) -> str:
    try:
        return process.output([str(compiler), "--version"])
    except ToolchainError as error:
        raise ToolchainError(f"{error}; set FMHA_HOST_CXX to a C++17 compiler") from None


def _key(compiler: Path, flags: Sequence[str], *parts: str) -> str:
    text = "\0".join([_FORM, _version(compiler), *flags, *parts])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _compile(compiler: Path, arguments: Sequence[str], target: Path, folder: Path) -> None:
    """Compiles into the folder and publishes by rename, so that nobody ever sees half a file."""
    output = folder / target.name
    command = [str(compiler), *arguments, "-o", str(output)]
    result = process.run(command, folder)
    if result.returncode != 0 or not output.is_file():
        raise BuildError(
            f"{compiler} could not compile {target.name} for the emulator:\n{result.stdout}",
            command=shlex.join(command),
            log=result.stdout,
        )
    files.replace_file(target, files.sealed(output.read_bytes()))

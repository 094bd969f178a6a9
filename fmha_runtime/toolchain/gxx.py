# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels for the CPU: their source over the emulator's twins, with the host's C++ compiler.

Libraries are kept in the cache, keyed by what they are made of: the code of the kernel, the twins of the instructions
that it uses, the emulator's core, the compiler and its flags. Another kernel's files do not matter.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from .. import config
from ..errors import ArtifactError, BuildError, ToolchainError
from ..kernels import catalog, sources
from ..kernels.spec import KernelSpec
from ..kernels.tile import Tile


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
        ArtifactError: a header is missing.
    """
    twins, kernels = sources.emulator_folders()
    folders = [twins, *(path.resolve() for path in include_dirs or [kernels])]  # the twins stand in for <ptx/...>
    compiler = _compiler()
    runtime = _runtime(compiler, twins)
    code = sources.flattener(*folders, system=True).digest(text)
    target = config.cache_dir() / "emulator" / f"{name}-{_key(compiler, sources.EMULATOR_FLAGS, runtime.name, code)}.so"
    if not target.exists():
        with _staging(target) as folder:
            source = Path(folder) / f"{name}.cpp"
            source.write_text(text)
            inputs = [*(f"-I{path}" for path in folders), str(source), str(runtime)]
            _compile(compiler, [*sources.EMULATOR_FLAGS, *inputs], target, folder)
    return target


def _runtime(compiler: Path, twins: Path) -> Path:
    """The scheduler and the memory model: one object file, linked into every kernel."""
    key = _key(compiler, sources.EMULATOR_CORE_FLAGS, sources.emulator_core())
    target = config.cache_dir() / "emulator" / f"runtime-{key}.o"
    if not target.exists():
        with _staging(target) as folder:
            files = [str(path) for path in sorted(twins.glob("*.cpp"))]
            _compile(compiler, [*sources.EMULATOR_CORE_FLAGS, *files], target, folder)
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


@cache
def _version(compiler: Path) -> str:
    result = subprocess.run([str(compiler), "--version"], capture_output=True, text=True)
    if result.returncode != 0:
        raise ToolchainError(
            f"{compiler} --version failed ({result.stderr.strip()}); set FMHA_HOST_CXX to a C++17 compiler"
        )
    return result.stdout


def _key(compiler: Path, flags: Sequence[str], *parts: str) -> str:
    text = "\0".join([_version(compiler), *flags, *parts])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _staging(target: Path) -> tempfile.TemporaryDirectory[str]:
    """A scratch folder on the file system of the target."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=target.parent, prefix="tmp-")
    except OSError as error:
        raise ArtifactError(
            f"cannot write emulated kernels to {target.parent} ({error}); set FMHA_CACHE_DIR to a writable folder",
            path=target.parent,
        ) from None


def _compile(compiler: Path, arguments: Sequence[str], target: Path, folder: str) -> None:
    """Compiles into the folder and publishes by rename, so that nobody ever sees half a file."""
    output = Path(folder) / target.name
    command = [str(compiler), *arguments, "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, env=config.tool_environment())
    if result.returncode != 0:
        log = result.stdout + result.stderr
        raise BuildError(
            f"{compiler} could not compile {target.name} for the emulator:\n{log}",
            command=" ".join(command),
            log=log,
        )
    os.replace(output, target)

# SPDX-License-Identifier: Apache-2.0
"""Runs kernels on the CPU: kernel_src/emulator compiled with g++, the same interface as driver.py.

The emulator is adversarial: copies land as late as they may, memory starts as NaN, and accesses out
of bounds, races on shared memory and threads that wait in vain raise EmulatorFault.
kernel_src/emulator says how.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from enum import Enum
from functools import cache
from pathlib import Path

from . import catalog, config, sources
from .catalog import Tile
from .errors import ArtifactError, BuildError, EmulatorFault, ToolchainError
from .spec import KernelSpec

_COMMON_FLAGS = ("-fPIC", "-std=c++17", "-fvisibility=hidden", "-pthread")
_KERNEL_FLAGS = ("-shared", "-O2", *_COMMON_FLAGS)
_RUNTIME_FLAGS = ("-r", "-nostdlib", "-O3", *_COMMON_FLAGS)
_SOURCE_SUFFIXES = {".h", ".cuh", ".cpp"}
_ERROR_BYTES = 4096


class Order(str, Enum):
    """In which order the warps of a CTA and the lanes of a warp get their turns."""

    FORWARD = "forward"
    REVERSE = "reverse"
    SHUFFLE = "shuffle"


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("writable", ctypes.c_uint64),
    ]


class _Request(ctypes.Structure):
    """Mirror of fmha::emu::Request in kernel_src/emulator/emulator.h."""

    _fields_ = [
        ("params", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("error", ctypes.c_char_p),
        ("error_bytes", ctypes.c_uint64),
        ("collectives", ctypes.c_uint64),
        ("buffer_count", ctypes.c_uint32),
        ("grid", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("smem", ctypes.c_uint32),
        ("workers", ctypes.c_uint32),
        ("order", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
    ]


class Kernel:
    """A kernel compiled for the CPU.

    Attributes:
        name: the kernel's name.
        order, seed: the schedule of the next launches; the seed matters for ``Order.SHUFFLE``.
        collectives: warp-wide operations that the latest launch executed.
    """

    def __init__(self, name: str, library: Path) -> None:
        self.name = name
        self.order = Order.FORWARD
        self.seed = 0
        self.collectives = 0
        try:
            self._entry = ctypes.CDLL(str(library))[name]
        except (OSError, AttributeError) as error:
            raise ArtifactError(
                f"{library} does not hold the emulated kernel {name} ({error}); delete the file",
                path=library,
            ) from None
        self._entry.argtypes = [ctypes.POINTER(_Request)]
        self._entry.restype = ctypes.c_int

    def launch(
        self,
        grid: int,
        threads: int,
        smem: int,
        stream: int,
        params: int,
        buffers: Sequence[tuple[int, int, bool]],
    ) -> None:
        """Runs the kernel and returns when it is done.

        Args:
            grid: CTAs, in one dimension.
            threads: threads of a CTA.
            smem: bytes of dynamic shared memory of a CTA.
            stream: ignored; there is only the calling thread's order.
            params: address of the by-value parameter struct.
            buffers: (address, bytes, writable) of every tensor that the kernel may touch.

        Raises:
            EmulatorFault: the kernel did something that a GPU would not forgive.
        """
        table = (_Buffer * max(1, len(buffers)))()
        for row, (address, size, writable) in zip(table, buffers, strict=False):
            row.address, row.bytes, row.writable = address, size, writable
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        request = _Request(
            params=params,
            buffers=table,
            error=ctypes.cast(error, ctypes.c_char_p),
            error_bytes=_ERROR_BYTES,
            buffer_count=len(buffers),
            grid=grid,
            threads=threads,
            smem=smem,
            workers=config.emulator_threads(),
            order=list(Order).index(self.order),
            seed=self.seed,
        )
        failed = self._entry(ctypes.byref(request))
        self.collectives = request.collectives
        if failed:
            raise EmulatorFault(error.value.decode(errors="replace"))


def load(spec: KernelSpec, tile: Tile | None = None) -> Kernel:
    """The emulated kernel of a spec, compiled on first use.

    Args:
        spec: which kernel.
        tile: how it is cut; the catalogue's tile by default.

    Raises:
        ToolchainError: there is no C++ compiler.
        BuildError: the kernel does not compile.
    """
    return load_source(sources.render(spec, tile or catalog.tile(spec)), spec.name)


def load_source(text: str, name: str, include_dirs: Sequence[Path] | None = None) -> Kernel:
    """Compiles any translation unit that defines ``FMHA_KERNEL(name, ...)``.

    Args:
        text: the source.
        name: the kernel's name.
        include_dirs: where its headers lie instead of ``kernel_src/fmha``; small folders, because
            every source file in them is part of the cache key.

    Raises:
        ToolchainError: there is no C++ compiler.
        BuildError: the source does not compile.
    """
    twins = config.kernel_src() / "emulator"
    if include_dirs is None:
        include_dirs = [config.kernel_src() / "fmha"]
    folders = [twins, *include_dirs]  # the twins first: they stand in for <ptx/...>
    compiler = _compiler()
    runtime = _runtime(compiler, twins)
    digest = _digest(compiler, _KERNEL_FLAGS, runtime.name, text, *map(_contents, folders))
    library = config.cache_dir() / "emulator" / f"{name}-{digest}.so"
    if not library.exists():
        with _staging(library) as folder:
            source = Path(folder) / f"{name}.cpp"
            source.write_text(text)
            inputs = [*(f"-I{path}" for path in folders), str(source), str(runtime)]
            _compile(compiler, [*_KERNEL_FLAGS, *inputs], library, folder)
    return Kernel(name, library)


def _runtime(compiler: Path, twins: Path) -> Path:
    """The scheduler and the memory model: one object file, linked into every kernel."""
    digest = _digest(compiler, _RUNTIME_FLAGS, _contents(twins))
    target = config.cache_dir() / "emulator" / f"runtime-{digest}.o"
    if not target.exists():
        with _staging(target) as folder:
            files = [str(path) for path in sorted(twins.glob("*.cpp"))]
            _compile(compiler, [*_RUNTIME_FLAGS, *files], target, folder)
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


def _contents(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.suffix in _SOURCE_SUFFIXES)
    return "\0".join(f"{path.relative_to(folder).as_posix()}\0{path.read_text()}" for path in files)


def _digest(compiler: Path, flags: Sequence[str], *parts: str) -> str:
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

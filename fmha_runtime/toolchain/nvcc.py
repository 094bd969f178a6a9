# SPDX-License-Identifier: Apache-2.0
"""nvcc and the host compiler: where they are, and whether their parts agree."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import config
from ..errors import BuildError, ToolchainError
from ..kernels.spec import KernelSpec
from . import process

_RELEASE = re.compile(r"release (\d+\.\d+), V([\d.]+)")
# The parts of a toolkit from the package index; each is a wheel, so nothing but pip keeps them at one version.
_PARTS = ("cuda_nvcc", "nvvm", "cuda_crt", "cuda_runtime", "cuda_cccl")
_LINES = 20  # of a compiler's log, in an error
_USUAL = Path("/usr/local/cuda/bin/nvcc")


@dataclass(frozen=True)
class Nvcc:
    """The CUDA compiler that builds use: where it is, its version (``13.0.88``), and how it was
    found.
    """

    path: Path
    version: str
    origin: str


def find_nvcc() -> Nvcc:
    """The nvcc to use: FMHA_NVCC, then the Python packages (cuda-pathfinder), PATH,
    /usr/local/cuda.

    Raises:
        ToolchainError: there is none, it does not run, or its toolkit is a mix of versions.
    """
    path, origin = _locate_nvcc()
    try:
        found = _RELEASE.search(process.output([str(path), "--version"]))
    except ToolchainError as error:
        raise ToolchainError(f"{error}; set FMHA_NVCC to an nvcc that works") from None
    if found is None:
        raise ToolchainError(
            f"{path} (from {origin}) does not answer --version like an nvcc; set FMHA_NVCC to one that works"
        )
    release, version = found.groups()
    _check_toolkit(path, release)
    return Nvcc(path, version, origin)


def find_host_cxx() -> Path:
    """The host C++ compiler, which nvcc needs as a preprocessor even for a cubin.

    Raises:
        ToolchainError: there is none.
    """
    name = config.host_cxx()
    found = config.which(name)
    if found is None:
        raise ToolchainError(
            f"no host C++ compiler {name!r}; nvcc and the emulator need one: install g++ "
            "(for example `apt-get install g++`) or set FMHA_HOST_CXX"
        )
    return found


def failure(spec: KernelSpec, what: str, command: Sequence[str], log: str) -> BuildError:
    """The error of a kernel that did not compile, with the part of the log that explains it."""
    lines = log.splitlines()
    # The first error of the compiler explains the others; without one the end of the log does.
    first = next((number for number, line in enumerate(lines) if ": error" in line), -_LINES)
    shown = "\n".join(lines[first:][:_LINES])
    text = f"{spec.name}: {what}\n{shown}".rstrip()
    return BuildError(text, command=shlex.join(command), log=log)


def command_line(nvcc: Nvcc, cxx: Path, flags: Sequence[str], spec: KernelSpec, suffix: str) -> list[str]:
    """What is run for one kernel, in a folder that holds ``NAME.cu``; writes ``NAME.suffix``."""
    # Input and output are named relative to the working folder: no path of this machine is
    # compiled.
    include = config.kernel_src() / "fmha"
    files = ["-o", f"{spec.name}.{suffix}", f"{spec.name}.cu"]
    return [str(nvcc.path), *flags, "-ccbin", str(cxx), "-I", str(include), *files]


def try_nvcc() -> tuple[Nvcc | None, ToolchainError]:
    try:
        return find_nvcc(), ToolchainError()
    except ToolchainError as error:
        return None, error


def _locate_nvcc() -> tuple[Path, str]:
    chosen = config.nvcc_override()
    if chosen:
        found = config.which(chosen)
        if found is None:
            raise ToolchainError(f"FMHA_NVCC={chosen} is not an executable; correct it, or unset it to search")
        return found, "FMHA_NVCC"
    try:
        from cuda.pathfinder import find_nvidia_binary_utility
    except ImportError:
        pass
    else:
        packaged = find_nvidia_binary_utility("nvcc")
        if packaged:
            return Path(packaged), "cuda-pathfinder"
    on_path = config.which("nvcc")
    if on_path:
        return on_path, "PATH"
    if _USUAL.is_file():
        return _USUAL, str(_USUAL.parent)
    raise ToolchainError(
        "no nvcc: looked at FMHA_NVCC, the Python packages (cuda-pathfinder), PATH and "
        "/usr/local/cuda/bin; run `pip install 'fmha-runtime[build]'`"
    )


def _check_toolkit(nvcc: Path, release: str) -> None:
    """Refuse a toolkit whose parts come from different releases: it fails later, and obscurely."""
    versions = {"nvcc": release}
    ptxas = nvcc.parent / "ptxas"
    if ptxas.is_file():
        found = _RELEASE.search(process.output([str(ptxas), "--version"]))
        versions["ptxas"] = found[1] if found else "unknown"
    # .../site-packages/nvidia/cu13/bin/nvcc: the parts' versions are in the names of their records.
    site = nvcc.parents[3] if nvcc.match("nvidia/*/bin/nvcc") else None
    for part in _PARTS if site else ():
        assert site is not None
        records = list(site.glob(f"nvidia_{part}-*.dist-info"))
        version = records[0].name.split("-")[1] if records else "missing"
        if part != "cuda_cccl" or not records:  # CCCL counts its own releases
            versions[part] = ".".join(version.split(".")[:2])
    if len(set(versions.values())) > 1:
        listing = ", ".join(f"{part} {version}" for part, version in versions.items())
        raise ToolchainError(
            f"the toolkit of {nvcc} is a mix of releases ({listing}); run `pip install "
            f"--force-reinstall 'cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]=={release}.*'`"
        )

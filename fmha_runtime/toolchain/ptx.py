# SPDX-License-Identifier: Apache-2.0
"""The PTX of a kernel, compiled once and kept in the cache."""

from __future__ import annotations

from .. import config
from ..kernels import cache, catalog, files, sources
from ..kernels.spec import KernelSpec
from ..kernels.tile import Tile
from . import process, publish
from .build import digest, ptx_text
from .nvcc import command_line, failure, find_host_cxx, find_nvcc


def compile_ptx(spec: KernelSpec, tile: Tile | None = None) -> bytes:
    """The kernel's PTX text for the base virtual architecture (compute_80 for sm80), without a NUL.

    A copy is kept in the cache, so that a machine without nvcc can use what another one compiled.

    Raises:
        ToolchainError: it is not in the cache and there is no nvcc.
        BuildError: nvcc refused.
        ArtifactError: somebody else can write to the cache.
    """
    tile = tile or catalog.tile(spec)
    flags = sources.ptx_flags(spec.arch)
    path = cache.trusted(config.cache_dir(), cache.PTX) / f"{spec.name}-{digest(spec, tile, flags)[:12]}.ptx"
    if path.is_file():
        files.check_file(path)
        return path.read_bytes()
    compiler, cxx = find_nvcc(), find_host_cxx()
    with publish.workspace() as folder:
        (folder / f"{spec.name}.cu").write_text(sources.render(spec, tile))
        command = command_line(compiler, cxx, (*flags, "-ptx"), spec, "ptx")
        done = process.run(command, folder)
        if done.returncode:
            raise failure(spec, "nvcc -ptx failed", command, done.stdout)
        text = ptx_text(folder / f"{spec.name}.ptx")
    files.replace_file(path, text)
    return text

# SPDX-License-Identifier: Apache-2.0
"""From a spec to a kernel: finds its image, builds one where the caller's rules allow it, and has it loaded."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import config
from ..device import emulator, loader
from ..device.loader import Image, Kernel
from ..errors import BuildError, ExtendedKernelNotBuilt, InputError, KernelNotBuilt
from ..kernels import catalog, manifest, sources, store
from ..kernels.manifest import KernelRow
from ..kernels.spec import KernelSpec
from ..kernels.tile import Tile
from ..toolchain import build, gxx, ptx
from ..toolchain.nvcc import try_nvcc


def kernel(
    spec: KernelSpec, *, device: str = "cuda:0", via: str = "cubin", tile: Tile | None = None, stream: int = 0
) -> Kernel:
    """A kernel ready to launch: ``image``, loaded. What is loaded stays, whatever happens to its file: asking for it
    again, with other options of a call, touches none.

    Args:
        device: "cuda:N", or "emulator".
        stream: the stream of the coming launch (see driver.load).

    Raises:
        KernelNotBuilt, ArtifactError, DriverError, BuildError, ToolchainError: see ``image`` and loader.load.
    """
    key = (spec, tile, device, via, config.places())
    found = _loaded.get(key)
    if found is None:
        emulated = loader.emulated_arch(device) is not None
        index = 0 if emulated else int(device.partition(":")[2] or 0)
        found = loader.load(image(spec, via="emulator" if emulated else via, tile=tile), index, stream)
        _loaded[key] = found
    return found


_loaded: dict[tuple[Any, ...], Kernel] = {}
os.register_at_fork(after_in_child=_loaded.clear)  # a child may not launch its parent's kernels


def from_source(text: str, name: str, include_dirs: Sequence[Path] | None = None) -> emulator.Kernel:
    """The emulated kernel of any translation unit that defines ``FMHA_KERNEL(name, ...)``: see gxx.library_of."""
    return emulator.Kernel(name, gxx.library_of(text, name, include_dirs))


def image(spec: KernelSpec, *, via: str = "cubin", tile: Tile | None = None) -> Image:
    """What can be loaded of a kernel.

    Args:
        spec: which kernel.
        via: "cubin"; "ptx", to have the driver's JIT finish it (runs an older arch's kernel on a newer GPU, for
            verification); "emulator". The last two are compiled where the cache has none.
        tile: forced, for experiments; a cubin of it is built when there is none.

    Raises:
        KernelNotBuilt: no current cubin; FMHA_BUILD_ON_DEMAND=1 builds it instead.
        ArtifactError: the cubin is damaged.
        BuildError, ToolchainError: it had to be compiled and could not be.
    """
    cut = tile or catalog.tile(spec)
    if via == "emulator":
        return Image(spec, cut, via, gxx.library(spec, cut), sources.emulated_code(spec, cut))
    if via == "ptx":
        text = ptx.compile_ptx(spec, cut)
        compiler, _ = try_nvcc()
        return Image(spec, cut, via, text, hashlib.sha256(text).hexdigest(), compiler.version if compiler else None)
    if via == "cubin":
        row = _built(spec) if tile is None else _built_with(spec, tile)
        return Image(spec, cut, via, manifest.load_image(row), row.sha256, row.nvcc)
    raise InputError(f"via is {via!r}; 'cubin', 'ptx' or 'emulator' is needed")


def _built(spec: KernelSpec) -> KernelRow:
    row = store.find(spec)
    if row is not None:
        return row
    command = f"fmha build {spec.name}"
    if config.build_on_demand():
        (result,) = build.build([spec])
        if result.error is not None:
            raise result.error
        if result.warning:
            warnings.warn(result.warning, RuntimeWarning, stacklevel=2)
        row = store.find(spec)
        if row is not None:
            return row
    state = store.state(spec)
    if not catalog.is_core(spec):
        raise ExtendedKernelNotBuilt(
            f"no kernel of the catalogue computes this; {spec.name} would and is {state.word}: {state.reason} "
            "(it is then unverified until `fmha verify` has run it), or set FMHA_BUILD_ON_DEMAND=1, which builds "
            "missing kernels at their first use. fallback='torch' runs it in plain torch, if that is what you want.",
            name=spec.name,
            command=command,
        )
    raise KernelNotBuilt(
        f"{spec.name} is {state.word}: {state.reason}, or set FMHA_BUILD_ON_DEMAND=1, which builds missing kernels at "
        "their first use",
        name=spec.name,
        command=command,
    )


def _built_with(spec: KernelSpec, tile: Tile) -> KernelRow:
    """A cubin of a forced tile. Asking for one is asking for its build, spills and all."""
    row = store.find_tile(spec, tile)
    if row is None:
        (result,) = build.build([spec], tile=tile, spills=True)
        if result.error is not None:
            raise BuildError(f"tile {tile} cannot be built: {result.error}", command=result.command, log=result.log)
        row = result.row
    assert row is not None
    return row

# SPDX-License-Identifier: Apache-2.0
"""A kernel ready to launch: from the table's cubin, from PTX, with a forced tile, or on the emulator."""

from __future__ import annotations

import ctypes
from typing import Any

from . import build, catalog, config, driver, emulator, manifest, params
from .catalog import Tile
from .errors import BuildError, InputError, KernelNotBuilt
from .spec import Arch, KernelSpec

Kernel = Any  # driver.Kernel or emulator.Kernel: the same interface, no common base needed


def emulated_arch(device: object) -> Arch | None:
    """The arch that ``device="emulator"`` or ``"emulator:sm90"`` names; None when it is no emulator.

    Raises:
        InputError: an emulator of an unknown arch.
    """
    if not isinstance(device, str) or not device.startswith("emulator"):
        return None
    word = device.removeprefix("emulator").removeprefix(":") or Arch.SM80.value
    try:
        return Arch(word)
    except ValueError:
        raise InputError(
            f"device is {device!r}; 'emulator' or 'emulator:ARCH' with one of "
            f"{', '.join(a.value for a in Arch)} is needed"
        ) from None


def load(
    spec: KernelSpec,
    *,
    device: str = "cuda:0",
    via: str = "cubin",
    tile: Tile | None = None,
    stream: int = 0,
) -> Kernel:
    """A kernel ready to launch.

    Args:
        spec: which kernel.
        device: "cuda:N" or "emulator".
        via: "cubin", or "ptx" to compile PTX and let the driver's JIT finish it (runs an older arch's kernel on a
            newer GPU, for verification).
        tile: forced, for experiments; a cubin of it is built when there is none.
        stream: the stream of the coming launch (see driver.load).

    Raises:
        KernelNotBuilt: no current cubin; FMHA_BUILD_ON_DEMAND=1 builds it instead.
        ArtifactError, DriverError, BuildError, ToolchainError: see the modules that do the work.
    """
    if emulated_arch(device) is not None:
        return emulator.load(spec, tile)
    index = int(device.partition(":")[2] or 0)
    smem = catalog.smem_bytes(spec, tile or catalog.tile(spec))
    size = ctypes.sizeof(params.block_type(spec))
    if via == "ptx":
        image = build.compile_ptx(spec, tile)
    elif via == "cubin":
        image = manifest.load_image(_built(spec) if tile is None else _built_with(spec, tile))
    else:
        raise InputError(f"via is {via!r}; 'cubin' or 'ptx' is needed")
    return driver.load(image, spec.name, index, smem, size, stream)


def _built(spec: KernelSpec) -> manifest.KernelRow:
    row = manifest.find(spec)
    if row is not None:
        return row
    command = f"fmha build {spec.name}"
    if config.build_on_demand():
        (result,) = build.build([spec])
        if result.error is not None:
            raise result.error
        row = manifest.find(spec)
        if row is not None:
            return row
    state = manifest.state(spec)
    raise KernelNotBuilt(
        f"{spec.name} is {state.word}: {state.reason}, or set FMHA_BUILD_ON_DEMAND=1, which builds missing kernels at "
        "their first use",
        name=spec.name,
        command=command,
    )


def _built_with(spec: KernelSpec, tile: Tile) -> manifest.KernelRow:
    """A cubin of a forced tile. Asking for one is asking for its build, spills and all."""
    row = manifest.find_tile(spec, tile)
    if row is None:
        (result,) = build.build([spec], tile=tile, spills=True)
        if result.error is not None:
            raise BuildError(f"tile {tile} cannot be built: {result.error}", command=result.command, log=result.log)
        row = result.row
    assert row is not None
    return row

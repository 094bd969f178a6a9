# SPDX-License-Identifier: Apache-2.0
"""Images of kernels made ready to launch: on a GPU by the driver, on the CPU by the emulator. Compiles nothing."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..kernels import catalog
from ..kernels.spec import Arch, KernelSpec
from ..kernels.tile import Tile
from . import counters, driver, emulator

Kernel = Any
"""driver.Kernel or emulator.Kernel: the same interface, no common base needed."""


@dataclass(frozen=True)
class Image:
    """What is loaded of a kernel: a cubin, PTX text, or the emulator's library.

    ``how`` is one of ledger.HOW. ``evidence`` tells the bytes: SHA-256 of ``content``; of an emulated kernel
    sources.emulated_code. ``nvcc`` is the version of the compiler where that is known.
    """

    spec: KernelSpec
    tile: Tile
    how: str
    content: bytes | Path
    evidence: str
    nvcc: str | None = None


def load(image: Image, device: int = 0, stream: int = 0) -> Kernel:
    """A kernel ready to launch.

    Args:
        image: what to load; see obtain.py.
        device: index of the GPU; no matter for an emulated kernel.
        stream: the stream of the coming launch (see driver.load).

    Raises:
        DriverError: the driver refuses it.
        ArtifactError: the library of an emulated kernel is damaged.
    """
    if isinstance(image.content, Path):
        return emulator.Kernel(image.spec.name, image.content)
    smem = catalog.smem_bytes(image.spec, image.tile)
    size = ctypes.sizeof(catalog.block(image.spec))
    kernel = driver.load(image.content, image.spec.name, device, smem, size, stream)
    counters.prepare(device)
    return kernel


def emulated_arch(device: object) -> Arch | None:
    """The arch that ``device="emulator"`` or ``"emulator:sm90"`` names; None when it is no emulator.

    Raises:
        InputError: an emulator of an unknown arch.
    """
    if not isinstance(device, str) or device.partition(":")[0] != "emulator":
        return None
    word = device.partition(":")[2] or Arch.SM80.value
    try:
        return Arch(word)
    except ValueError:
        raise InputError(
            f"device is {device!r}; 'emulator' or 'emulator:ARCH' with one of "
            f"{', '.join(a.value for a in Arch)} is needed"
        ) from None

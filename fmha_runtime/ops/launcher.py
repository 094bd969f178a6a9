# SPDX-License-Identifier: Apache-2.0
"""Launches without a plan, and what a plan does on the emulator: outputs full of NaN, and launches that know which
memory may be touched."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..device import driver, emulator, loader
from ..errors import DriverError, EmulatorFault
from ..problem import tensors

if TYPE_CHECKING:
    import torch

L2_BYTES = 64 << 20
"""Of the GPU that is emulated."""

SMS = 2


def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A CPU tensor full of NaN: what a kernel forgets to write shows."""
    import torch

    return torch.empty_strided(shape, strides, dtype=dtype).fill_(float("nan"))


def launch(
    kernel: emulator.Kernel,
    grid: int,
    threads: int,
    smem: int,
    block: Any,
    queued: bool,
    read: Iterable[torch.Tensor | None],
    written: Iterable[torch.Tensor | None],
    work: tuple[torch.Tensor, ...] = (),
) -> None:
    """Runs the kernel to its end.

    Args:
        block: the parameter block, addresses filled in.
        queued: the kernel takes its tiles from a queue: its word is here.
        read: tensors that the kernel may read.
        written: tensors that it may read and write.
        work: its workspace; the last tensor of it counts, and must be zero again.

    Raises:
        EmulatorFault: the kernel did what it must not, or left its queue or its counters at another number than 0.
    """
    buffers = [
        (t.data_ptr(), tensors.extent_bytes(t), writable)
        for group, writable in ((read, False), (written, True), (work, True))
        for t in group
        if t is not None
    ]
    queue = ctypes.c_uint32(0)
    if queued:
        block.queue = ctypes.addressof(queue)
        buffers.append((block.queue, 4, True))
    kernel.launch(grid, threads, smem, 0, ctypes.addressof(block), buffers)
    if queue.value:
        raise EmulatorFault(f"kernel {kernel.name} left its tile queue at {queue.value}, not at 0 again")
    if work and work[-1].any():
        left = int(work[-1].count_nonzero())
        raise EmulatorFault(f"kernel {kernel.name} left {left} counters at other numbers than 0")


def once(
    kernel: loader.Kernel,
    grid: int,
    threads: int,
    smem: int,
    block: Any,
    read: Iterable[torch.Tensor | None],
    written: Iterable[torch.Tensor | None],
) -> None:
    """Launches a kernel that needs no plan: on the current stream of its GPU, or to its end on the emulator. Arguments
    as for ``launch``.

    Raises:
        DriverError: the driver refuses.
        EmulatorFault: the kernel did what it must not.
    """
    if isinstance(kernel, emulator.Kernel):
        launch(kernel, grid, threads, smem, block, False, read, written)
        return
    import torch

    argument = (ctypes.c_void_p * 1)(ctypes.addressof(block))
    with torch.cuda.device(kernel.device):
        stream = torch._C._cuda_getCurrentRawStream(kernel.device)
        try:
            kernel.launch(grid, threads, smem, stream, ctypes.addressof(argument))
        except DriverError as error:
            driver.bind_after(error, kernel.device)
            kernel.launch(grid, threads, smem, stream, ctypes.addressof(argument))

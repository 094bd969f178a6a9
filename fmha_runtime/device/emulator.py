# SPDX-License-Identifier: Apache-2.0
"""Runs kernels on the CPU that gxx.py compiled, with the same interface as driver.py.

The emulator is adversarial: copies land as late as they may, memory starts as NaN, and accesses out
of bounds, races on shared memory and threads that wait in vain raise EmulatorFault.
kernel_src/emulator says how.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from .. import config
from ..errors import ArtifactError, EmulatorFault
from ..kernels import files

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
        files.check_seal(library)  # what is cut short would end the process in the middle of a call
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

# SPDX-License-Identifier: Apache-2.0
"""The CUDA driver: load one cubin, look up its kernel, launch it. Decides nothing.

Every library is loaded lazily, once per process and device, and stays loaded for the life of the process: unloading
during someone's graph capture would break the capture.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..errors import ArtifactError, DriverError, FmhaError
from . import elf

Buffer = tuple[int, int, bool]
"""(address, bytes, writable) of a tensor that a kernel may touch; only the emulator looks at it."""

_REMEDY = {
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the cubin is for another compute capability: see `fmha doctor`",
    "CUDA_ERROR_INVALID_IMAGE": "the cubin is damaged: rebuild it with `fmha build --force`",
    "CUDA_ERROR_NOT_INITIALIZED": "if this process was forked after CUDA was initialised, CUDA did not survive that: "
    "start workers with multiprocessing.get_context('spawn')",
    "CUDA_ERROR_NO_DEVICE": "no GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the loaded libcuda and the kernel module differ: reboot",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "the driver is older than the nvcc that wrote this code",
}


@dataclass(frozen=True)
class DeviceInfo:
    """What a record needs to say about a GPU."""

    name: str
    capability: tuple[int, int]
    sm_count: int
    driver_version: str
    l2_bytes: int
    total_memory: int


@cache
def _api() -> Any:
    """cuda.bindings.driver after cuInit.

    Raises:
        DriverError: the bindings or the driver are missing, or this is a forked child.
    """
    try:
        from cuda.bindings import driver as api
    except ImportError as error:
        raise DriverError(
            f"cuda-bindings cannot be imported ({error}): pip install 'cuda-bindings>=12.8,<14'"
        ) from error
    try:
        (status,) = api.cuInit(0)
    except RuntimeError as error:  # the bindings find no libcuda
        raise DriverError(
            f"no CUDA driver on this machine ({error}); CPU tensors still run: pass them with "
            "device='emulator', or without a device for the torch reference path"
        ) from error
    if int(status) != 0:
        _raise(api, status, "cuInit")
    os.register_at_fork(after_in_child=_refuse_in_child)
    return api


_forked = False


def _refuse_in_child() -> None:
    """A forked child has no CUDA: every look-up asks again and is refused, and no lock is held by a thread it lost."""
    global _forked, _lock
    _forked = True
    _lock = threading.Lock()
    _kernels.clear()
    for found in (_device, _context, capability, l2_bytes, sm_count):
        found.cache_clear()


def _raise(api: Any, status: Any, what: str) -> None:
    name = status.name
    _, text = api.cuGetErrorString(status)
    remedy = _REMEDY.get(name, "")
    text = text.decode() if text else "unknown error"
    raise DriverError(
        f"{what} failed: {name} ({text})" + (f"; {remedy}" if remedy else ""),
        code=int(status),
        name=name,
    )


def check(what: str, result: tuple[Any, ...]) -> Any:
    """The values of a driver call's result tuple.

    Raises:
        DriverError: the status is not CUDA_SUCCESS.
    """
    if int(result[0]) != 0:
        _raise(_api(), result[0], what)
    return result[1] if len(result) == 2 else result[1:]


def call(name: str, *arguments: Any) -> Any:
    """The values of a driver function, by its name.

    Raises:
        DriverError: it failed, or this is a forked child.
    """
    if _forked:
        raise DriverError(
            "this process was forked after CUDA was initialised, which CUDA does not survive: "
            "start workers with multiprocessing.get_context('spawn')"
        )
    return check(name, getattr(_api(), name)(*arguments))


@cache
def _device(index: int) -> Any:
    count = device_count()
    if not 0 <= index < count:
        raise DriverError(f"no CUDA device {index}: {count} visible")
    return call("cuDeviceGet", index)


@cache
def _context(index: int) -> Any:
    """The device's primary context, the one that torch uses; retained for the life of the process."""
    return call("cuDevicePrimaryCtxRetain", _device(index))


def device_count() -> int:
    """Number of visible GPUs.

    Raises:
        DriverError: no driver.
    """
    return int(call("cuDeviceGetCount"))


@cache
def capability(index: int) -> tuple[int, int]:
    """Compute capability (major, minor) of a GPU."""
    return _attribute(index, "COMPUTE_CAPABILITY_MAJOR"), _attribute(index, "COMPUTE_CAPABILITY_MINOR")


@cache
def l2_bytes(index: int) -> int:
    """Size of a GPU's L2 cache in bytes."""
    return _attribute(index, "L2_CACHE_SIZE")


@cache
def sm_count(index: int) -> int:
    """Number of streaming multiprocessors of a GPU."""
    return _attribute(index, "MULTIPROCESSOR_COUNT")


def _attribute(index: int, name: str) -> int:
    key = getattr(_api().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(call("cuDeviceGetAttribute", key, _device(index)))


def device_info(index: int = 0) -> DeviceInfo:
    """Name, size and driver of a GPU.

    Raises:
        DriverError: no driver or no such device.
    """
    device = _device(index)
    name = call("cuDeviceGetName", 256, device).split(b"\0")[0].decode()
    return DeviceInfo(
        name=name,
        capability=capability(index),
        sm_count=sm_count(index),
        driver_version=_driver_version(),
        l2_bytes=l2_bytes(index),
        total_memory=int(call("cuDeviceTotalMem", device)),
    )


def _driver_version() -> str:
    """The kernel driver's version where Linux tells it, else the CUDA version that the driver supports."""
    try:
        with open("/sys/module/nvidia/version") as file:
            return file.read().strip()
    except OSError:
        version = int(call("cuDriverGetVersion"))
        return f"CUDA {version // 1000}.{version % 1000 // 10}"


class Kernel:
    """A loaded kernel on one device. ``launch`` takes a by-value parameter struct by address."""

    __slots__ = ("_function", "_launch", "device", "library", "name", "smem")

    def __init__(self, name: str, device: int, library: Any, function: Any, smem: int) -> None:
        self.name = name
        self.smem = smem
        self.device = device
        self.library = library
        self._function = function
        self._launch = _api().cuLaunchKernel

    def allow(self, smem: int) -> None:
        """Lets launches ask for this many bytes of dynamic shared memory, if it is more than before."""
        if smem > self.smem:
            attribute = _api().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call("cuFuncSetAttribute", self._function, attribute, smem)
            self.smem = smem

    def launch(
        self,
        grid: int,
        threads: int,
        smem: int,
        stream: int,
        params: int,
        buffers: Sequence[Buffer] = (),
    ) -> None:
        """Enqueues the kernel.

        Args:
            grid: number of CTAs (one-dimensional).
            threads: threads of a CTA.
            smem: bytes of dynamic shared memory.
            stream: CUstream handle as an int.
            params: address of an array that holds the address of the parameter struct; both are read before the
                call returns.
            buffers: not used on a GPU. The emulator's ``Kernel.launch`` has the same parameters, so that callers
                need not tell the two apart; it checks every access against these buffers.

        Raises:
            DriverError: the launch was refused, or an earlier kernel of this context failed.
        """
        result = self._launch(self._function, grid, 1, 1, threads, 1, 1, smem, stream, params, 0)
        if result[0]:
            self._refused(result[0])

    def bound(self, threads: int, smem: int, params: int) -> Callable[[int, int], None]:
        """``launch`` with all but grid and stream given once: filling two fields of a prepared block is cheaper than
        eleven arguments. Not for two threads at once.

        Args:
            threads, smem, params: of ``launch``.

        Returns:
            a function of (grid, the stream's handle) that enqueues the kernel; its errors are those of ``launch``.
        """
        config = _LaunchConfig(1, 1, 1, (threads, 1, 1), smem)
        enqueue, function, block = _launch_ex(), int(self._function), ctypes.addressof(config)

        def start(grid: int, stream: int) -> None:
            config.grid = grid
            config.stream = stream
            status = enqueue(block, function, params, None)
            if status:
                self._refused(_api().CUresult(status))

        return start

    def _refused(self, status: Any) -> None:
        if _forked:
            call("cuDriverGetVersion")  # raises with the remedy
        check(f"launch of {self.name}", (status,))


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h, without attributes."""

    _fields_ = [
        ("grid", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block", ctypes.c_uint * 3),
        ("smem", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    ]


@cache
def _launch_ex() -> Callable[[int, int, int, None], int]:
    """cuLaunchKernelEx itself; a call releases the GIL, for it waits while the queue of launches is full."""
    address, _ = call("cuGetProcAddress", b"cuLaunchKernelEx", 12000, 0)
    return ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(int(address))


_kernels: dict[tuple[str, int, bytes], Kernel] = {}
_lock = threading.Lock()


def load(image: bytes, name: str, device: int, smem: int, params_size: int | None = None, stream: int = 0) -> Kernel:
    """Loads a cubin (or PTX text) on a device and prepares its kernel for launching.

    Args:
        image: cubin, or PTX text that the driver compiles.
        name: entry point.
        device: CUDA device index.
        smem: dynamic shared memory in bytes that launches will ask for.
        params_size: bytes of the parameter struct; compared with what the image says.
        stream: the stream that the caller is about to use; loading while it captures a graph is refused.

    Raises:
        DriverError: no driver, the image does not fit the device, or a graph is being captured.
        ArtifactError: the image's parameter block has another size than this version of the library fills.
    """
    key = (name, device, hashlib.sha256(image).digest())
    found = _kernels.get(key)
    if found is not None and smem <= found.smem:
        return found
    with _lock, current(device):
        found = _kernels.get(key)
        if found is not None:  # another thread was here first, or it was loaded for launches with less shared memory
            found.allow(smem)
            return found
        if stream_is_capturing(stream):
            raise DriverError(
                f"{name} is not loaded yet and a CUDA graph is being captured on this stream; loading is not allowed "
                "there. Call fmha_runtime.prepare(...) (or run the call once) before the capture begins."
            )
        api = _api()
        if image[:4] == elf.MAGIC:
            elf.check_whole(name, image)
        text = image if image[:4] == elf.MAGIC else image + b"\0"
        library = call("cuLibraryLoadData", text, [], [], 0, [], [], 0)
        kernel = call("cuLibraryGetKernel", library, name.encode())
        if params_size is not None:
            _, size = call("cuKernelGetParamInfo", kernel, 0)
            if size != params_size:
                raise ArtifactError(
                    f"{name} takes {size} bytes of parameters, this version fills {params_size}: "
                    f"rebuild it with `fmha build --force {name}`",
                    expected=params_size,
                    found=size,
                )
        attribute = api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        call("cuKernelSetAttribute", attribute, smem, kernel, _device(device))
        function = call("cuKernelGetFunction", kernel)
        return _kernels.setdefault(key, Kernel(name, device, library, function, smem))


def registers(kernel: Kernel) -> int:
    """Registers per thread of a loaded kernel, as the driver reports them (after its JIT for PTX)."""
    attribute = _api().CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS
    return int(call("cuFuncGetAttribute", attribute, kernel._function))


def stream_is_capturing(stream: int) -> bool:
    """Whether a CUDA graph is being captured on this stream."""
    result = _api().cuStreamIsCapturing(stream)
    if not result[0]:  # nearly always, and launches ask
        return bool(result[1])  # CU_STREAM_CAPTURE_STATUS_NONE is 0
    if result[0].name == "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT":
        return True  # the legacy stream while another stream captures in global mode
    return bool(check("cuStreamIsCapturing", result))


def capture_id(stream: int) -> int:
    """Which capture of a CUDA graph this stream takes part in; 0: none."""
    if not stream_is_capturing(stream):
        return 0
    found = call("cuStreamGetCaptureInfo", stream)
    return int(found[1]) + 1  # an id is unique in the process, and may be 0


class current:
    """Makes a device's primary context current for a while."""

    def __init__(self, device: int) -> None:
        self.context = _context(device)

    def __enter__(self) -> None:
        call("cuCtxPushCurrent", self.context)

    def __exit__(self, *_: object) -> None:
        call("cuCtxPopCurrent")


INVALID_CONTEXT = 201
"""CUresult of a call in a thread that has no context yet."""


def bind(device: int) -> None:
    """Makes a device's primary context the calling thread's: a thread that has not touched CUDA has none."""
    call("cuCtxSetCurrent", _context(device))


def bind_after(error: DriverError, device: int) -> None:
    """Binds the device's context if a call failed because the calling thread, in its first CUDA call, had none: then it
    can be repeated. Any other error is raised again.
    """
    if error.code != INVALID_CONTEXT:
        raise error
    bind(device)


def ensure_context(device: int) -> None:
    """Binds a device's primary context unless the calling thread has a context already, which then stays."""
    if not int(call("cuCtxGetCurrent")):
        bind(device)


def synchronize(device: int) -> None:
    """Waits for everything on a device; a kernel's fault surfaces here."""
    with current(device):
        call("cuCtxSynchronize")


def available() -> bool:
    """Whether there is a driver and at least one GPU. Never raises."""
    try:
        return device_count() > 0
    except FmhaError:
        return False
    except (OSError, ctypes.ArgumentError):
        return False

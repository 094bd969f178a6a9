# SPDX-License-Identifier: Apache-2.0
"""What driver.py can refuse without a GPU."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace

import pytest

from fmha_runtime.device import driver
from fmha_runtime.errors import ArtifactError, DriverError


def elf(sections: list[tuple[int, int, int]]) -> bytes:
    """A 64-bit ELF image with nothing but section headers (type, offset, size) behind 64 bytes of header."""
    head = bytearray(64)
    head[:4] = b"\x7fELF"
    struct.pack_into("<Q", head, 0x28, 64)
    struct.pack_into("<HH", head, 0x3A, 64, len(sections))
    table = bytearray(64 * len(sections))
    for i, (kind, offset, size) in enumerate(sections):
        struct.pack_into("<I", table, 64 * i + 4, kind)
        struct.pack_into("<QQ", table, 64 * i + 0x18, offset, size)
    return bytes(head + table)


def test_a_whole_image_passes():
    image = elf([(1, 0, 64), (8, 64, 1 << 20)])  # a section without bits in the file may be any size
    driver._check_whole("k", image)


@pytest.mark.parametrize(
    "image",
    [elf([(1, 0, 64)])[:-1], elf([(1, 100, 1000)]), b"\x7fELF", elf([(1, 0, 64)])[:40]],
    ids=["table cut", "section past the end", "magic only", "header cut"],
)
def test_truncated_images_are_refused(image):
    with pytest.raises(ArtifactError, match=r"truncated.*fmha build --force k"):
        driver._check_whole("k", image)


class Queue:
    """Stands for cuLaunchKernelEx: notes the block that it is given."""

    def __init__(self, status=0):
        self.status, self.seen = status, []

    def __call__(self, config, function, params, extra):
        self.seen.append((ctypes.string_at(config, ctypes.sizeof(driver._LaunchConfig)), function, params, extra))
        return self.status


def test_a_bound_launch_fills_the_drivers_struct(monkeypatch):
    api = pytest.importorskip("cuda.bindings.driver")
    queue = Queue()
    monkeypatch.setattr(driver, "_api", lambda: api)
    monkeypatch.setattr(driver, "_launch_ex", lambda: queue)
    start = driver.Kernel("k", 0, None, api.CUfunction(0x5000), 0).bound(7, 384, 1000, 0x6000)
    for stream in (0x51, 0):
        start(stream)
        want = api.CUlaunchConfig()
        want.gridDimX, want.gridDimY, want.gridDimZ = 7, 1, 1
        want.blockDimX, want.blockDimY, want.blockDimZ = 384, 1, 1
        want.sharedMemBytes, want.hStream = 1000, stream
        named = ctypes.string_at(want.getPtr(), ctypes.sizeof(driver._LaunchConfig))
        assert queue.seen.pop() == (named, 0x5000, 0x6000, None)


def test_a_bound_launch_says_what_the_driver_says(monkeypatch):
    api = pytest.importorskip("cuda.bindings.driver")
    stub = SimpleNamespace(
        CUresult=api.CUresult, cuLaunchKernel=None, cuGetErrorString=lambda status: (0, b"no context")
    )
    monkeypatch.setattr(driver, "_api", lambda: stub)
    monkeypatch.setattr(driver, "_launch_ex", lambda: Queue(driver.INVALID_CONTEXT))
    with pytest.raises(DriverError, match=r"launch of k failed: CUDA_ERROR_INVALID_CONTEXT \(no context\)") as caught:
        driver.Kernel("k", 0, None, 0x5000, 0).bound(7, 384, 1000, 0x6000)(0)
    assert caught.value.code == driver.INVALID_CONTEXT


def test_whether_a_stream_is_captured(monkeypatch):
    api = pytest.importorskip("cuda.bindings.driver")
    ok, status = api.CUresult.CUDA_SUCCESS, api.CUstreamCaptureStatus
    answers = {
        0: (ok, status.CU_STREAM_CAPTURE_STATUS_NONE),
        1: (ok, status.CU_STREAM_CAPTURE_STATUS_ACTIVE),
        2: (ok, status.CU_STREAM_CAPTURE_STATUS_INVALIDATED),
        3: (api.CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, None),
        4: (api.CUresult.CUDA_ERROR_INVALID_CONTEXT, None),
    }
    stub = SimpleNamespace(cuStreamIsCapturing=answers.get, cuGetErrorString=lambda code: (ok, b"no context"))
    monkeypatch.setattr(driver, "_api", lambda: stub)
    assert [driver.stream_is_capturing(stream) for stream in range(4)] == [False, True, True, True]
    with pytest.raises(DriverError) as caught:
        driver.stream_is_capturing(4)
    assert caught.value.code == driver.INVALID_CONTEXT

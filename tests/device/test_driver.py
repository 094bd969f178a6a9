# SPDX-License-Identifier: Apache-2.0
"""What driver.py can refuse without a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import struct
from types import SimpleNamespace

import pytest

from fmha_runtime.device import counters, driver, elf, tile_queue
from fmha_runtime.errors import ArtifactError, DriverError


def an_elf(sections: list[tuple[int, int, int]]) -> bytes:
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
    image = an_elf([(1, 0, 64), (8, 64, 1 << 20)])  # a section without bits in the file may be any size
    elf.check_whole("k", image)


@pytest.mark.parametrize(
    "image",
    [an_elf([(1, 0, 64)])[:-1], an_elf([(1, 100, 1000)]), b"\x7fELF", an_elf([(1, 0, 64)])[:40]],
    ids=["table cut", "section past the end", "magic only", "header cut"],
)
def test_truncated_images_are_refused(image):
    with pytest.raises(ArtifactError, match=r"truncated.*fmha build --force k"):
        elf.check_whole("k", image)


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
    start = driver.Kernel("k", 0, None, api.CUfunction(0x5000), 0).bound(384, 1000, 0x6000)
    for stream in (0x51, 0):
        start(7, stream)
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
        driver.Kernel("k", 0, None, 0x5000, 0).bound(384, 1000, 0x6000)(7, 0)
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


class Memory:
    """Stands for the driver of one GPU: hands out addresses, knows which streams are being captured."""

    def __init__(self, monkeypatch):
        self.api = pytest.importorskip("cuda.bindings.driver")
        self.capturing, self.loads = set(), []
        ok = self.api.CUresult.CUDA_SUCCESS
        status = self.api.CUstreamCaptureStatus
        words = {True: status.CU_STREAM_CAPTURE_STATUS_ACTIVE, False: status.CU_STREAM_CAPTURE_STATUS_NONE}
        answers = {
            "cuLaunchKernel": None,
            "cuMemAlloc": lambda size: (ok, 0x7000),
            "cuMemsetD32": lambda *_: (ok,),
            "cuStreamSynchronize": lambda *_: (ok,),
            "cuStreamIsCapturing": lambda stream: (ok, words[stream in self.capturing]),
            "cuLibraryLoadData": lambda image, *_: (self.loads.append(image), (ok, "library"))[1],
            "cuLibraryGetKernel": lambda *_: (ok, "kernel"),
            "cuKernelGetParamInfo": lambda *_: (ok, 0, 320),
            "cuKernelSetAttribute": lambda *_: (ok,),
            "cuKernelGetFunction": lambda *_: (ok, 0x5000),
        }
        enums = {"CUfunction_attribute": self.api.CUfunction_attribute, "CUresult": self.api.CUresult}
        stub = SimpleNamespace(**enums, **answers)
        monkeypatch.setattr(driver, "_launch_ex", lambda: None)
        monkeypatch.setattr(driver, "_api", lambda: stub)
        monkeypatch.setattr(driver, "_device", lambda index: index)
        monkeypatch.setattr(driver, "current", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(driver, "_kernels", {})
        monkeypatch.setattr(tile_queue, "_stream_words", {})
        monkeypatch.setattr(counters, "_left", {})

    def load(self, name="k", stream=0):
        kernel = driver.load(b".version 8", name, 0, 1000, 320, stream)
        counters.prepare(0)
        return kernel


def test_a_stream_keeps_its_word_and_each_captured_launch_has_its_own(monkeypatch):
    memory = Memory(monkeypatch)
    memory.load()
    first, other = tile_queue.word(0, 0x51), tile_queue.word(0, 0x52)
    assert first != other and first % 4 == other % 4 == 0
    assert tile_queue.word(0, 0x51) == first  # launches of one stream follow each other
    memory.capturing = {0x51}
    captured = [tile_queue.word(0, 0x51) for _ in range(3)]
    assert len({first, other, *captured}) == 5, "a graph may run beside its stream, and beside another graph"
    memory.capturing = set()
    assert tile_queue.word(0, 0x51) == first
    assert tile_queue.word(0, 0x53) not in {first, other, *captured}


def test_a_word_is_kept_by_none_that_met_its_stream_in_a_capture(monkeypatch):
    memory = Memory(monkeypatch)
    memory.load()
    memory.capturing = {0x60}
    captured = tile_queue.word(0, 0x60)
    memory.capturing = set()
    assert tile_queue.word(0, 0x60) != captured


def test_no_word_where_none_is_safe(monkeypatch):
    memory = Memory(monkeypatch)
    monkeypatch.setattr(counters, "WORDS", 2)
    memory.load()
    assert tile_queue.word(0, 2) is None, "the per-thread default stream means a stream a thread"
    words = [tile_queue.word(0, stream) for stream in (10, 11, 12)]
    assert words[0] is not None and words[1] is not None and words[2] is None


def test_loading_while_the_stream_is_captured_is_refused(monkeypatch):
    memory = Memory(monkeypatch)
    memory.capturing = {0x51}
    with pytest.raises(DriverError, match=r"graph is being captured.*fmha_runtime\.prepare"):
        memory.load(stream=0x51)
    assert memory.loads == []
    kernel = memory.load(stream=0x52)
    assert len(memory.loads) == 1
    assert memory.load(stream=0x51) is kernel, "what is loaded already may be captured"


def test_a_block_of_another_size_is_refused(monkeypatch):
    memory = Memory(monkeypatch)
    with pytest.raises(ArtifactError, match=r"takes 320 bytes of parameters, this version fills 312"):
        driver.load(b".version 8", "k", 0, 1000, 312, 0)
    assert memory.loads and not driver._kernels

# SPDX-License-Identifier: Apache-2.0
"""A GPU that is none: CPU tensors take the path of CUDA tensors up to the driver, which only takes notes."""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace

import torch

from fmha_runtime.calls import route
from fmha_runtime.device import counters, driver, tensor_map, tile_queue
from fmha_runtime.kernels import catalog
from fmha_runtime.kernels.spec import Arch
from fmha_runtime.ops.forward.binding import Binding
from fmha_runtime.ops.works import WORK
from fmha_runtime.problem import arguments, dispatch

STREAM = 0x51
COUNTERS = 0xC0000
QUEUE = 0x70000


class _Kernel:
    """Stands for a loaded kernel of device 0."""

    def __init__(self, spec, stub):
        self.name, self.device, self._stub, self._block = spec.name, 0, stub, catalog.block(spec)

    def bound(self, threads, smem, argument):
        def start(grid, stream):
            fields = {"name": self.name, "grid": grid, "threads": threads, "smem": smem}
            if self._stub.refusals:
                raise self._stub.refusals.pop(0)
            at = ctypes.c_void_p.from_address(argument).value
            block = self._block.from_buffer_copy((ctypes.c_char * ctypes.sizeof(self._block)).from_address(at))
            self._stub.launches.append(SimpleNamespace(**fields, stream=stream, block=block, device=self._stub.current))

        return start

    def launch(self, grid, threads, smem, stream, argument):
        self.bound(threads, smem, argument)(grid, stream)


class StubDevice:
    """Installs itself with monkeypatch.

    Attributes:
        launches: of all kernels: name, grid, threads, smem, stream, parameter block, the device that was current.
        refusals: errors that the next launches raise.
        current: the current device, as torch would say.
        bound: devices that were made a thread's own.
        bindings: how many were made.
        encoded: layouts of the tensor maps that were written.
        encode_refusals: what the next attempts at that return instead.
    """

    def __init__(self, monkeypatch, arch=Arch.SM90):
        self.launches, self.refusals, self.current, self.arch = [], [], 0, arch
        self.bound, self.bindings, self.encoded, self.encode_refusals = [], 0, [], []
        guards = torch._C._dynamo.guards
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: self.current, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM + device, raising=False)
        monkeypatch.setattr(guards, "_empty_strided_cuda", guards._empty_strided_cpu, raising=False)
        monkeypatch.setattr(torch.cuda, "device", self._switch)
        monkeypatch.setattr(driver, "sm_count", lambda index: 132)
        monkeypatch.setattr(driver, "l2_bytes", lambda index: 50 << 20)
        monkeypatch.setattr(driver, "bind", self.bound.append)
        monkeypatch.setattr(tile_queue, "word", lambda device, stream: QUEUE + 4 * stream)
        monkeypatch.setattr(counters, "prepare", lambda device: None)
        monkeypatch.setattr(counters, "words", lambda device, stream, count: COUNTERS + 4 * stream)
        monkeypatch.setattr(tensor_map, "_library", lambda: SimpleNamespace(cuTensorMapEncodeTiled=self._encode))
        monkeypatch.setattr(tensor_map, "replace_address", tensor_map.replace_address_emulated)
        monkeypatch.setattr(route, "bind", self._bind)
        monkeypatch.setattr(route, "_plans", {})
        monkeypatch.setattr(route, "_bindings", {})
        monkeypatch.setattr(route, "_seen", {})
        monkeypatch.setattr(route, "_mine", route._Mine())

    @contextlib.contextmanager
    def _switch(self, device):
        before, self.current = self.current, device
        yield
        self.current = before

    def _bind(self, q, shape, options, extras, device, stream, fallback, tile):
        opts = arguments.options(**options)
        spec = dispatch.choose(route.problem(self.arch, q, shape, opts, extras)).spec
        self.bindings += 1
        work = WORK.get(spec.op)
        return Binding(_Kernel(spec, self), spec, catalog.tile(spec), opts, shape.page_size, work)

    def _encode(self, slot, kind, rank, address, dims, strides, box, ones, interleave, swizzle, promotion, fill):
        """cuTensorMapEncodeTiled, as the emulator reads maps."""
        if self.encode_refusals:
            return self.encode_refusals.pop(0)
        assert (rank, list(ones)[:4], interleave, promotion, fill) == (4, [1] * 4, 0, 3, 0)
        dtype = next(d for d, number in tensor_map._TYPES.items() if number == kind)
        dims, strides = (ctypes.c_uint64 * 4).from_address(dims), (ctypes.c_uint64 * 3).from_address(strides)
        layout = tensor_map.TensorMapLayout(tuple(dims), tuple(strides), tuple(box), tensor_map.Swizzle(swizzle), dtype)
        tensor_map.encode_emulated(layout, address, slot)
        self.encoded.append(layout)
        return 0

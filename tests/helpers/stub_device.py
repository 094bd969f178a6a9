# SPDX-License-Identifier: Apache-2.0
"""A GPU that is none: CPU tensors take the path of CUDA tensors up to the driver, which only takes notes."""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace

import torch

from fmha_runtime.calls import route
from fmha_runtime.device import driver, tensor_map, tile_queue
from fmha_runtime.kernels import catalog
from fmha_runtime.kernels.spec import Arch
from fmha_runtime.ops.forward import plan as forward
from fmha_runtime.problem import arguments, dispatch

STREAM = 0x51
QUEUE = 0x70000


class _Kernel:
    """Stands for a loaded kernel of device 0."""

    def __init__(self, spec, stub):
        self.name, self.device, self._stub, self._block = spec.name, 0, stub, catalog.block(spec)

    def bound(self, grid, threads, smem, argument):
        fields = {"name": self.name, "grid": grid, "threads": threads, "smem": smem}

        def start(stream):
            if self._stub.refusals:
                raise self._stub.refusals.pop(0)
            at = ctypes.c_void_p.from_address(argument).value
            block = self._block.from_buffer_copy((ctypes.c_char * ctypes.sizeof(self._block)).from_address(at))
            self._stub.launches.append(SimpleNamespace(**fields, stream=stream, block=block, device=self._stub.current))

        return start

    def launch(self, grid, threads, smem, stream, argument):
        self.bound(grid, threads, smem, argument)(stream)


class StubDevice:
    """Installs itself with monkeypatch.

    Attributes:
        launches: of all kernels: name, grid, threads, smem, stream, parameter block, the device that was current.
        refusals: errors that the next launches raise.
        current: the current device, as torch would say.
        bound: devices that were made a thread's own.
        contexts: devices for which a context was asked before anything was encoded.
    """

    def __init__(self, monkeypatch, arch=Arch.SM90):
        self.launches, self.refusals, self.current, self.arch = [], [], 0, arch
        self.bound, self.contexts = [], []
        guards = torch._C._dynamo.guards
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: self.current, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM + device, raising=False)
        monkeypatch.setattr(guards, "_empty_strided_cuda", guards._empty_strided_cpu, raising=False)
        monkeypatch.setattr(torch.cuda, "device", self._switch)
        monkeypatch.setattr(driver, "sm_count", lambda index: 132)
        monkeypatch.setattr(driver, "l2_bytes", lambda index: 50 << 20)
        monkeypatch.setattr(driver, "bind", self.bound.append)
        monkeypatch.setattr(driver, "ensure_context", self.contexts.append)
        monkeypatch.setattr(tile_queue, "word", lambda device, stream: QUEUE + 4 * stream)
        monkeypatch.setattr(tensor_map, "encode", tensor_map.encode_emulated)
        monkeypatch.setattr(tensor_map, "replace_address", tensor_map.replace_address_emulated)
        monkeypatch.setattr(route, "make_plan", self._make_plan)
        monkeypatch.setattr(route, "_plans", {})

    @contextlib.contextmanager
    def _switch(self, device):
        before, self.current = self.current, device
        yield
        self.current = before

    def _make_plan(self, q, k, v, lengths, options, extras, out, device, stream, fallback, tile=None):
        shape, opts = route.checked(q, k, v, lengths, extras, out), arguments.options(**options)
        spec = dispatch.choose(route.problem(self.arch, q, shape, opts, extras)).spec
        given = (lengths[0], lengths[1], lengths[4])
        return forward.Plan(_Kernel(spec, self), spec, catalog.tile(spec), shape, opts, q, k, v, out, extras, given)

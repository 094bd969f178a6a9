# SPDX-License-Identifier: Apache-2.0
"""Small kernels for the emulator's tests: a body, arrays in, arrays out."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from fmha_runtime.device import emulator
from fmha_runtime.errors import EmulatorFault
from fmha_runtime.ops import obtain

_SOURCE = """
#include <ptx/sm80.cuh>
#include <ptx/sm90.cuh>
#include <ptx/wgmma.cuh>
using namespace fmha;
struct Params {{ const void* in[4]; void* out[4]; }};
FMHA_KERNEL(probe, Params, 256, 1) {{
    const uint32_t t = thread_idx(), smem = smem_base();
    const uint32_t* in = static_cast<const uint32_t*>(params.in[0]);
    uint32_t* out = static_cast<uint32_t*>(params.out[0]);
    (void)t; (void)smem; (void)in; (void)out;
    {body}
}}
"""


class _Params(ctypes.Structure):
    _fields_ = (("inputs", ctypes.c_void_p * 4), ("outputs", ctypes.c_void_p * 4))


def run(
    body: str,
    inputs: Sequence[np.ndarray] = (),
    outputs: Sequence[np.ndarray] = (),
    *,
    threads: int = 32,
    grid: int = 1,
    smem: int = 1024,
    order: emulator.Order = emulator.Order.FORWARD,
    seed: int = 0,
) -> None:
    """Runs a kernel body; it sees params, t, smem, and in and out: the first array as uint32_t*."""
    kernel = obtain.from_source(_SOURCE.format(body=body), "probe")
    kernel.order, kernel.seed = order, seed
    params = _Params()
    for field, arrays in ((params.inputs, inputs), (params.outputs, outputs)):
        for i, array in enumerate(arrays):
            assert array.flags.c_contiguous
            field[i] = array.ctypes.data
    buffers = [(a.ctypes.data, a.nbytes, False) for a in inputs]
    buffers += [(a.ctypes.data, a.nbytes, True) for a in outputs]
    kernel.launch(grid, threads, smem, 0, ctypes.addressof(params), buffers)


def fault(body: str, *args: object, **kwargs: object) -> str:
    """The text of the fault that the body must cause."""
    try:
        run(body, *args, **kwargs)  # type: ignore[arg-type]
    except EmulatorFault as error:
        return str(error)
    raise AssertionError(f"no fault was raised by:\n{body}")


def aligned(array: np.ndarray, to: int = 16) -> np.ndarray:
    """A copy whose first byte is aligned, which numpy does not promise."""
    raw = np.empty(array.nbytes + to, np.uint8)
    start = -raw.ctypes.data % to
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy

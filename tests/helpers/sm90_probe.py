# SPDX-License-Identifier: Apache-2.0
"""Kernels of one Hopper instruction each, for the emulator and the GPU alike, and numpy layouts.

A *tile* is a matrix in shared memory as the copy engine leaves it: groups of columns as wide as the
swizzle span, one group after the other, rows of a group one span apart, 16-byte chunks permuted.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fmha_runtime.device import emulator
from fmha_runtime.ops import obtain
from helpers.emulator_probe import aligned

MAX_STEPS = 20

# launch(source, name, threads, smem, params, arrays in, arrays out)
Launch = Callable[[str, str, int, int, ctypes.Structure, Sequence[np.ndarray], Sequence[np.ndarray]], None]

WGMMA_SOURCE = """
#include <ptx/sm90.cuh>
#include <ptx/wgmma.cuh>
struct Params {
    const uint32_t* image; const uint32_t* a_registers; const float* start; float* out;
    uint64_t a[%(max_steps)d], b[%(max_steps)d];
    uint32_t bytes; int32_t steps, accumulate;
};
FMHA_KERNEL(%(name)s, Params, 128, 1) {
    using namespace fmha;
    const uint32_t t = thread_idx(), smem = smem_base();
    for (uint32_t i = t * 16; i < params.bytes; i += 128 * 16)
        st_shared_v4(smem + i, ld_global_v4(params.image + i / 4));
    fence_async_shared();
    sync_cta();
    float d[%(n)d / 2];
    uint32_t a[%(max_steps)d][4];
    FMHA_UNROLL
    for (int i = 0; i < %(n)d / 2; ++i) d[i] = ld_global_f32(params.start + t * %(n)d / 2 + i);
    if (%(rs)d)
        FMHA_UNROLL
        for (int i = 0; i < %(max_steps)d; ++i)
            FMHA_UNROLL
            for (int j = 0; j < 4; ++j)
                a[i][j] = i < params.steps ? params.a_registers[(i * 128 + t) * 4 + j] : 0;
    const uint64_t base = (smem & 0x3ffff) >> 4;
    pin(d);
    wgmma_fence();
    FMHA_UNROLL
    for (int i = 0; i < %(max_steps)d; ++i)
        if (i < params.steps) {
            const int accumulate = i != 0 || params.accumulate;
            %(call)s;
        }
    wgmma_commit();
    wgmma_wait<0>();
    pin(d);
    for (int i = 0; i < %(n)d / 2; ++i) st_global_f32(params.out + t * %(n)d / 2 + i, d[i]);
}
"""


class WgmmaParams(ctypes.Structure):
    """Params of WGMMA_SOURCE."""

    _fields_ = (
        ("image", ctypes.c_void_p),
        ("a_registers", ctypes.c_void_p),
        ("start", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("a", ctypes.c_uint64 * MAX_STEPS),
        ("b", ctypes.c_uint64 * MAX_STEPS),
        ("bytes", ctypes.c_uint32),
        ("steps", ctypes.c_int32),
        ("accumulate", ctypes.c_int32),
    )


def wgmma_source(element: str, n: int, rs: bool) -> tuple[str, str]:
    """Source and name of the kernel."""
    name = f"wgmma_{'rs' if rs else 'ss'}_{element.lower()}_n{n}"
    operand = "rs_trans(d, a[i], " if rs else "ss(d, params.a[i] + base, "
    call = f"Wgmma<{element}, {n}>::{operand}params.b[i] + base, accumulate)"
    fields = {"name": name, "n": n, "rs": int(rs), "call": call, "max_steps": MAX_STEPS}
    return WGMMA_SOURCE % fields, name


# --- layouts, written down independently of the emulator ---


def swizzled(offset: np.ndarray, span: int) -> np.ndarray:
    """Byte offsets, relative to a multiple of 1024, after the swizzle; span 16: none."""
    return offset ^ (offset // 128 % (span // 16) * 16)


def tile_image(tile: np.ndarray, span: int) -> np.ndarray:
    """A matrix of 16-bit numbers as bytes of shared memory; the columns are padded with NaN."""
    rows, columns = tile.shape
    groups = -(-columns * 2 // span)
    image = np.full(groups * rows * span, 0xFF, np.uint8)
    r, c = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    offset = swizzled(c * 2 // span * rows * span + r * span + c * 2 % span, span)
    for byte in range(2):
        image[offset + byte] = tile >> 8 * byte & 0xFF
    return image


def descriptor(offset: int, leading: int, stride: int, span: int) -> int:
    """A shared-memory matrix descriptor; sizes in bytes."""
    mode = {16: 0, 128: 1, 64: 2, 32: 3}[span]
    return mode << 62 | (stride >> 4) << 32 | (leading >> 4) << 16 | offset >> 4


def k_major_steps(offset: int, rows: int, depth: int, span: int) -> list[int]:
    """Descriptors of a tile whose columns are the depth, one for each 16 of them."""
    found = []
    for k in range(0, depth, 16):
        group, inside = divmod(k * 2, span)
        found.append(descriptor(offset + group * rows * span + inside, 16, 8 * span, span))
    return found


def mn_major_steps(offset: int, depth: int, span: int) -> list[int]:
    """Descriptors of a tile whose rows are the depth, one for each 16 of them."""
    return [descriptor(offset + k * span, depth * span, 8 * span, span) for k in range(0, depth, 16)]


# --- running ---


def emulate(
    source: str,
    name: str,
    threads: int,
    smem: int,
    params: ctypes.Structure,
    inputs: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    order: emulator.Order = emulator.Order.FORWARD,
) -> None:
    """Launches on the emulator: pointers in params are the arrays' own."""
    kernel = obtain.from_source(source, name)
    kernel.order = order
    raw = ctypes.create_string_buffer(ctypes.sizeof(params) + 64)
    slot = -(-ctypes.addressof(raw) // 64) * 64
    ctypes.memmove(slot, ctypes.addressof(params), ctypes.sizeof(params))
    buffers = [(a.ctypes.data, a.nbytes, False) for a in inputs]
    buffers += [(a.ctypes.data, a.nbytes, True) for a in outputs]
    kernel.launch(1, threads, smem, 0, slot, buffers)


@dataclass(frozen=True)
class Operands:
    """Bit patterns of A [64, depth] and B [depth, n], and their exact product."""

    a: np.ndarray
    b: np.ndarray
    product: np.ndarray


def operands(element: str, n: int, depth: int, seed: int = 0) -> Operands:
    """Random operands of a 64 x n x depth product."""
    dtype = {"Fp16": torch.float16, "Bf16": torch.bfloat16}[element]
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((64, depth), (depth, n)))
    bits = [x.view(torch.uint16).numpy() for x in (a, b)]
    return Operands(bits[0], bits[1], (a.double() @ b.double()).numpy())


def accumulator_to_matrix(out: np.ndarray, n: int) -> np.ndarray:
    """[128 threads, n / 2] registers as the 64 x n matrix."""
    thread, i = np.meshgrid(np.arange(128), np.arange(n // 2), indexing="ij")
    matrix = np.empty((64, n), np.float32)
    row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
    matrix[row, i // 4 * 8 + thread % 4 * 2 + i % 2] = out
    return matrix


def a_registers(a: np.ndarray) -> np.ndarray:
    """A [64, depth] as the registers of an operand: [depth / 16, 128 threads, 4]."""
    depth = a.shape[1]
    k, thread, r = np.meshgrid(np.arange(depth // 16), np.arange(128), np.arange(4), indexing="ij")
    row = thread // 32 * 16 + thread % 32 // 4 + r % 2 * 8
    column = k * 16 + r // 2 * 8 + thread % 4 * 2
    return a[row, column].astype(np.uint32) | a[row, column + 1].astype(np.uint32) << 16


def run_wgmma(
    launch: Launch,
    element: str,
    n: int,
    image: np.ndarray,
    b_steps: Sequence[int],
    a_steps: Sequence[int] = (),
    registers: np.ndarray | None = None,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """The 64 x n result of one batch of wgmma, SS or with A in registers.

    Args:
        launch: ``emulate`` or the GPU's.
        element: ``Fp16`` or ``Bf16``.
        n: columns.
        image: shared memory, as bytes.
        b_steps, a_steps: descriptors, relative to the start of shared memory.
        registers: operand A, for the RS form.
        start: [128, n / 2] registers to add to; zeros that are not added to by default.
    """
    source, name = wgmma_source(element, n, registers is not None)
    image = aligned(np.pad(image, (0, -len(image) % 16), constant_values=255))
    start_array = aligned(np.zeros((128, n // 2), np.float32) if start is None else start)
    a_array = aligned(np.zeros(4, np.uint32) if registers is None else registers)
    out = aligned(np.full((128, n // 2), np.nan, np.float32))
    params = WgmmaParams(
        image=image.ctypes.data,
        a_registers=a_array.ctypes.data,
        start=start_array.ctypes.data,
        out=out.ctypes.data,
        bytes=len(image),
        steps=len(b_steps),
        accumulate=int(start is not None),
    )
    params.a[: len(a_steps)] = a_steps
    params.b[: len(b_steps)] = b_steps
    launch(source, name, 128, len(image), params, [image, start_array, a_array], [out])
    return accumulator_to_matrix(out, n)


def ss_case(launch: Launch, element: str, n: int, depth: int, span: int) -> float:
    """Largest error of Q K^T with both operands in swizzled tiles."""
    x = operands(element, n, depth)
    a, b = tile_image(x.a, span), tile_image(x.b.T, span)
    got = run_wgmma(
        launch,
        element,
        n,
        np.concatenate([a, b]),
        k_major_steps(len(a), n, depth, span),
        k_major_steps(0, 64, depth, span),
    )
    return float(np.abs(got - x.product).max())


def rs_case(launch: Launch, element: str, n: int, depth: int, span: int) -> float:
    """Largest error of P V with P in registers and V as it lies."""
    x = operands(element, n, depth)
    image, steps = tile_image(x.b, span), mn_major_steps(0, depth, span)
    got = run_wgmma(launch, element, n, image, steps, registers=a_registers(x.a))
    return float(np.abs(got - x.product).max())

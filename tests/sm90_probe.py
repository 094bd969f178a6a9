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
from emulator_probe import aligned

from fmha_runtime import emulator, tensor_map
from fmha_runtime.params import TensorMap
from fmha_runtime.spec import DType
from fmha_runtime.tensor_map import Swizzle, TensorMapLayout

MAX_STEPS = 20

# launch(source, name, threads, smem, params, arrays in, arrays out)
Launch = Callable[[str, str, int, int, ctypes.Structure, Sequence[np.ndarray], Sequence[np.ndarray]], None]

TMA_SOURCE = """
#include "params.h"
#include <ptx/sm90.cuh>
struct Params { fmha::TensorMap map; uint32_t* out; int32_t at[4]; uint32_t bytes; };
FMHA_KERNEL(tma_dump, Params, 128, 1) {
    using namespace fmha;
    const uint32_t t = thread_idx(), smem = smem_base(), bar = smem + params.bytes;
    if (t == 0) {
        tma_prefetch_map(&params.map);
        mbarrier_init(bar, 1);
        mbarrier_init_fence();
    }
    sync_cta();
    if (t == 0) {
        mbarrier_arrive_expect(bar, params.bytes);
        tma_load_4d(smem, &params.map, bar, params.at[0], params.at[1], params.at[2], params.at[3]);
    }
    mbarrier_wait(bar, 0);
    for (uint32_t i = t * 16; i < params.bytes; i += 128 * 16)
        st_global_v4(params.out + i / 4, ld_shared_v4(smem + i));
}
"""

# Tiles below each other through a ring of two stages; then, if asked, the last one's box is loaded again.
TMA_STORE_SOURCE = """
#include "params.h"
#include <ptx/sm90.cuh>
struct Params {
    fmha::TensorMap map; const uint32_t* image; uint32_t* out; int32_t at[4];
    uint32_t bytes; int32_t tiles, rows, load;
};
FMHA_KERNEL(tma_store, Params, 128, 1) {
    using namespace fmha;
    const uint32_t t = thread_idx(), smem = smem_base(), stage_bytes = (params.bytes + 1023) / 1024 * 1024;
    const uint32_t bar = smem + 2 * stage_bytes;
    if (t == 0) {
        mbarrier_init(bar, 1);
        mbarrier_init_fence();
    }
    int row = params.at[1];
    for (int tile = 0; tile < params.tiles; ++tile, row += params.rows) {
        const uint32_t stage = smem + tile % 2 * stage_bytes;
        if (t == 0) tma_store_wait_read<1>();
        sync_cta();
        for (uint32_t i = t * 16; i < params.bytes; i += 128 * 16)
            st_shared_v4(stage + i, ld_global_v4(params.image + (tile * params.bytes + i) / 4));
        fence_async_shared();
        sync_cta();
        if (t == 0) {
            tma_store_4d(&params.map, stage, params.at[0], row, params.at[2], params.at[3]);
            tma_store_commit();
        }
    }
    if (!params.load) {
        if (t == 0) tma_store_wait_read<0>();
        return;
    }
    if (t == 0) {
        tma_store_wait<0>();
        mbarrier_arrive_expect(bar, params.bytes);
        tma_load_4d(smem, &params.map, bar, params.at[0], row - params.rows, params.at[2], params.at[3]);
    }
    mbarrier_wait(bar, 0);
    for (uint32_t i = t * 16; i < params.bytes; i += 128 * 16)
        st_global_v4(params.out + i / 4, ld_shared_v4(smem + i));
}
"""

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


class TmaParams(ctypes.Structure):
    """Params of TMA_SOURCE."""

    _fields_ = (
        ("map", TensorMap),
        ("out", ctypes.c_void_p),
        ("at", ctypes.c_int32 * 4),
        ("bytes", ctypes.c_uint32),
        ("padding", ctypes.c_uint32 * 9),
    )


class TmaStoreParams(ctypes.Structure):
    """Params of TMA_STORE_SOURCE."""

    _fields_ = (
        ("map", TensorMap),
        ("image", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("at", ctypes.c_int32 * 4),
        ("bytes", ctypes.c_uint32),
        ("tiles", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("load", ctypes.c_int32),
        ("padding", ctypes.c_uint32 * 4),
    )


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
    kernel = emulator.load_source(source, name)
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


@dataclass(frozen=True)
class TmaCase:
    """A box of a [batch, rows, heads, columns] tensor."""

    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    rows: int
    columns: int
    swizzle: Swizzle
    at: tuple[int, int, int, int]  # column, row, head, batch

    @property
    def layout(self) -> TensorMapLayout:
        """What the tensor map encodes."""
        return tensor_map.layout(self.shape, self.strides, DType.BF16, self.rows, self.columns, self.swizzle)

    def storage(self) -> np.ndarray:
        """Numbers that are all different, as long as there are not more than 65535."""
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return aligned(np.arange(1, last + 2).astype(np.uint16))

    def inside(self, storage: np.ndarray, tile: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The part of the tensor that the box, so many times its rows further down, covers, as a view; and which
        elements of the box those are."""
        view = np.lib.stride_tricks.as_strided(storage, self.shape, tuple(2 * s for s in self.strides))
        c0, row0, head, batch = self.at
        rows = row0 + tile * self.rows + np.arange(self.rows)
        columns = c0 + np.arange(self.columns)
        covered = np.outer((rows >= 0) & (rows < self.shape[1]), (columns >= 0) & (columns < self.shape[3]))
        if not (covered.any() and 0 <= head < self.shape[2] and 0 <= batch < self.shape[0]):
            return view[:0, 0, 0], np.zeros_like(covered)
        end_row, end_column = rows[-1] + 1, columns[-1] + 1
        return view[batch, max(rows[0], 0) : end_row, head, max(c0, 0) : end_column], covered

    def want(self, storage: np.ndarray, tile: int = 0) -> np.ndarray:
        """The box as bytes of shared memory."""
        box = np.zeros((self.rows, self.columns), np.uint16)
        view, covered = self.inside(storage, tile)
        box[covered] = view.ravel()
        return self.image(box)

    def image(self, box: np.ndarray) -> np.ndarray:
        """[rows, columns] numbers as bytes of shared memory."""
        if self.swizzle is Swizzle.NONE:
            return box.reshape(-1).view(np.uint8)
        return tile_image(box, self.swizzle.span)


TMA_CASES = {
    "128-byte swizzle": TmaCase((2, 40, 3, 64), (40 * 192, 192, 64, 1), 32, 64, Swizzle.B128, (0, 8, 1, 1)),
    "64-byte swizzle": TmaCase((2, 40, 3, 32), (40 * 96, 96, 32, 1), 32, 32, Swizzle.B64, (0, 8, 2, 0)),
    "32-byte swizzle": TmaCase((1, 40, 1, 16), (640, 16, 16, 1), 40, 16, Swizzle.B32, (0, 0, 0, 0)),
    "no swizzle": TmaCase((1, 40, 2, 24), (1920, 48, 24, 1), 8, 24, Swizzle.NONE, (0, 3, 1, 0)),
    "rows past the end": TmaCase((1, 40, 1, 64), (2560, 64, 64, 1), 32, 64, Swizzle.B128, (0, 30, 0, 0)),
    "rows before the start": TmaCase((1, 40, 1, 64), (2560, 64, 64, 1), 32, 64, Swizzle.B128, (0, -5, 0, 0)),
    "columns past the head dim": TmaCase((1, 40, 2, 40), (3200, 80, 40, 1), 32, 64, Swizzle.B128, (0, 4, 1, 0)),
    "second column group": TmaCase((1, 40, 2, 104), (8320, 208, 104, 1), 16, 64, Swizzle.B128, (64, 4, 1, 0)),
    "wholly outside": TmaCase((1, 40, 1, 64), (2560, 64, 64, 1), 8, 64, Swizzle.B128, (0, 0, 0, 1)),
    "any strides of dimensions of size 1": TmaCase((1, 40, 1, 64), (7, 72, 13, 1), 16, 64, Swizzle.B128, (0, 1, 0, 0)),
    "heads outside rows": TmaCase((2, 24, 3, 64), (24 * 192, 64, 24 * 64, 1), 24, 64, Swizzle.B128, (0, 0, 2, 1)),
    "one key for all heads": TmaCase((2, 24, 3, 64), (24 * 64, 64, 0, 1), 24, 64, Swizzle.B128, (0, 0, 2, 1)),
}


def run_tma(
    launch: Launch, encode: Callable[[TensorMapLayout, int, int], None], case: TmaCase
) -> tuple[np.ndarray, np.ndarray]:
    """Shared memory after one copy, and what it should hold; ``encode`` is tensor_map's."""
    storage = case.storage()
    size = case.layout.box_bytes
    out = aligned(np.zeros(size, np.uint8))
    params = TmaParams(out=out.ctypes.data, at=case.at, bytes=size)
    raw = (ctypes.c_uint8 * 192)()
    slot = -(-ctypes.addressof(raw) // 64) * 64
    encode(case.layout, storage.ctypes.data, slot)
    ctypes.memmove(ctypes.addressof(params.map), slot, tensor_map.MAP_BYTES)
    launch(TMA_SOURCE, "tma_dump", 128, size + 16, params, [storage], [out])
    return out, case.want(storage)


def run_tma_store(
    launch: Launch, encode: Callable[[TensorMapLayout, int, int], None], case: TmaCase, tiles: int, load: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """So many boxes stored below each other.

    Args:
        launch: ``emulate`` or the GPU's; its last argument is [the tensor, what was loaded again].
        encode: tensor_map's.
        case: where the first box lies.
        tiles: how many.
        load: whether the last box is loaded again after a wait for its store.

    Returns:
        the tensor's memory and what it should hold; the box that was loaded again and what it should be, both zeros
        without ``load``.
    """
    boxes = np.random.default_rng(tiles).integers(1, 1 << 16, (tiles, case.rows, case.columns), np.uint16)
    storage, want = case.storage(), case.storage()
    for tile, box in enumerate(boxes):
        view, covered = case.inside(want, tile)
        view[...] = box[covered].reshape(view.shape)
    size = case.layout.box_bytes
    image = aligned(np.concatenate([case.image(box) for box in boxes]))
    out = aligned(np.zeros(size, np.uint8))
    params = TmaStoreParams(
        image=image.ctypes.data, out=out.ctypes.data, at=case.at, bytes=size, tiles=tiles, rows=case.rows, load=load
    )
    raw = (ctypes.c_uint8 * 192)()
    slot = -(-ctypes.addressof(raw) // 64) * 64
    encode(case.layout, storage.ctypes.data, slot)
    ctypes.memmove(ctypes.addressof(params.map), slot, tensor_map.MAP_BYTES)
    smem = 2 * (-(-size // 1024) * 1024) + 16
    launch(TMA_STORE_SOURCE, "tma_store", 128, smem, params, [image], [storage, out])
    return storage, want, out, case.want(want, tiles - 1) if load else np.zeros_like(out)

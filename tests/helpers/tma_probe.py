# SPDX-License-Identifier: Apache-2.0
"""Kernels that load and store tiles with Hopper's copy engine, for the emulator and the GPU alike, and what they should
move."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fmha_runtime.device import tensor_map
from fmha_runtime.device.tensor_map import Swizzle, TensorMapLayout
from fmha_runtime.kernels.forward.params import TensorMap
from fmha_runtime.kernels.spec import DType
from helpers.emulator_probe import aligned
from helpers.sm90_probe import Launch, tile_image

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

STORE_CASES = {name: case for name, case in TMA_CASES.items() if min(case.at) >= 0}
"""A store with a negative coordinate is a fault, on an H200 ("an illegal instruction was encountered") and here."""


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

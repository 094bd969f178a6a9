# SPDX-License-Identifier: Apache-2.0
"""The copy engine's stores on the emulator: what arrives, when, and what must not happen meanwhile."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers.emulator_probe import aligned, fault, run
from helpers.sm90_probe import emulate
from helpers.tma_probe import STORE_CASES, run_tma_store
from test_emulator_sm90 import LOAD, SMEM, TMA, WAIT, expect, tensor_map_of

from fmha_runtime.device import tensor_map
from fmha_runtime.device.emulator import Order
from fmha_runtime.device.tensor_map import Swizzle
from fmha_runtime.kernels.spec import DType

pytestmark = pytest.mark.emulator

STORE_SMEM = "const void* map = params.in[1]; for (uint32_t i = t; i < 256; i += 64)"
STORE_SMEM += "st_shared_v4(smem + i * 16, {{i, i, i, t}});"
SEEN = "fence_async_shared(); sync_cta();"
STORE_TILE = "if (t == 0) { tma_store_4d(map, smem, 0, 0, 0, 0); tma_store_commit(); }"
STORED = "if (t == 0) tma_store_wait_read<0>();"
WRITE_0 = "if (t == 0) st_shared_u32(smem, 1);"
WRITE_63 = "if (t == 63) st_shared_u32(smem + 4064, 1);"
TILE = STORE_SMEM + SEEN + STORE_TILE


def store_run(
    body: str,
    encoded: np.ndarray | None = None,
    tensor: np.ndarray | None = None,
    order: Order = Order.FORWARD,
    grid: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """The tensor of ``tensor_map_of`` (or another, with its map), and 64 words of output."""
    if encoded is None:
        tensor, encoded = tensor_map_of()
    assert tensor is not None
    out = aligned(np.zeros(64, np.uint32))
    nothing = np.zeros(4, np.uint32)
    run(body, [nothing, encoded], [out, tensor], threads=64, smem=SMEM, order=order, grid=grid)
    return tensor, out


def store_fault(
    body: str, encoded: np.ndarray | None = None, tensor: np.ndarray | None = None, order: Order = Order.FORWARD
) -> str:
    usual_tensor, usual = tensor_map_of()
    usual = usual if encoded is None else encoded
    written = [usual_tensor if tensor is None else tensor]
    return fault(body, [np.zeros(4, np.uint32), usual], written, threads=64, smem=SMEM, order=order)


@pytest.mark.parametrize("tiles, load", [(1, False), (1, True), (3, False), (4, True)])
@pytest.mark.parametrize("name", STORE_CASES)
def test_stored_tiles_come_back(name: str, tiles: int, load: bool) -> None:
    """The parts of boxes inside the tensor arrive, and nothing around them changes."""
    got, want, out, loaded = run_tma_store(emulate, tensor_map.encode_emulated, STORE_CASES[name], tiles, load)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(out, loaded)


def test_a_store_does_not_begin_before_the_tensor() -> None:
    body = TILE.replace("smem, 0, 0, 0, 0)", "smem, 0, -1, 0, 0)")
    expect(store_fault(body), "coordinates (0, -1, 0, 0): a store cannot begin before the tensor")


@pytest.mark.parametrize("order", list(Order))
def test_a_store_lands_as_late_as_it_may(order: Order) -> None:
    """At the wait that names its group, and without one not before all CTAs are done."""
    overwrite = "if (t == 0) st_global_u32(params.out[1], 7);"
    first = [store_run(TILE + wait + overwrite, order=order)[0].view(np.uint32)[0, 0] for wait in (STORED, STORED * 2)]
    assert first == [0, 0], "the tile's first word, on top of the 7"
    waited = "if (t == 0) tma_store_wait<0>();"
    assert store_run(TILE + waited + overwrite, order=order)[0].view(np.uint32)[0, 0] == 7
    later = "if (block_idx() == 1) { if (t == 0) st_global_v4(out, ld_global_v4(params.out[1])); return; }"
    tensor, out = store_run(later + TILE + STORED, order=order, grid=2)
    assert out[0] == 0x3F803F80 and tensor.view(np.uint32)[0, 0] == 0


@pytest.mark.parametrize("order", list(Order))
def test_the_source_may_be_rewritten_after_the_wait_and_a_barrier(order: Order) -> None:
    tensor, _ = store_run(TILE + STORED + "sync_cta();" + WRITE_63 + WRITE_0, order=order)
    want = np.arange(256, dtype=np.uint32)
    got = tensor.view(np.uint32)[:32].reshape(256, 4)
    chunk = np.arange(256) // 8 * 8 + (np.arange(256) % 8 ^ np.arange(256) // 8 % 8)
    np.testing.assert_array_equal(got[:, 0], want[chunk])
    assert (tensor[32:] == 0x3F80).all()


@pytest.mark.parametrize("order", list(Order))
def test_a_wait_leaves_the_latest_groups_in_flight(order: Order) -> None:
    half = """const void* map = params.in[1];
    for (uint32_t i = t; i < 512; i += 64) st_shared_v4(smem + i * 16, {{i, i, i, i}});
    fence_async_shared(); sync_cta();
    if (t == 0) {
        tma_store_4d(map, smem, 0, 0, 0, 0); tma_store_commit();
        tma_store_4d(map, smem + 4096, 0, 32, 0, 0); tma_store_commit();
        tma_store_wait_read<1>();
    }
    sync_cta(); if (t == 5) st_shared_u32(smem + AT, 1); sync_cta();"""
    tensor, _ = store_run(half.replace("AT", "4092") + STORED, order=order)
    assert tensor.view(np.uint32)[0, 0] == 0 and tensor.view(np.uint32)[32, 0] == 256
    text = store_fault(half.replace("AT", "4096") + STORED, order=order)
    expect(text, "thread 5 ", "writes shared memory offset 0x1000 while a tma_store_4d of thread 0", "tma_store_wait_r")
    one_group = half.replace("tma_store_commit();", "", 1).replace("AT", "0")
    expect(store_fault(one_group + STORED, order=order), "writes shared memory offset 0x0 while a tma_store_4d")


def test_one_tile_may_go_to_two_places() -> None:
    tensor, _ = store_run(TILE + STORE_TILE.replace("0, 0, 0, 0", "0, 32, 0, 0") + STORED)
    np.testing.assert_array_equal(tensor[:32], tensor[32:])
    text = store_fault(TILE + STORE_TILE + "if (t == 0) tma_store_wait_read<1>();" + WRITE_0)
    expect(text, "writes shared memory offset 0x0 while a tma_store_4d")


def test_a_loaded_tile_is_stored_without_a_fence() -> None:
    """The copy engine sees its own writes; who waited for the mbarrier is ordered after them."""
    body = TMA + LOAD + "if (t == 32) { MAYBE tma_store_4d(map, smem, 0, 32, 0, 0); tma_store_commit();"
    body += "tma_store_wait_read<0>(); } mbarrier_wait(bar, 0);"
    store_run(body.replace("MAYBE", WAIT))
    assert re.search("in flight|nobody has written", store_fault(body.replace("MAYBE", "")))


def test_what_is_outside_the_tensor_need_not_be_written() -> None:
    """Head dim 40 in a box of 64 columns: five of the eight chunks of each row exist."""
    tensor, encoded = aligned(np.zeros((64, 40), np.uint16)), aligned(np.zeros(128, np.uint8), 64)
    layout = tensor_map.layout((1, 64, 1, 40), (2560, 40, 40, 1), DType.BF16, 32, 64, Swizzle.B128)
    tensor_map.encode_emulated(layout, tensor.ctypes.data, encoded.ctypes.data)
    body = """const void* map = params.in[1];
    if (t < 32) for (uint32_t c = 0; c < CHUNKS; ++c)
        st_shared_v4(smem + t * 128 + ((c ^ t % 8) << 4), {{t, t, t, t}});"""
    body += SEEN + STORE_TILE + STORED
    store_run(body.replace("CHUNKS", "5"), encoded, tensor)
    assert (tensor.view(np.uint32)[:32] == np.arange(32)[:, None]).all() and (tensor[32:] == 0).all()
    expect(
        store_fault(body.replace("CHUNKS", "4"), encoded, tensor), "tma_store_4d: reads shared", "nobody has written"
    )


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize(
    "body, parts",
    [
        (TILE, ["exit: returns with 1 tma_store_4d in flight, 0 of them never committed", "offset 0x0"]),
        (TILE.replace("tma_store_commit();", "") + STORED, ["returns with 1 tma_store_4d in flight, 1 of them never"]),
        (TILE + STORED.replace("<0>", "<1>"), ["returns with 1 tma_store_4d in flight, 0 of them"]),
        (TILE + STORED.replace("t == 0", "t == 1"), ["thread 0 ", "returns with 1 tma_store_4d in flight"]),
        (TILE + WRITE_0 + STORED, ["st_shared_u32: writes shared memory offset 0x0 while a tma_store_4d of thread 0"]),
        (
            TILE + "sync_cta();" + WRITE_63 + "sync_cta();" + STORED,
            ["thread 63 ", "offset 0xfe0 while a tma_store_4d of thread 0"],
        ),
        (
            TILE + "if (t == 0) cp_async_16(smem + 512, params.in[1], true);" + STORED,
            ["cp_async_16: writes shared memory offset 0x200 while a tma_store_4d"],
        ),
        (
            TILE + "if (t == 0) mbarrier_init(smem + 64, 1);" + STORED,
            ["mbarrier_init: writes shared memory offset 0x40 while a tma_store_4d"],
        ),
        (STORE_SMEM + "sync_cta();" + STORE_TILE + STORED, ["was written by thread", "no fence_async_shared made it"]),
        ("fence_async_shared();" + STORE_SMEM + "sync_cta();" + STORE_TILE, ["no fence_async_shared made it"]),
        (
            STORE_SMEM.replace("i = t", "i = t + 1") + SEEN + STORE_TILE,
            ["tma_store_4d: reads", "0x0, which nobody has wri"],
        ),
        (
            TILE.replace("sync_cta();", "if (t == 0) mbarrier_init(smem + 4096, 1); sync_cta();").replace(
                "smem, 0", "smem + 1024, 0"
            ),
            ["tma_store_4d: reads shared memory offset 0x1000, where an mbarrier lives"],
        ),
        (
            TILE.replace("map, smem", "map, smem + 512"),
            ["tma_store_4d: shared memory offset 0x200 is not aligned to 1"],
        ),
        (TILE.replace("map, smem", "map, smem + 13312"), ["offset 0x3400 (13312) is outside the CTA's 16384 bytes"]),
        (TILE.replace("_4d(map", "_4d(static_cast<const char*>(map) + 8"), ["is not aligned to 64 bytes"]),
        (TILE.replace("_4d(map", "_4d(params.out[0]"), ["tma_store_4d: the tensor map at"]),
    ],
)
def test_misuse_of_the_copy_engines_stores(body: str, parts: list[str], order: Order) -> None:
    expect(store_fault(body, order=order), *parts)


@pytest.mark.parametrize("order", list(Order))
def test_a_store_takes_a_barrier_before_and_after(order: Order) -> None:
    text = store_fault(STORE_SMEM + "fence_async_shared();" + STORE_TILE + STORED, order=order)
    assert re.search("tma_store_4d: (race at .* wrote with no|reads .* nobody has written)|writes .* in flight", text)
    early = "if (t >= 32) named_arrive(1, 64); else named_sync(1, 64);"  # 63 does not wait for 0
    text = store_fault(TILE + STORED + early + WRITE_63, order=order)
    assert re.search("race at .* thread 0 .* read with no|while a tma_store_4d of thread 0|tma_store_4d: race", text)
    late = "if (t < 32) named_arrive(1, 64); else named_sync(1, 64);"
    store_run(TILE + STORED + late + WRITE_63, order=order)
    # A barrier that thread 0 has passed before it waits says nothing of the read.
    text = store_fault(TILE + late + STORED + WRITE_63, order=order)
    assert re.search("race at .* thread 0 .* read with no|while a tma_store_4d of thread 0", text)


def test_a_map_that_no_store_takes() -> None:
    x, encoded = tensor_map_of()
    three = tensor_map.TensorMapLayout((64, 64, 1), (128, 0), (64, 32, 1), Swizzle.B128, DType.BF16)
    tensor_map.encode_emulated(three, x.ctypes.data, encoded.ctypes.data)
    expect(store_fault(TILE + STORED, encoded), "tma_store_4d: the tensor map has rank 3, not 4")
    narrow = tensor_map.layout((1, 64, 1, 64), (4096, 64, 64, 1), DType.BF16, 32, 32, Swizzle.B128)
    tensor_map.encode_emulated(narrow, x.ctypes.data, encoded.ctypes.data)
    expect(store_fault(TILE + STORED, encoded), "tma_store_4d: the box is 64 bytes wide and the swizzle 128")


def test_a_store_writes_only_buffers_that_the_launch_may_write() -> None:
    x, encoded = tensor_map_of()
    text = fault(TILE + STORED, [x, encoded], threads=64, smem=SMEM)
    expect(text, "tma_store_4d: stores 128 bytes at byte offset 0 of buffer 0", "and is read-only")
    expect(store_fault(TILE + STORED, encoded), "tma_store_4d: stores 128 bytes at byte offset")
    short = aligned(np.zeros((63, 64), np.uint16))
    layout = tensor_map.layout((1, 64, 1, 64), (4096, 64, 64, 1), DType.BF16, 32, 64, Swizzle.B128)
    tensor_map.encode_emulated(layout, short.ctypes.data, encoded.ctypes.data)
    body = TILE.replace("smem, 0, 0, 0, 0", "smem, 0, 32, 0, 0") + STORED
    text = fault(body, [np.zeros(4, np.uint32), encoded], [short], threads=64, smem=SMEM)
    expect(text, "tma_store_4d: stores 128 bytes at byte offset 8064 of buffer 2, which has 8064 bytes")

# SPDX-License-Identifier: Apache-2.0
"""Hopper's instructions on the emulator: the numbers are right, and misuse is a precise fault."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.emulator_probe import aligned, fault, run
from helpers.sm90_probe import (
    a_registers,
    descriptor,
    emulate,
    k_major_steps,
    mn_major_steps,
    operands,
    rs_case,
    run_wgmma,
    ss_case,
    tile_image,
)
from helpers.tma_probe import TMA_CASES, run_tma
from test_emulator_primitives import signatures, wrapper_names

from fmha_runtime import config
from fmha_runtime.device import tensor_map
from fmha_runtime.device.emulator import Order
from fmha_runtime.device.tensor_map import Swizzle
from fmha_runtime.kernels.spec import DType
from fmha_runtime.ops import obtain
from fmha_runtime.toolchain import nvcc

pytestmark = pytest.mark.emulator

SIZES = (32, 40, 64, 72, 104, 128, 176, 256)
SMEM = 16384


def expect(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, f"{part!r} is missing in: {text}"


# --- mbarriers ---

BAR = "const uint32_t bar = smem + 1008; if (t == 0) {{ mbarrier_init(bar, {0}); {1} }} sync_cta();"
BAR_1 = BAR.format(1, "mbarrier_init_fence();")
WRITE = "if (t < 32) st_shared_v4(smem + t * 16, {{t, t, t, t}});"
READ = "if (t >= 32) st_global_v4(out + t * 4, ld_shared_v4(smem + (t - 32) * 16));"


@pytest.mark.parametrize("order", list(Order))
def test_an_mbarrier_orders_those_who_arrive_before_those_who_wait(order: Order) -> None:
    out = aligned(np.zeros((64, 4), np.uint32))
    body = BAR.format(32, "") + f"{WRITE} if (t < 32) mbarrier_arrive(bar);"
    run(f"{body} else mbarrier_wait(bar, 0); {READ}", [], [out], threads=64, order=order)
    assert (out[32:] == np.arange(32)[:, None]).all()
    text = fault(f"{WRITE} {body} {WRITE} {READ}", [], [out], threads=64, order=order)
    expect(text, "race at shared memory offset", "no mbarrier, named barrier or sync_cta")


@pytest.mark.parametrize("order", list(Order))
def test_one_lane_arrives_for_its_warp_only_after_sync_warp(order: Order) -> None:
    out = aligned(np.zeros((64, 4), np.uint32))
    body = "{0} if (t == 0) mbarrier_arrive(bar); if (t >= 32) mbarrier_wait(bar, 0);"
    run(BAR_1 + WRITE + body.format("sync_warp();") + READ, [], [out], threads=64, order=order)
    text = fault(BAR_1 + WRITE + body.format("") + READ, [], [out], threads=64, order=order)
    expect(text, "race at shared memory offset", "wrote with no")


@pytest.mark.parametrize("order", list(Order))
def test_readers_hand_a_buffer_back_through_an_empty_barrier(order: Order) -> None:
    out = aligned(np.zeros((64, 4), np.uint32))
    body = """const uint32_t full = smem + 1008, empty = smem + 1016;
    if (t == 0) { mbarrier_init(full, 32); mbarrier_init(empty, 32); }
    sync_cta();
    for (uint32_t i = 0; i < 5; ++i)
        if (t < 32) {
            EMPTY st_shared_v4(smem + t * 16, {{i, i, i, t}});
            mbarrier_arrive(full);
        } else {
            mbarrier_wait(full, i & 1);
            const Vec4 v = ld_shared_v4(smem + (t - 32) * 16);
            if (i == 4) st_global_v4(out + t * 4, v);
            mbarrier_arrive(empty);
        }"""
    wait = "mbarrier_wait(empty, (i & 1) ^ 1);"
    run(body.replace("EMPTY", wait), [], [out], threads=64, order=order)
    assert (out[32:, 0] == 4).all() and (out[32:, 3] == np.arange(32)).all()
    bad = body.replace("EMPTY", "if (i != 3) " + wait)
    text = fault(bad, [], [out], threads=64, order=order)
    assert re.search("race at shared memory|more arrivals than", text)


@pytest.mark.parametrize("order", list(Order))
def test_one_lane_hands_back_what_its_whole_warp_has_read(order: Order) -> None:
    """That lane arrives at barriers and the others do not, so their clocks differ when all read one word."""
    out = aligned(np.zeros((64, 4), np.uint32))
    body = """const uint32_t full = smem + 992, empty = smem + 1008;  // two stages
    if (t == 0) for (uint32_t s = 0; s < 2; ++s) { mbarrier_init(full + 8 * s, 1); mbarrier_init(empty + 8 * s, 1); }
    sync_cta();
    for (uint32_t i = 0; i < 8; ++i) {
        const uint32_t stage = i & 1, parity = i >> 1 & 1;
        if (t == 0) {
            mbarrier_wait(empty + 8 * stage, parity ^ 1);
            st_shared_v4(smem + 16 * stage, {{i, i, i, i}});
            mbarrier_arrive(full + 8 * stage);
        } else if (t >= 32) {
            mbarrier_wait(full + 8 * stage, parity);
            const Vec4 v = ld_shared_v4(smem + 16 * stage);
            SYNC
            if (i == 7) st_global_v4(out + t * 4, v);
            if (t == 32) mbarrier_arrive(empty + 8 * stage);
        }
    }"""
    run(body.replace("SYNC", "sync_warp();"), [], [out], threads=64, order=order)
    assert (out[32:] == 7).all()
    text = fault(body.replace("SYNC", ""), [], [out], threads=64, order=order)
    expect(text, "race at shared memory offset", "read with no mbarrier")


def test_a_fresh_mbarrier_lets_through_who_waits_for_the_phase_before() -> None:
    run(BAR_1 + "mbarrier_wait(bar, 1);")


@pytest.mark.parametrize(
    "body, parts",
    [
        ("mbarrier_arrive(smem + 8);", ["mbarrier_arrive: there is no mbarrier", "offset 0x8"]),
        ("mbarrier_wait(smem + 8, 0);", ["mbarrier_wait: there is no mbarrier"]),
        ("mbarrier_init(smem + 4, 1);", ["is not aligned to 8 bytes"]),
        ("mbarrier_init(smem + 1024, 1);", ["outside the CTA's 1024 bytes"]),
        ("mbarrier_init(smem, 0);", ["0 arrivals are not between 1 and 2^20 - 1"]),
        (BAR_1 + "mbarrier_wait(bar, 2);", ["parity 2 is neither 0 nor 1"]),
        (BAR_1 + "mbarrier_init(bar, 1);", ["writes", "where an mbarrier lives"]),
        (BAR_1 + "st_shared_u32(bar + 4, 0);", ["st_shared_u32: writes", "an mbarrier lives"]),
        (BAR_1 + "ld_shared_v4(bar);", ["ld_shared_v4: reads", "an mbarrier lives"]),
        (BAR_1 + "mbarrier_arrive_expect(bar, 0);", ["announces no bytes"]),
        (BAR_1 + "mbarrier_arrive_expect(bar, 1 << 20);", ["more than 2^20 - 1 bytes"]),
        (
            BAR_1 + "mbarrier_arrive_expect(bar, 64); mbarrier_arrive(bar);",
            ["more arrivals than the mbarrier at offset 0x3f0 takes: all 1 of phase 0", "64 bytes"],
        ),
        (
            "if (t == 0) mbarrier_init(smem, 1); if (t == 31) mbarrier_arrive(smem);",
            ["was initialised by thread 0 with nothing in between"],
        ),
    ],
)
def test_misuse_of_an_mbarrier(body: str, parts: list[str]) -> None:
    expect(fault(body), *parts)


@pytest.mark.parametrize("order", list(Order))
def test_a_deadlock_report_says_who_waits_for_what(order: Order) -> None:
    body = (
        BAR.format(3, "")
        + """
    if (t < 2) mbarrier_arrive(bar);
    if (t < 32) mbarrier_wait(bar, 0); else if (t < 64) named_sync(3, 64);"""
    )
    text = fault(body, threads=96, order=order)
    expect(text, "deadlock:", "exit: threads 64-95")
    expect(text, "mbarrier_wait: threads 0-31 for the mbarrier at offset 0x3f0, phase 0: 2 of 3")
    expect(text, "named_sync: threads 32-63 at barrier 3 with 32 of 64 threads")


# --- the copy engine ---


def tensor_map_of(rows: int = 32, swizzle: Swizzle = Swizzle.B128) -> tuple[np.ndarray, np.ndarray]:
    """A [1, 64, 1, 64] tensor, all 1.0 in bf16, and the map of a box of so many whole rows."""
    x = aligned(np.full((64, 64), 0x3F80, np.uint16))
    encoded = aligned(np.zeros(128, np.uint8), 64)
    layout = tensor_map.layout((1, 64, 1, 64), (4096, 64, 64, 1), DType.BF16, rows, 64, swizzle)
    tensor_map.encode_emulated(layout, x.ctypes.data, encoded.ctypes.data)
    return x, encoded


MAP = "const void* map = params.in[1]; const uint32_t bar = smem + 8192;"
TMA = MAP + "if (t == 0) { mbarrier_init(bar, 1); mbarrier_init_fence(); } sync_cta();"
LOAD = "if (t == 0) { mbarrier_arrive_expect(bar, 4096); tma_load_4d(smem, map, bar, 0, 0, 0, 0); }"
WAIT = "mbarrier_wait(bar, 0);"


def tma_fault(body: str, threads: int = 64, order: Order = Order.FORWARD) -> str:
    return fault(body, tensor_map_of(), threads=threads, smem=SMEM, order=order)


@pytest.mark.parametrize("name", TMA_CASES)
def test_a_tile_lies_where_the_manual_says(name: str) -> None:
    got, want = run_tma(emulate, tensor_map.encode_emulated, TMA_CASES[name])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("order", list(Order))
def test_a_copy_lands_when_nobody_can_go_on_without_it(order: Order) -> None:
    x, encoded = tensor_map_of()
    out = aligned(np.zeros(4, np.uint32))
    body = f"""{TMA} {LOAD}
    if (t == 40)
        for (int i = 0; i < 8; ++i)
            st_global_v4(static_cast<uint32_t*>(params.out[1]) + i * 4, {{{{7, 7, 7, 7}}}});
    {WAIT} if (t == 63) st_global_v4(out, ld_shared_v4(smem));"""
    run(
        body.replace("{{{{", "{{").replace("}}}}", "}}"),
        [np.zeros(4, np.uint32), encoded],
        [out, x],
        threads=64,
        smem=SMEM,
        order=order,
    )
    assert (out == 7).all()


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize(
    "body, parts",
    [
        (LOAD + "if (t == 0) ld_shared_v4(smem);", ["ld_shared_v4: reads", "in flight"]),
        (LOAD + "if (t == 0) st_shared_u32(smem, 1);", ["st_shared_u32: writes", "in flight"]),
        (LOAD + LOAD + WAIT, ["more arrivals than"]),
        (
            LOAD + "if (t == 0) tma_load_4d(smem + 4096, map, bar, 0, 0, 0, 0);" + WAIT,
            ["brings 4096 bytes more to phase 0", "expects no further arrival and 4096 bytes"],
        ),
        (
            LOAD.replace("4096", "4112") + WAIT,
            ["deadlock", "4112 bytes announced and copies issue"],
        ),
        (LOAD.replace("smem, map", "smem + 128, map") + WAIT, ["0x80 is not aligned to 1024 byte"]),
        (LOAD.replace("smem, map", "smem + 13312, map"), ["is outside the CTA's 16384 bytes"]),
        (LOAD, ["exit: the CTA ends while a tma_load_4d of thread 0 to shared memory offset 0x0"]),
        (
            LOAD.replace("map,", "static_cast<const char*>(map) + 8,"),
            ["is not aligned to 64 bytes"],
        ),
        (LOAD.replace("map,", "params.out,"), ["tma_load_4d: the tensor map at"]),
        ("tma_prefetch_map(static_cast<const char*>(map) + 8);", ["tma_prefetch_map: the tensor"]),
        (
            "st_shared_v4(smem + t * 16, {{1, 1, 1, 1}}); sync_cta();" + LOAD + WAIT,
            ["tma_load_4d: shared memory offset 0x0 was written by thread 0", "fence_async_shared"],
        ),
    ],
)
def test_misuse_of_the_copy_engine(body: str, parts: list[str], order: Order) -> None:
    expect(tma_fault(TMA + body, order=order), *parts)


def test_the_copy_engine_sees_an_mbarrier_only_after_its_fence() -> None:
    body = MAP + "if (t == 0) mbarrier_init(bar, 1); sync_cta();" + LOAD + WAIT
    expect(tma_fault(body), "no mbarrier_init_fence after its mbarrier_init")


@pytest.mark.parametrize("order", list(Order))
def test_ordinary_stores_before_a_copy_take_a_fence_and_a_barrier(order: Order) -> None:
    body = "st_shared_v4(smem + t * 16, {{1, 1, 1, 1}}); fence_async_shared();"
    good = TMA + body + "sync_cta();" + LOAD + WAIT
    run(good, tensor_map_of(), threads=64, smem=SMEM, order=order)
    text = tma_fault(TMA + body + LOAD + WAIT, order=order)
    assert re.search("tma_load_4d: race .* wrote with no|st_shared_v4: writes .* in flight", text)


def test_a_copy_reads_only_named_buffers() -> None:
    _, encoded = tensor_map_of()
    other = aligned(np.zeros(16, np.uint32))
    text = fault(TMA + LOAD + WAIT, [other, encoded], threads=64, smem=SMEM)
    expect(text, "tma_load_4d: reads 128 bytes at byte offset")


def test_a_waiter_of_another_barrier_does_not_see_the_tile() -> None:
    body = f"""{TMA} if (t == 0) {{
        mbarrier_init(bar + 8, 1); mbarrier_init_fence(); }} sync_cta(); {LOAD}
    if (t == 0) {{ FIRST SECOND }}
    if (t >= 32) {{ mbarrier_wait(bar + 8, 0); ld_shared_v4(smem); }}"""
    arrive = "mbarrier_arrive(bar + 8);"
    good = body.replace("FIRST", WAIT).replace("SECOND", arrive)  # what thread 0 has seen
    run(good, tensor_map_of(), threads=64, smem=SMEM)
    bad = body.replace("FIRST", arrive).replace("SECOND", WAIT)
    assert re.search("in flight|which the copy engine filled", tma_fault(bad))
    # A thread that waits for a later tile has not thereby seen the earlier one.
    other = LOAD.replace("smem, map, bar", "smem + 4096, map, bar + 8").replace("(bar,", "(bar + 8,")
    late = body.replace("FIRST", "").replace("SECOND", WAIT).replace(LOAD, LOAD + other)
    expect(tma_fault(late), "ld_shared_v4: race at", "which the copy engine filled for the mbarrier")


# --- wgmma: numbers ---


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("element, depth, span", [("Bf16", 80, 128), ("Fp16", 48, 64)])
def test_wgmma_multiplies_tiles(element: str, n: int, depth: int, span: int) -> None:
    assert ss_case(emulate, element, n, depth, span) < 4e-5


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("element, depth, span", [("Bf16", 64, 128), ("Fp16", 48, 64)])
def test_wgmma_takes_a_from_registers(element: str, n: int, depth: int, span: int) -> None:
    assert rs_case(emulate, element, n, depth, span) < 4e-5


def test_wgmma_with_the_narrowest_swizzle() -> None:
    assert ss_case(emulate, "Bf16", 64, 48, 32) < 4e-5
    assert rs_case(emulate, "Bf16", 64, 48, 32) < 4e-5


def test_wgmma_without_swizzle() -> None:
    """Core matrices of 8 rows x 16 bytes: the leading offset steps along the depth."""
    x = operands("Bf16", 64, 16)

    def cores(tile: np.ndarray) -> np.ndarray:
        rows = tile.shape[0]
        return tile.reshape(rows // 8, 8, 2, 8).transpose(2, 0, 1, 3).copy().view(np.uint8).ravel()

    a, b = cores(x.a), cores(x.b.T.copy())
    steps = [descriptor(at, 64 * 16, 128, 16) for at in (0, len(a))]
    got = run_wgmma(emulate, "Bf16", 64, np.concatenate([a, b]), steps[1:], steps[:1])
    np.testing.assert_allclose(got, x.product, atol=4e-5)


def test_wgmma_adds_to_its_accumulator() -> None:
    x = operands("Bf16", 32, 32)
    start = np.random.default_rng(1).standard_normal((128, 16)).astype(np.float32)
    image, steps, a = tile_image(x.b, 64), mn_major_steps(0, 32, 64), a_registers(x.a)
    zero = np.zeros_like(start)
    got = run_wgmma(emulate, "Bf16", 32, image, steps, registers=a, start=start)
    base = run_wgmma(emulate, "Bf16", 32, image, steps, registers=a, start=zero)
    nothing = run_wgmma(emulate, "Bf16", 32, image * 0, steps, registers=a, start=start)
    np.testing.assert_allclose(got, base + nothing, atol=1e-5)
    assert np.abs(nothing).max() > 1


@pytest.mark.parametrize("leading, stride", [(64 * 128, 512), (64 * 64, 1024), (16, 1024)])
def test_wrong_offsets_in_a_descriptor_give_wrong_numbers(leading: int, stride: int) -> None:
    x = operands("Bf16", 128, 64)
    image = tile_image(x.b, 128)
    a = a_registers(x.a)
    steps = [descriptor(k * 128, leading, stride, 128) for k in range(0, 64, 16)]
    got = run_wgmma(emulate, "Bf16", 128, image, steps, registers=a)
    right = run_wgmma(emulate, "Bf16", 128, image, mn_major_steps(0, 64, 128), registers=a)
    assert np.abs(right - x.product).max() < 4e-5
    assert not np.nanmax(np.abs(got - x.product)) < 1


# --- wgmma: misuse ---

# Shared memory full of ones, then one 64 x 32 x 16 product: every element of the result is 16.
ONES = """
for (uint32_t i = t; i < 512; i += 128)
    st_shared_v4(smem + i * 16, {{0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80}});
"""
READY = ONES + "fence_async_shared(); sync_cta();"
DESC = """const uint64_t desc = 1ull << 62 | 64ull << 32 | 1 << 16 | smem >> 4; (void)desc;
float d[16] = {}; uint32_t a[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
(void)d; (void)a;"""
SS = "Wgmma<Bf16, 32>::ss(d, desc, desc, 0);"
RS = "Wgmma<Bf16, 32>::rs_trans(d, a, desc, 1);"
DONE = "wgmma_commit(); wgmma_wait<0>();"
STORE = "st_global_f32(reinterpret_cast<float*>(out) + t, d[7]);"


def wgmma_run(body: str, threads: int = 128, order: Order = Order.FORWARD) -> np.ndarray:
    out = aligned(np.zeros(threads, np.float32))
    x, encoded = tensor_map_of()
    run(DESC + body, [x, encoded], [out], threads=threads, smem=SMEM, order=order)
    return out


def wgmma_fault(body: str, threads: int = 128, order: Order = Order.FORWARD) -> str:
    out = aligned(np.zeros(threads, np.float32))
    x, encoded = tensor_map_of()
    return fault(DESC + body, [x, encoded], [out], threads=threads, smem=SMEM, order=order)


@pytest.mark.parametrize("order", list(Order))
def test_accumulators_are_nan_until_the_wait_that_names_their_batch(order: Order) -> None:
    assert (wgmma_run(READY + "wgmma_fence();" + SS + DONE + STORE, order=order) == 16).all()
    early = f"wgmma_fence(); {SS} wgmma_commit(); {STORE} wgmma_wait<0>();"
    assert np.isnan(wgmma_run(READY + early, order=order)).all()
    two = f"float e[16]; wgmma_fence(); {SS} wgmma_commit(); {SS.replace('d,', 'e,', 1)}"
    two += " wgmma_commit(); wgmma_wait<1>();"
    assert (wgmma_run(READY + two + STORE + "wgmma_wait<0>();", order=order) == 16).all()
    later = two + STORE.replace("d[7]", "e[7]") + "wgmma_wait<0>();"
    assert np.isnan(wgmma_run(READY + later, order=order)).all()


def test_batches_on_one_accumulator_follow_each_other() -> None:
    body = f"wgmma_fence(); {SS} wgmma_commit(); {RS} {RS} wgmma_commit(); wgmma_wait<1>();"
    assert np.isnan(wgmma_run(f"{READY} {body} {STORE} wgmma_wait<0>();")).all()
    assert (wgmma_run(f"{READY} {body} wgmma_wait<0>(); {STORE}") == 48).all()


REWRITE = "a[2] = 0;"
TOUCH = "d[3] *= 0.5f;"


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize(
    "body, parts",
    [
        (READY + SS + DONE, ["no wgmma_fence before the first wgmma"]),
        (
            f"{READY} wgmma_fence(); {RS} {DONE} {TOUCH} {RS} {DONE}",
            ["the accumulator was written by ordinary code after the latest wgmma_fence"],
        ),
        (
            f"{READY} wgmma_fence(); {RS} {DONE} {REWRITE} {RS} {DONE}",
            ["operand A was written by ordinary code after the latest wgmma_fence"],
        ),
        (
            f"{READY} wgmma_fence(); {RS} wgmma_commit(); {REWRITE} wgmma_wait<0>();",
            ["a register of operand A was rewritten while the wgmma that reads it was in flight"],
        ),
        (
            f"{READY} wgmma_fence(); {RS} wgmma_commit(); {TOUCH} wgmma_wait<0>();",
            ["accumulator register 3 was written while a wgmma on it was in flight"],
        ),
        (
            f"{READY} wgmma_fence(); {RS} {TOUCH} {RS} {DONE}",
            ["wgmma: accumulator register 3 was written while"],
        ),
        (f"{READY} wgmma_fence(); {SS}", ["returns with 1 wgmma in flight, 1 of them never"]),
        (
            f"{READY} wgmma_fence(); {SS} wgmma_commit(); {SS} {DONE.replace('0', '1')}",
            ["returns with 1 wgmma in flight, 0 of them never committed"],
        ),
        (
            f"{ONES} sync_cta(); wgmma_fence(); {SS} {DONE}",
            ["was written by thread", "no fence_async_shared made it visible"],
        ),
        (
            f"fence_async_shared(); {ONES} sync_cta(); wgmma_fence(); {SS} {DONE}",
            ["was written by thread", "no fence_async_shared made it visible"],
        ),
        (
            f"wgmma_fence(); {SS} {DONE}",
            ["wgmma: reads shared memory offset", "nobody has written"],
        ),
        (
            f"{READY} wgmma_fence(); {SS} wgmma_commit(); {ONES} wgmma_wait<0>();",
            ["st_shared_v4: writes shared memory offset", "while a wgmma of warp", "in flight"],
        ),
        (
            f"{READY} wgmma_fence(); {SS} wgmma_commit(); sync_cta(); wgmma_wait<0>();"
            " if (t == 0) st_shared_u32(smem, 1);",
            ["st_shared_u32: ", "shared memory offset 0x0", "a wgmma of warp"],
        ),
        (
            f"{READY} wgmma_fence(); Wgmma<Bf16, 32>::ss(d, desc, desc + (t >= 96) * 2, 0); {DONE}",
            ["the warps of a warpgroup must execute the same: operation 1 of warp"],
        ),
        (
            f"{READY} wgmma_fence(); Wgmma<Bf16, 32>::ss(d, desc, desc + t % 2, 0); {DONE}",
            ["its operands differ from those of another lane"],
        ),
        (
            f"{READY} wgmma_fence(); if (t < 96) {{ {SS} {DONE} }}",
            ["exit: warp 3 executed 0 wgmma and another warp of its warpgroup 1"],
        ),
        (
            f"{READY} wgmma_fence(); Wgmma<Bf16, 32>::ss(d, desc | 1ull << 50, desc, 0); {DONE}",
            ["has a base offset"],
        ),
        (
            f"{READY} wgmma_fence(); Wgmma<Bf16, 32>::ss(d, desc, desc | 1 << 14, 0); {DONE}",
            ["has bits set that mean nothing"],
        ),
    ],
)
def test_misuse_of_wgmma(body: str, parts: list[str], order: Order) -> None:
    expect(wgmma_fault(body, order=order), *parts)


@pytest.mark.parametrize("order", list(Order))
def test_wgmma_reads_what_other_warps_wrote_only_after_a_barrier(order: Order) -> None:
    text = wgmma_fault(f"{ONES} fence_async_shared(); wgmma_fence(); {SS} {DONE}", order=order)
    assert re.search("wgmma: (race at|reads shared memory offset .* nobody has written)", text)


def test_wgmma_needs_four_warps() -> None:
    body = ONES.replace("128", "64") + f"fence_async_shared(); sync_cta(); wgmma_fence(); {SS}"
    expect(wgmma_fault(body, threads=64), "no complete warpgroup of four")


REFILL = """
const uint32_t full = smem + 8192, empty = smem + 8200;
if (t == 0) { mbarrier_init(full, 1); mbarrier_init(empty, 4); mbarrier_init_fence(); }
sync_cta();
if (t < 128) {
    if (t == 0)
        for (uint32_t i = 0; i < 4; ++i) {
            PRODUCER
            mbarrier_arrive_expect(full, 4096);
            tma_load_4d(smem, params.in[1], full, 0, 0, 0, 0);
        }
} else {
    for (uint32_t i = 0; i < 4; ++i) {
        mbarrier_wait(full, i & 1);
        wgmma_fence();
        Wgmma<Bf16, 32>::rs_trans(d, a, desc, i != 0);
        wgmma_commit();
        CONSUMER
    }
    STORE
}
"""


@pytest.mark.parametrize("order", list(Order))
def test_a_stage_is_refilled_only_when_all_warps_are_done_with_it(order: Order) -> None:
    wait, done = "mbarrier_wait(empty, (i & 1) ^ 1);", "wgmma_wait<0>();"
    arrive = "if (t % 32 == 0) mbarrier_arrive(empty);"

    def kernel(producer: str, consumer: str) -> str:
        body = REFILL.replace("PRODUCER", producer).replace("CONSUMER", consumer)
        return body.replace("STORE", STORE)

    out = wgmma_run(kernel(wait, done + arrive), threads=256, order=order)
    assert (out[128:] == 64).all()
    text = wgmma_fault(kernel(wait, arrive + done), threads=256, order=order)
    assert re.search("while a wgmma of warp . that reads it is in flight|a wgmma of warp . read", text)
    text = wgmma_fault(kernel("", done + arrive), threads=256, order=order)
    assert re.search("more arrivals than|in flight", text)
    one_warp = "if (t % 128 == 0) for (int j = 0; j < 4; ++j) mbarrier_arrive(empty);"
    text = wgmma_fault(kernel(wait, done + one_warp), threads=256, order=order)
    expect(text, "tma_load_4d: race at shared memory offset 0x0, which a wgmma of warp")


# --- registers, named barriers ---


@pytest.mark.parametrize(
    "body, parts",
    [
        ("registers_inc<100>();", ["100 registers are not a multiple of 8 from 24 to 256"]),
        ("registers_dec<16>();", ["16 registers are not"]),
        ("registers_inc<40>();", ["has 248 registers, so 40 is the wrong direction"]),
        ("if (t < 128) registers_inc<256>();", ["the warps ask for 64512 registers in all"]),
        (
            "if (t < 96) registers_dec<40>();",
            ["warps 0 and 3 of one warpgroup executed different"],
        ),
        ("if (t > 3) registers_dec<40>();", ["diverged and registers_dec can never complete"]),
    ],
)
def test_misuse_of_register_reallocation(body: str, parts: list[str]) -> None:
    expect(fault(body, threads=256), *parts)


def test_registers_move_between_warpgroups() -> None:
    run("if (t < 128) registers_dec<240>(); else registers_inc<256>();", threads=256)


@pytest.mark.parametrize("order", list(Order))
def test_named_barriers_order_those_who_arrive_before_those_who_sync(order: Order) -> None:
    out = aligned(np.zeros((64, 4), np.uint32))
    body = WRITE + "if (t < 32) {0}; else named_sync(2, 64);" + READ
    for arrive in ("named_arrive(2, 64)", "named_sync(2, 64)"):
        out[:] = 0
        run(body.format(arrive), [], [out], threads=64, order=order)
        assert (out[32:] == np.arange(32)[:, None]).all()
    wrong = WRITE + "if (t < 32) named_sync(2, 64); else named_arrive(2, 64);" + READ
    expect(fault(wrong, [], [out], threads=64, order=order), "offset")


@pytest.mark.parametrize(
    "body, parts",
    [
        ("named_sync(0, 32);", ["barrier 0 is not one of 1 to 15"]),
        ("named_sync(16, 32);", ["barrier 16 is not one of 1 to 15"]),
        ("named_arrive(1, 40);", ["40 is not a positive multiple of 32"]),
        ("named_arrive(1, 128);", ["up to the CTA's 64 threads"]),
        ("named_arrive(1, t < 7 ? 32 : 64);", ["collects 32 threads in this round, not 64"]),
        ("named_arrive(1, 64); named_arrive(1, 64);", ["arrives a second time in one round"]),
        ("if (t < 32) named_sync(1, 64);", ["deadlock", "at barrier 1 with 32 of 64 threads"]),
    ],
)
def test_misuse_of_named_barriers(body: str, parts: list[str]) -> None:
    expect(fault(body, threads=64), *parts)


# --- the device side ---


def test_twins_have_the_signatures_of_the_wrappers() -> None:
    twin = config.kernel_src() / "emulator" / "ptx" / "sm90.cuh"
    device = config.kernel_src() / "fmha" / "ptx" / "sm90.cuh"
    assert len(signatures(device)) >= 21
    assert signatures(device) == signatures(twin)


def test_both_sides_have_the_same_wgmma() -> None:
    def methods(folder: str) -> set[str]:
        text = (config.kernel_src() / folder / "ptx" / "wgmma.cuh").read_text()
        text = re.sub(r"[\s\\]+", "", text).replace("kN/2", "N/2")
        return set(re.findall(r"FMHA_DEVICEstaticvoid(\w+\(.*?\))\{", text))

    assert len(methods("fmha")) == 2
    assert methods("fmha") == methods("emulator")
    device = (config.kernel_src() / "fmha" / "ptx" / "wgmma.cuh").read_text()
    sizes = [int(n) for n in re.findall(r"^FMHA_WGMMA_N\((\d+),", device, re.MULTILINE)]
    assert sizes == list(range(8, 257, 8))


EVERY_WRAPPER = """
#include <ptx/sm90.cuh>
#include <ptx/wgmma.cuh>
struct alignas(64) Params { uint64_t map[16]; float* out; };
FMHA_KERNEL(use_sm90, Params, 256, 1) {
    using namespace fmha;
    const int thread = static_cast<int>(thread_idx());
    const uint32_t bar = smem_base() + 16384;
    if (warp_uniform(thread / 128) == 0) {
        registers_dec<40>();
        tma_prefetch_map(&params.map);
        mbarrier_init(bar, 1); mbarrier_init_fence();
        mbarrier_arrive(bar); mbarrier_arrive_expect(bar, 64); mbarrier_wait(bar, 0);
        tma_load_4d(smem_base_constant(), &params.map, bar, 0, 1, 2, 3);
        tma_store_4d(&params.map, smem_base(), 0, 1, 2, 3); tma_store_commit();
        tma_store_wait_read<1>(); tma_store_wait<0>();
        named_arrive(1, 256);
        return;
    }
    registers_inc<240>();
    named_sync(1, 256);
    uint32_t word = atomic_add_global(reinterpret_cast<uint32_t*>(params.out), 1);
    opaque(word);
    float d[16] = {}; uint32_t a[4] = {1, 2, 3, 4};
    fence_async_shared();
    pin(d);
    wgmma_fence();
    Wgmma<Bf16, 32>::ss(d, word, 2, 0);
    Wgmma<Fp16, 32>::rs_trans(d, a, 2, thread);
    wgmma_commit();
    wgmma_wait<0>();
    pin(d);
    FMHA_UNROLL
    for (int i = 0; i < 16; ++i) st_global_f32(params.out + thread * 16 + i, d[i]);
}
"""


def test_every_wrapper_compiles_for_the_cpu() -> None:
    assert obtain.from_source(EVERY_WRAPPER, "use_sm90").name == "use_sm90"
    wrappers = wrapper_names(config.kernel_src() / "fmha" / "ptx" / "sm90.cuh")
    missing = {name for name in wrappers if not re.search(rf"\b{name}\b", EVERY_WRAPPER)}
    assert not missing, f"EVERY_WRAPPER does not use {missing}"


@pytest.mark.nvcc
def test_every_wrapper_compiles_for_the_gpu(tmp_path: Path) -> None:
    (tmp_path / "use.cu").write_text(EVERY_WRAPPER)
    command = [str(nvcc.find_nvcc().path), "-cubin", "-std=c++17", "-O3", "-arch=sm_90a"]
    command += [f"-I{config.kernel_src() / 'fmha'}", "-o", "use.cubin", "use.cu"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "use.cubin").stat().st_size > 0


def test_k_major_steps_stay_inside_the_tile() -> None:
    """Each step of 16 columns has its own descriptor, a column group its own base."""
    got = [each & 0x3FFF for each in k_major_steps(1024, 64, 80, 128)]
    assert got == [64, 66, 68, 70, 64 + 512]

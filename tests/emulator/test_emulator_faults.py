# SPDX-License-Identifier: Apache-2.0
"""The emulator catches what a GPU would not forgive, and says who did what where."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.emulator_probe import aligned, fault, run

from fmha_runtime.device.emulator import Order
from fmha_runtime.errors import BuildError, EmulatorFault, InputError, ToolchainError
from fmha_runtime.ops import obtain

pytestmark = pytest.mark.emulator

INIT = "st_shared_v4(smem + t * 16, {{t, t, t, t}});"


def buffer(words: int = 64) -> np.ndarray:
    return aligned(np.zeros(words, np.uint32))


def expect(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, f"{part!r} is missing in: {text}"


# --- memory ---


def test_fresh_shared_memory_must_not_be_read() -> None:
    text = fault("if (t == 7) ld_shared_v4(smem + 32);")
    expect(text, "kernel probe, CTA 0, thread 7 (warp 0, lane 7), ld_shared_v4", "offset 0x20")
    expect(text, "nobody has written")


def test_half_written_chunk_must_not_be_read() -> None:
    expect(fault("if (t == 0) { st_shared_u32(smem, 1); ld_shared_v4(smem); }"), "nobody has written")


@pytest.mark.parametrize(
    "access, wrapper",
    [
        ("ld_shared_v4(smem + 1024)", "ld_shared_v4"),
        ("ld_shared_v4(0)", "ld_shared_v4"),
        ("st_shared_v4(smem + 1040, {{0, 0, 0, 0}})", "st_shared_v4"),
        ("st_shared_u32(smem + 1024, 0)", "st_shared_u32"),
        ("cp_async_16(smem + 1024, in, true)", "cp_async_16"),
        ("uint32_t r[4]; ldmatrix_x4(r, smem + 1024)", "ldmatrix_x4"),
    ],
)
def test_shared_memory_has_bounds(access: str, wrapper: str) -> None:
    expect(fault(f"{access};", [buffer()]), f", {wrapper}: ", "outside the CTA's 1024 bytes")


@pytest.mark.parametrize(
    "access, size",
    [
        ("ld_shared_v4(smem + 8)", 16),
        ("st_shared_v4(smem + 4, {{0, 0, 0, 0}})", 16),
        ("st_shared_u32(smem + 2, 0)", 4),
        ("cp_async_16(smem + 8, in, false)", 16),
        ("uint32_t r[2]; ldmatrix_x2_trans(r, smem + 8)", 16),
    ],
)
def test_shared_memory_has_alignment(access: str, size: int) -> None:
    expect(fault(f"{access};", [buffer()]), f"is not aligned to {size} bytes")


@pytest.mark.parametrize(
    "access, wrapper",
    [
        ("ld_global_v4(in + {at})", "ld_global_v4: reads 16 bytes"),
        (
            "ld_global_f32(reinterpret_cast<const float*>(in + {at}))",
            "ld_global_f32: reads 4 bytes",
        ),
        (
            "ld_global_s32(reinterpret_cast<const int32_t*>(in + {at}))",
            "ld_global_s32: reads 4 byte",
        ),
        ("cp_async_16(smem, in + {at}, true)", "cp_async_16: reads 16 bytes"),
        (
            "st_global_v4(const_cast<uint32_t*>(in) + {at}, {{{{}}}})",
            "st_global_v4: stores 16 bytes",
        ),
        ("st_global_f32((float*)(in + {at}), 0)", "st_global_f32: stores 4 bytes"),
    ],
)
@pytest.mark.parametrize("at", [64, -4, 4096])
def test_global_memory_has_bounds(access: str, wrapper: str, at: int) -> None:
    text = fault(access.format(at=at) + ";", [buffer(64)])
    expect(text, wrapper, f"at byte offset {4 * at} of buffer 0, which has 256 bytes")


def test_a_vector_must_not_hang_over_the_end_of_a_buffer() -> None:
    expect(fault("ld_global_v4(in + 4);", [buffer(64)[:7]]), "byte offset 16 of buffer 0", "28 bytes")


def test_global_memory_has_alignment() -> None:
    expect(fault("ld_global_v4(in + 2);", [buffer()]), "is not aligned to 16 bytes")
    text = fault("cp_async_16(smem, in + 1, true);", [buffer()])
    expect(text, "cp_async_16: global address", "is not aligned to 16 bytes")


def test_inputs_are_read_only() -> None:
    body = "if (t == 0) st_global_f32((float*)(in + 3), 1.f);"
    expect(fault(body, [buffer()]), "stores 4 bytes at byte offset 12 of buffer 0", "read-only")


def test_overlapping_buffers_allow_what_one_of_them_allows() -> None:
    both = buffer()
    run("st_global_f32((float*)in, 1.f);", [both], [both])
    assert both.view(np.float32)[0] == 1


def test_a_launch_without_buffers_says_so() -> None:
    expect(fault("ld_global_v4(nullptr);"), "the launch named no buffer")


# --- cp.async ---

COPY = "cp_async_16(smem + t * 16, in + t % 4 * 4, true); cp_async_commit();"


@pytest.mark.parametrize("missing", ["", "cp_async_wait<1>();"])
def test_a_copy_in_flight_must_not_be_read(missing: str) -> None:
    text = fault(f"{COPY} {missing} ld_shared_v4(smem + t * 16);", [buffer()])
    expect(
        text,
        "thread 0 ",
        "ld_shared_v4: reads",
        "while a cp_async_16 of thread 0 to it is in flight",
    )


def test_a_copy_in_flight_must_not_be_overwritten() -> None:
    expect(fault(f"{COPY} {INIT}", [buffer()]), "st_shared_v4: writes", "is in flight")
    expect(fault(f"{COPY} {COPY}", [buffer()]), "cp_async_16: writes", "is in flight")


def test_a_wait_does_not_cover_copies_without_commit() -> None:
    body = "cp_async_16(smem + t * 16, in, true); cp_async_wait<0>(); ld_shared_v4(smem + t * 16);"
    expect(fault(body, [buffer()]), "is in flight")


def test_a_kernel_must_not_end_with_copies_in_flight() -> None:
    body = f"{COPY} cp_async_wait<1>(); cp_async_16(smem + 512 + t * 16, in, false);"
    expect(fault(body, [buffer()]), "exit: returns with 2 cp_async_16 in flight", "offset 0x0")


def test_waiting_does_not_show_the_data_to_other_threads() -> None:
    body = f"{INIT} sync_cta(); {COPY} cp_async_wait<0>();"
    read = "ld_shared_v4(smem + (t ^ 1) * 16);"
    text = fault(body + read, [buffer()])
    expect(text, "race at shared memory offset", "with no sync_warp or sync_cta in between")
    run(f"{body} sync_warp(); {read}", [buffer()])


# --- races ---

READ_OTHER_WARP = "ld_shared_v4(smem + (t ^ 32) * 16);"
READ_OTHER_LANE = "ld_shared_v4(smem + (t ^ 1) * 16);"
MINE_V4 = "st_shared_v4(smem, {{t, 0, 0, 0}});"

# what goes before, the barrier that orders it, what goes after
RACES = {
    "read after write, warps": (INIT, "sync_cta();", READ_OTHER_WARP),
    "read after write, lanes": (INIT, "sync_warp();", READ_OTHER_LANE),
    "write after read, warps": (f"{INIT} sync_cta(); {READ_OTHER_WARP}", "sync_cta();", INIT),
    "write after read, lanes": (f"{INIT} sync_warp(); {READ_OTHER_LANE}", "sync_warp();", INIT),
    "write after write, warps": (
        f"if (t == 0) {MINE_V4}",
        "sync_cta();",
        f"if (t == 40) {MINE_V4}",
    ),
    "write after write, lanes": (
        f"if (t == 0) {MINE_V4}",
        "sync_warp();",
        f"if (t == 9) {MINE_V4}",
    ),
    "ldmatrix after store": (INIT, "sync_warp();", "uint32_t r[4]; ldmatrix_x4(r, smem + t * 16);"),
    "store after ldmatrix": (
        f"{INIT} sync_warp(); uint32_t r[4]; ldmatrix_x4(r, smem + t * 16);",
        "sync_warp();",
        INIT,
    ),
    "copy after read": (
        f"{INIT} sync_cta(); {READ_OTHER_WARP}",
        "sync_cta();",
        f"{COPY} cp_async_wait<0>();",
    ),
    "read of what several warps read, then one warp writes": (
        f"{INIT} sync_cta(); ld_shared_v4(smem);",
        "sync_cta();",
        "if (t == 0) st_shared_u32(smem, 1);",
    ),
}


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("name", RACES)
def test_a_missing_barrier_is_a_race_in_every_order(name: str, order: Order) -> None:
    before, barrier, after = RACES[name]
    before = f"{INIT} sync_cta(); {before}"  # so that nothing is caught as a read of fresh memory
    text = fault(f"{before} {after}", [buffer()], threads=64, order=order)
    expect(text, "race at shared memory offset 0x", barrier.removesuffix("();"), "in between")
    run(f"{before} {barrier} {after}", [buffer()], threads=64, order=order)


def test_sync_warp_does_not_order_warps() -> None:
    body = f"{INIT} sync_cta(); {INIT} sync_warp(); {READ_OTHER_WARP}"
    expect(fault(body, threads=64), "race", "with no sync_cta in between")


def test_words_of_one_chunk_are_independent() -> None:
    out = buffer(4)
    body = "if (t % 16 == 0) st_shared_u32(smem + t / 16 * 4, t); sync_cta();"
    run(f"{body} if (t == 0) st_global_v4(out, ld_shared_v4(smem));", [], [out], threads=64)
    assert list(out) == [0, 16, 32, 48]


def test_a_shuffle_does_not_order_memory() -> None:
    expect(
        fault(f"{INIT} shfl_xor(t, 1); {READ_OTHER_LANE}", threads=64),
        "race at shared memory offset",
    )


# --- threads that wait in vain ---


@pytest.mark.parametrize("order", list(Order))
def test_a_lane_that_leaves_before_a_shuffle(order: Order) -> None:
    text = fault("if (t == 37) return; shfl_xor(t, 1);", threads=64, order=order)
    expect(text, "diverged and shfl_xor can never complete")
    expect(text, "shfl_xor: threads 32-36, 38-63; exit: threads 37")


@pytest.mark.parametrize("order", list(Order))
def test_a_lane_that_waits_at_the_cta_barrier_instead(order: Order) -> None:
    text = fault("if (t < 4) sync_cta(); else sync_warp();", order=order)
    expect(text, "sync_cta: threads 0-3; sync_warp: threads 4-31")


@pytest.mark.parametrize("order", list(Order))
def test_two_different_operations_in_one_warp(order: Order) -> None:
    text = fault("if (t & 1) sync_warp(); else shfl_xor(t, 1);", order=order)
    expect(text, "already waits at another warp-wide operation", "sync_warp: threads", "shfl_xor")


@pytest.mark.parametrize("order", list(Order))
def test_a_barrier_that_a_warp_never_reaches(order: Order) -> None:
    text = fault("if (t / 32 != 1) sync_cta();", threads=96, order=order)
    expect(text, "deadlock: sync_cta can never complete")
    expect(text, "sync_cta: threads 0-31, 64-95; exit: threads 32-63")


# --- launches ---


def test_launches_that_no_gpu_would_start() -> None:
    expect(fault("", threads=288), "kernel probe, launch: 288 threads", "launch bound of 256")
    expect(fault("", threads=40), "40 threads per CTA is not a positive multiple of 32")
    expect(fault("", grid=0), "the grid is empty")


def test_the_parameter_block_is_aligned() -> None:
    kernel = obtain.from_source(
        "#include <ptx/common.cuh>\nstruct alignas(64) P { int x; };\nFMHA_KERNEL(probe, P, 32, 1) { (void)params; }",
        "probe",
    )
    raw = ctypes.create_string_buffer(256)
    base = ctypes.addressof(raw) + 63 & ~63
    kernel.launch(1, 32, 0, 0, base, [])
    with pytest.raises(EmulatorFault, match="not aligned to 64 bytes"):
        kernel.launch(1, 32, 0, 0, base + 16, [])


@pytest.mark.parametrize("workers", ["1", "4"])
def test_a_fault_in_one_of_many_ctas_ends_the_launch(workers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMHA_EMULATOR_THREADS", workers)
    expect(fault("if (block_idx() == 11) ld_shared_v4(smem + t * 16);", grid=12), "CTA 11,")


def test_a_kernel_runs_again_after_a_fault() -> None:
    out = buffer(4)
    body = "if (in[0] == 0) sync_cta(); if (t == 0 || in[0] == 0) st_global_v4(out, {{in[0]}});"
    body = f"if (t == 3 && in[0] == 1) return; sync_warp(); {body}"
    one, two = aligned(np.full(4, 1, np.uint32)), aligned(np.full(4, 2, np.uint32))
    expect(fault(body, [one], [out]), "sync_warp can never complete")
    run(body, [two], [out])
    assert out[0] == 2


# --- tools ---


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMHA_HOST_CXX", "no-such-compiler")
    with pytest.raises(ToolchainError, match=r"no-such-compiler.*not found; install.*FMHA_HOST_CXX"):
        run("")


def test_source_that_does_not_compile() -> None:
    with pytest.raises(BuildError, match="this_is_not_declared") as caught:
        run("this_is_not_declared();")
    assert "-std=c++17" in caught.value.command and "this_is_not_declared" in caught.value.log


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FMHA_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(InputError, match="is not a folder; set FMHA_CACHE_DIR"):
        run("")
    monkeypatch.setenv("FMHA_CACHE_DIR", "/proc/fmha_runtime")  # not even by root
    with pytest.raises(BuildError, match="set FMHA_CACHE_DIR to a folder that can be written"):
        run("")


def test_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FMHA_CACHE_DIR", str(tmp_path))
    commands: list[list[str]] = []
    real = subprocess.run

    def spy(command: list[str], **kwargs: object) -> object:
        commands.append(command)
        return real(command, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", spy)
    run("shfl_xor(t, 1);")
    compiled = [c for c in commands if "-o" in c]
    assert len(compiled) == 2, "the runtime and the kernel"
    commands.clear()
    run("shfl_xor(t, 1);")
    assert commands == []
    run("shfl_xor(t, 2);")
    assert len(commands) == 1, "another kernel, the same runtime"
    names = sorted(path.name for path in (tmp_path / "emulator").iterdir())
    assert len(names) == 3 and not [n for n in names if not re.search(r"-[0-9a-f]{20}\.(o|so)$", n)]

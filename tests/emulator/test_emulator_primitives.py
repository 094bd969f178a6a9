# SPDX-License-Identifier: Apache-2.0
"""Every wrapper's CPU twin computes what the PTX manual says: layouts, rounding, special values."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.emulator_probe import aligned, run

from fmha_runtime import config
from fmha_runtime.device.emulator import Order
from fmha_runtime.kernels import sources
from fmha_runtime.ops import obtain
from fmha_runtime.toolchain import nvcc

pytestmark = pytest.mark.emulator

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4

FILL = "st_shared_v4(smem + t * 16, ld_global_v4(in + t * 4)); sync_warp();"
STORE = "for (int i = 0; i < 4; ++i) out[t * 4 + i] = r[i];"


def matrices(seed: int) -> np.ndarray:
    """Four 8x8 matrices of 16-bit numbers, all different, [matrix, row, column]."""
    numbers = np.random.default_rng(seed).permutation(65536)[:256]
    return aligned(numbers.astype(np.uint16).reshape(4, 8, 8))


def pairs(lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    return lo.astype(np.uint32) | hi.astype(np.uint32) << 16


@pytest.mark.parametrize("order", list(Order))
def test_ldmatrix_x4_gives_each_lane_two_neighbours_of_a_row(order: Order) -> None:
    m, out = matrices(1), aligned(np.zeros((32, 4), np.uint32))
    run(f"uint32_t r[4]; {FILL} ldmatrix_x4(r, smem + t * 16); {STORE}", [m], [out], order=order)
    for i in range(4):
        assert (out[:, i] == pairs(m[i, G, 2 * T], m[i, G, 2 * T + 1])).all()


def test_ldmatrix_x4_takes_rows_from_any_address() -> None:
    m, out = matrices(2), aligned(np.zeros((32, 4), np.uint32))
    body = f"uint32_t r[4]; {FILL} ldmatrix_x4(r, smem + (t ^ 21) * 16); {STORE}"
    run(body, [m], [out])
    rows = m.reshape(32, 8)[LANE ^ 21].reshape(4, 8, 8)
    for i in range(4):
        assert (out[:, i] == pairs(rows[i, G, 2 * T], rows[i, G, 2 * T + 1])).all()


def test_ldmatrix_x4_trans_gives_each_lane_two_neighbours_of_a_column() -> None:
    m, out = matrices(3), aligned(np.zeros((32, 4), np.uint32))
    run(f"uint32_t r[4]; {FILL} ldmatrix_x4_trans(r, smem + t * 16); {STORE}", [m], [out])
    for i in range(4):
        assert (out[:, i] == pairs(m[i, 2 * T, G], m[i, 2 * T + 1, G])).all()


def test_ldmatrix_x2_trans_ignores_the_addresses_of_the_upper_lanes() -> None:
    m, out = matrices(4), aligned(np.zeros((32, 4), np.uint32))
    body = f"uint32_t r[4] = {{}}, s[2]; {FILL} ldmatrix_x2_trans(s, t < 16 ? smem + t * 16 : 3u);"
    run(f"{body} r[0] = s[0]; r[1] = s[1]; {STORE}", [m], [out])
    for i in range(2):
        assert (out[:, i] == pairs(m[i, 2 * T, G], m[i, 2 * T + 1, G])).all()


def fragments(a: np.ndarray, b: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Operand registers of each lane ([32, 6]: a0..a3, b0, b1) and accumulators ([32, 4])."""
    regs = np.empty((32, 6), np.uint32)
    for i, (row, col) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
        regs[:, i] = pairs(a[G + row, 2 * T + col], a[G + row, 2 * T + col + 1])
    for i, row in enumerate([0, 8]):
        regs[:, 4 + i] = pairs(b[2 * T + row, G], b[2 * T + row + 1, G])
    acc = np.stack([d[G + r, 2 * T + c] for r, c in [(0, 0), (0, 1), (8, 0), (8, 1)]], axis=1)
    return aligned(regs), aligned(acc.astype(np.float32))


def run_mma(element: str, a: np.ndarray, b: np.ndarray, d: np.ndarray, order: Order) -> np.ndarray:
    regs, acc = fragments(a, b, d)
    out = aligned(np.zeros((32, 4), np.float32))
    body = f"""
    uint32_t a[4]; float d[4];
    const float* acc = static_cast<const float*>(params.in[1]);
    for (int i = 0; i < 4; ++i) {{ a[i] = in[t * 6 + i]; d[i] = acc[t * 4 + i]; }}
    mma_m16n8k16<{element}>(d, a, in[t * 6 + 4], in[t * 6 + 5]);
    for (int i = 0; i < 4; ++i) static_cast<float*>(params.out[0])[t * 4 + i] = d[i];"""
    run(body, [regs, acc], [out], order=order)
    full = np.empty((16, 8), np.float32)
    for i, (r, c) in enumerate([(0, 0), (0, 1), (8, 0), (8, 1)]):
        full[G + r, 2 * T + c] = out[:, i]
    return full


def bits(x: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """x rounded to the 16-bit type: its bit patterns and its values in fp64."""
    rounded = torch.tensor(x, dtype=torch.float32).to(dtype)
    return rounded.view(torch.uint16).numpy(), rounded.double().numpy()


@pytest.mark.parametrize("element, dtype", [("Fp16", torch.float16), ("Bf16", torch.bfloat16)])
@pytest.mark.parametrize("order", list(Order))
def test_mma_multiplies_and_accumulates(element: str, dtype: torch.dtype, order: Order) -> None:
    rng = np.random.default_rng(5)
    (a, av), (b, bv) = (bits(rng.standard_normal(s), dtype) for s in ((16, 16), (16, 8)))
    d = rng.standard_normal((16, 8)).astype(np.float32)
    got = run_mma(element, a, b, d, order)
    np.testing.assert_allclose(got, d + av @ bv, rtol=0, atol=2e-6 * 16)


@pytest.mark.parametrize("element, dtype", [("Fp16", torch.float16), ("Bf16", torch.bfloat16)])
def test_mma_reads_every_operand_value_exactly(element: str, dtype: torch.dtype) -> None:
    """1 * x for finite, subnormal and infinite x; NaN stays NaN."""
    every = np.arange(65536, dtype=np.uint16)
    special = every[np.r_[0:40, 0x3F0:0x410, 0x7BF0:0x7C08, 0x7F70:0x7F90, 0x8000:0x8010]]
    patterns = np.concatenate([special, np.random.default_rng(6).choice(every, 256)])[:256]
    a = patterns.reshape(16, 16)
    b = np.zeros((16, 8), np.uint16)
    values = torch.from_numpy(a.view(np.int16).copy()).view(dtype).float().numpy()
    assert not np.isfinite(values).all(), "the patterns include infinities and NaNs"
    one = torch.tensor(1.0, dtype=dtype).view(torch.int16).item()
    for k in range(16):
        b[:] = 0
        b[k] = one
        column = np.zeros_like(a)  # alone: 0 * inf of another column would spoil the row
        column[:, k] = a[:, k]
        got = run_mma(element, column, b, np.zeros((16, 8), np.float32), Order.FORWARD)
        np.testing.assert_array_equal(got, np.repeat(values[:, k : k + 1], 8, axis=1))


@pytest.mark.parametrize("element, dtype", [("Fp16", torch.float16), ("Bf16", torch.bfloat16)])
def test_pack2_rounds_to_nearest_even(element: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(7)
    any_bits = rng.integers(0, 2**32, 1 << 14, dtype=np.uint64).astype(np.uint32)
    usual = (rng.standard_normal(1 << 13) * 2.0 ** rng.integers(-30, 18, 1 << 13)).astype(np.float32)
    ties = (np.arange(1 << 13, dtype=np.uint32) << 12) + 0x38000000
    edges = np.float32([0.0, -0.0, np.inf, -np.inf, 65504, 65519.9, 65520, 6e-8, 2.98e-8, 2.99e-8])
    x = np.concatenate([any_bits, usual.view(np.uint32), ties, edges.view(np.uint32)])
    x = aligned(np.resize(x, (len(x) + 63) // 64 * 64))
    out = aligned(np.zeros(len(x) // 2, np.uint32))
    body = f"""const float* x = static_cast<const float*>(params.in[0]);
    for (uint32_t i = t; i < {len(out)}; i += 32)
        out[i] = pack2<{element}>(x[2 * i], x[2 * i + 1]);"""
    run(body, [x], [out])
    value = torch.from_numpy(x.view(np.float32).copy())
    want = value.to(dtype).view(torch.uint16).numpy()
    nan = torch.isnan(value).numpy()
    got = out.view(np.uint16)
    np.testing.assert_array_equal(got[~nan], want[~nan])
    assert (got[nan] == 0x7FFF).all()


MATHS = {
    "exp2_approx": (np.linspace(-140, 130, 4096), np.exp2, 2**-22),
    "log2_approx": (np.exp2(np.linspace(-126, 127, 4096)), np.log2, 2**-22),
    "rcp_approx": (np.linspace(-1e6, 1e6, 4096), np.reciprocal, 2**-23),
    "tanh_approx": (np.linspace(-12, 12, 4096), np.tanh, 2**-11),
}


def run_maths(name: str, x: np.ndarray) -> np.ndarray:
    x, out = aligned(x.astype(np.float32)), aligned(np.zeros(len(x), np.float32))
    body = f"""const float* x = static_cast<const float*>(params.in[0]);
    float* y = static_cast<float*>(params.out[0]);
    for (uint32_t i = t; i < {len(x)}; i += 32) y[i] = {name}(x[i]);"""
    run(body, [x], [out])
    return out


@pytest.mark.parametrize("name", MATHS)
def test_maths_stays_within_the_documented_error(name: str) -> None:
    points, exact, tolerance = MATHS[name]
    x = points.astype(np.float32)
    want = exact(x.astype(np.float64))
    normal = (np.abs(want) >= 2.0**-126) & (np.abs(want) < 2.0**128)
    got = run_maths(name, x)
    absolute = tolerance if name == "log2_approx" else 0
    np.testing.assert_allclose(got[normal], want[normal], rtol=1.01 * tolerance, atol=absolute)
    assert (got[np.abs(want) < 2.0**-126] == 0).all(), "ftz: subnormal results are zero"


def test_tanh_is_as_coarse_as_the_gpu() -> None:
    x = np.linspace(0.1, 2, 4096)
    error = np.abs(run_maths("tanh_approx", x) / np.tanh(x.astype(np.float32).astype(float)) - 1)
    assert error.max() > 2**-12, "a twin that is too exact hides what softcap costs on a GPU"


def test_maths_special_values() -> None:
    inf, nan = np.inf, np.nan
    np.testing.assert_array_equal(run_maths("exp2_approx", np.array([-inf, inf, nan, 0, 1e-40])), [0, inf, nan, 1, 1])
    np.testing.assert_array_equal(
        run_maths("log2_approx", np.array([0, 1e-40, inf, -1, nan])), [-inf, -inf, inf, nan, nan]
    )
    np.testing.assert_array_equal(run_maths("rcp_approx", np.array([0.0, inf, -inf])), [inf, 0, 0])
    np.testing.assert_array_equal(run_maths("tanh_approx", np.array([inf, -inf, nan])), [1, -1, nan])


@pytest.mark.parametrize("order", list(Order))
def test_shuffles(order: Order) -> None:
    x = aligned(np.random.default_rng(8).integers(0, 2**32, 32).astype(np.uint32))
    out = aligned(np.zeros((32, 4), np.uint32))
    body = """
    float f; __builtin_memcpy(&f, in + t, 4);
    uint32_t r[4] = {shfl_xor(in[t], 5), shfl_idx(in[t], static_cast<int>(t * 7 + 32)), 0, 0};
    const float g = shfl_xor(f, 16), h = shfl_idx(f, 3);
    __builtin_memcpy(r + 2, &g, 4); __builtin_memcpy(r + 3, &h, 4);
    """
    run(body + STORE, [x], [out], order=order)
    want = np.stack([x[LANE ^ 5], x[LANE * 7 % 32], x[LANE ^ 16], np.repeat(x[3], 32)], axis=1)
    np.testing.assert_array_equal(out, want)


def test_cp_async_reads_its_source_only_at_the_wait_that_names_it() -> None:
    x, out = aligned(np.arange(8, dtype=np.uint32)), aligned(np.zeros((3, 4), np.uint32))
    body = """
    uint32_t* source = static_cast<uint32_t*>(params.out[1]);
    if (t == 0) {
        cp_async_16(smem, source, true); cp_async_commit();
        cp_async_16(smem + 16, source + 4, true); cp_async_commit();
        st_global_v4(source, {{10, 11, 12, 13}});
        cp_async_wait<1>();
        st_global_v4(source, {{20, 21, 22, 23}}); st_global_v4(source + 4, {{30, 31, 32, 33}});
        st_global_v4(out, ld_shared_v4(smem));
        cp_async_wait<0>();
        st_global_v4(out + 4, ld_shared_v4(smem)); st_global_v4(out + 8, ld_shared_v4(smem + 16));
    }"""
    run(body, [], [out, x])
    np.testing.assert_array_equal(out[0], [10, 11, 12, 13])
    np.testing.assert_array_equal(out[1], [10, 11, 12, 13])
    np.testing.assert_array_equal(out[2], [30, 31, 32, 33])


def test_cp_async_without_valid_writes_zeros_and_reads_nothing() -> None:
    out = aligned(np.ones((32, 4), np.uint32))
    body = """cp_async_16(smem + t * 16, reinterpret_cast<const void*>(16), false);
    cp_async_commit(); cp_async_wait<0>();
    st_global_v4(out + t * 4, ld_shared_v4(smem + t * 16));"""
    run(body, [], [out])
    assert (out == 0).all()


def test_loads_stores_and_indices() -> None:
    x = aligned(np.arange(64, dtype=np.int32) - 32)
    out = aligned(np.zeros((3, 64), np.float32))
    body = """
    float* y = static_cast<float*>(params.out[0]) + block_idx() * 64;
    const int32_t i = ld_global_s32(reinterpret_cast<const int32_t*>(in) + t);
    st_shared_u32(smem + (63 - t) * 4, static_cast<uint32_t>(i));
    sync_cta();
    if (t < 16) {
        const Vec4 v = ld_shared_v4(smem + t * 16);
        for (int j = 0; j < 4; ++j)
            st_global_f32(y + t * 4 + j, static_cast<float>(static_cast<int32_t>(v.x[j])));
    }
    sync_cta();
    if (t == 63) st_global_f32(y + 63, ld_global_f32(y) + 0.5f);"""
    run(body, [x], [out], threads=64, grid=3)
    want = x[::-1].astype(np.float32)
    want[63] = 31.5
    np.testing.assert_array_equal(out, np.stack([want] * 3))


def last_writer(order: Order, seed: int = 0) -> int:
    out = aligned(np.zeros(4, np.uint32))
    run("out[0] = t;", [], [out], threads=64, order=order, seed=seed)
    return int(out[0])


def test_orders_are_different_schedules() -> None:
    assert last_writer(Order.FORWARD) == 63
    assert last_writer(Order.REVERSE) == 0
    shuffled = [last_writer(Order.SHUFFLE, seed) for seed in range(6)]
    assert len(set(shuffled)) > 1
    assert shuffled == [last_writer(Order.SHUFFLE, seed) for seed in range(6)]


def test_the_portable_fiber_switch_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What machines other than x86-64 use, exercised here."""
    flags = (*sources.EMULATOR_CORE_FLAGS, "-DFMHA_EMULATOR_UCONTEXT")
    monkeypatch.setattr(sources, "EMULATOR_CORE_FLAGS", flags)
    m, out = matrices(9), aligned(np.zeros((64, 4), np.uint32))
    body = "st_shared_v4(smem + (63 - t) * 16, ld_global_v4(in + t % 32 * 4)); sync_cta();"
    body += f"uint32_t r[4]; ldmatrix_x4(r, smem + t * 16); sync_cta(); {STORE}"
    run(body, [m], [out], threads=64)
    rows = m.reshape(32, 8)[::-1].reshape(4, 8, 8)
    for i in range(4):
        want = pairs(rows[i, G, 2 * T], rows[i, G, 2 * T + 1])
        assert (out[:32, i] == want).all() and (out[32:, i] == want).all()


# --- the device side ---


def signatures(header: Path) -> set[str]:
    """'type name(parameters)' of everything that kernels may call, without white space."""
    text = re.sub(r"namespace emu \{.*?\}  // namespace emu", "", header.read_text(), flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    pattern = r"^(?:FMHA_DEVICE )?((?:void|bool|u?int32_t|int|float|Vec4) \w+(?:<\w+>)?\(.*?\))(?=\s*[{;])"
    found = re.findall(pattern, text, flags=re.M | re.S)
    return {re.sub(r"\s+", "", each) for each in found}


def wrapper_names(header: Path) -> set[str]:
    found = (re.match(r"(?:void|bool|u?int32_t|int|float|Vec4)(\w+)", each) for each in signatures(header))
    return {each[1] for each in found if each}


@pytest.mark.parametrize("name", ["common.cuh", "sm80.cuh"])
def test_twins_have_the_signatures_of_the_wrappers(name: str) -> None:
    device = signatures(config.kernel_src() / "fmha" / "ptx" / name)
    twin = signatures(config.kernel_src() / "emulator" / "ptx" / name)
    assert len(device) >= 8
    assert device == twin


EVERY_WRAPPER = """
#include <ptx/sm80.cuh>
struct Params { float* out; const void* in; const int32_t* ints; const float* floats; };
namespace fmha {
template <class E>
FMHA_DEVICE void use(const Params& p) {
    const uint32_t t = thread_idx(), base = smem_base() + t * 16;
    cp_async_16(base, p.in, t < 16); cp_async_commit(); cp_async_wait<1>(); cp_async_wait<0>();
    sync_cta(); sync_warp();
    uint32_t a[4], b[4], c[2]; float d[4] = {0, 0, 0, 0};
    ldmatrix_x4(a, base); ldmatrix_x4_trans(b, base); ldmatrix_x2_trans(c, base);
    mma_m16n8k16<E>(d, a, b[0], b[1]); mma_m16n8k16<E>(d, b, c[0], c[1]);
    float x = exp2_approx(d[0]) + log2_approx(d[1]) + tanh_approx(d[2]) + rcp_approx(d[3]);
    x += shfl_xor(x, 1) + shfl_idx(x, 3) + ld_global_f32(p.floats);
    uint32_t u = pack2<E>(x, d[1]); u = shfl_xor(u, 2) + shfl_idx(u, 1) + ld_global_s32(p.ints);
    sync_cta(); st_shared_u32(base, u); sync_cta();
    Vec4 v = ld_global_v4(p.in); st_shared_v4(base, v); v = ld_shared_v4(base); v.x[0] += u;
    st_global_v4(p.out + 4 * t + 4 * (block_idx() % grid_dim()), v); st_global_f32(p.out, x);
    if (warp_any(t == 7)) st_global_u32(p.out + 1, u);
}
}
FMHA_KERNEL(use_fp16, Params, 128, 1) {
    FMHA_UNROLL for (int i = 0; i < 2; ++i) fmha::use<fmha::Fp16>(params);
}
FMHA_KERNEL(use_bf16, Params, 128, 1) {
    FMHA_UNROLL_1 for (int i = 0; i < 2; ++i) fmha::use<fmha::Bf16>(params);
}
"""


def test_every_wrapper_compiles_for_the_cpu() -> None:
    assert obtain.from_source(EVERY_WRAPPER, "use_bf16").name == "use_bf16"
    headers = (config.kernel_src() / "fmha" / "ptx" / name for name in ("common.cuh", "sm80.cuh"))
    wrappers = set().union(*map(wrapper_names, headers))
    assert len(wrappers) >= 20
    missing = {name for name in wrappers if not re.search(rf"\b{name}\b", EVERY_WRAPPER)}
    assert not missing, f"EVERY_WRAPPER does not use {missing}"


@pytest.mark.nvcc
@pytest.mark.parametrize("arch", ["80", "90", "120"])
def test_every_wrapper_compiles_for_the_gpu(arch: str, tmp_path: Path) -> None:
    (tmp_path / "use.cu").write_text(EVERY_WRAPPER)
    command = [str(nvcc.find_nvcc().path), "-cubin", "-std=c++17", "-O3", f"-arch=sm_{arch}"]
    command += [f"-I{config.kernel_src() / 'fmha'}", "-o", "use.cubin", "use.cu"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "use.cubin").stat().st_size > 0

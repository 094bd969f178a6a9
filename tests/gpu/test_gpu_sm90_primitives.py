# SPDX-License-Identifier: Apache-2.0
"""Hopper's instructions do on a GPU what the emulator says: the same small kernels and numbers.

Needs nvcc beside the GPU. A kernel that hangs would take the machine with it; none here waits for
anything but its own copies.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.sm90_probe import (
    a_registers,
    emulate,
    mn_major_steps,
    operands,
    rs_case,
    run_wgmma,
    ss_case,
    tile_image,
)
from helpers.tma_probe import STORE_CASES, TMA_CASES, run_tma, run_tma_store

from fmha_runtime import config
from fmha_runtime.device import driver, tensor_map
from fmha_runtime.device.tensor_map import TensorMapLayout
from fmha_runtime.toolchain import nvcc

pytestmark = [pytest.mark.gpu, pytest.mark.nvcc]

SIZES = range(32, 257, 8)
Launch = Callable[..., None]


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Compiles and launches like sm90_probe.emulate, on the GPU: host pointers are translated."""

    def on_gpu(
        source: str,
        name: str,
        threads: int,
        smem: int,
        params: ctypes.Structure,
        inputs: Sequence[np.ndarray],
        outputs: Sequence[np.ndarray],
    ) -> None:
        (tmp_path / f"{name}.cu").write_text(source)
        command = [str(nvcc.find_nvcc().path), "-cubin", "-std=c++17", "-O3", "-arch=sm_90a"]
        command += [f"-I{config.kernel_src() / 'fmha'}", "-o", f"{name}.cubin", f"{name}.cu"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        arrays = [*inputs, *outputs]
        device = [torch.from_numpy(a.reshape(-1).view(np.uint8).copy()).cuda() for a in arrays]
        moved = {a.ctypes.data: d.data_ptr() for a, d in zip(arrays, device, strict=True)}
        raw = ctypes.create_string_buffer(ctypes.sizeof(params) + 64)
        slot = -(-ctypes.addressof(raw) // 64) * 64
        ctypes.memmove(slot, ctypes.addressof(params), ctypes.sizeof(params))
        words = (ctypes.c_uint64 * (ctypes.sizeof(params) // 8)).from_address(slot)
        for i, word in enumerate(words):
            words[i] = moved.get(word, word)
        torch.cuda.synchronize()
        kernel = driver.load((tmp_path / f"{name}.cubin").read_bytes(), name, 0, smem, ctypes.sizeof(params))
        argument = (ctypes.c_void_p * 1)(slot)
        stream = torch.cuda.current_stream().cuda_stream
        kernel.launch(1, threads, smem, stream, ctypes.addressof(argument))
        torch.cuda.synchronize()
        for array, copy in zip(outputs, device[len(inputs) :], strict=True):
            array.reshape(-1).view(np.uint8)[:] = copy.cpu().numpy()

    return on_gpu


@pytest.mark.parametrize("name", TMA_CASES)
def test_the_copy_engine_and_the_emulator_fill_shared_memory_alike(name: str, launch: Launch) -> None:
    case = TMA_CASES[name]
    kept = []

    def encode(layout: TensorMapLayout, address: int, slot: int) -> None:
        """Like tensor_map.encode, for a copy of the tensor on the GPU, through a second address."""
        device = torch.from_numpy(case.storage().view(np.int16)).cuda()
        kept.append(device)
        tensor_map.encode(layout, 0x1000, slot)
        tensor_map.replace_address(slot, device.data_ptr())

    got, want = run_tma(launch, encode, case)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got, run_tma(emulate, tensor_map.encode_emulated, case)[0])


@pytest.mark.parametrize("tiles, load", [(1, False), (1, True), (3, False), (4, True)])
@pytest.mark.parametrize("name", STORE_CASES)
def test_the_copy_engine_and_the_emulator_store_alike(name: str, tiles: int, load: bool, launch: Launch) -> None:
    case = STORE_CASES[name]
    kept = []

    def encode(layout: TensorMapLayout, address: int, slot: int) -> None:
        """For the tensor that the kernel writes, which launch() knows nothing of."""
        kept.append(torch.from_numpy(case.storage().view(np.int16)).cuda())
        tensor_map.encode(layout, kept[0].data_ptr(), slot)

    def launch_and_fetch(*arguments: object) -> None:
        launch(*arguments)
        arguments[-1][0][:] = kept[0].cpu().numpy().view(np.uint16)

    got, want, out, loaded = run_tma_store(launch_and_fetch, encode, case, tiles, load)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(out, loaded)
    emulated = run_tma_store(emulate, tensor_map.encode_emulated, case, tiles, load)
    np.testing.assert_array_equal(got, emulated[0])
    np.testing.assert_array_equal(out, emulated[2])


@pytest.mark.parametrize("n", SIZES)
def test_wgmma_multiplies_tiles(n: int, launch: Launch) -> None:
    assert ss_case(launch, "Bf16", n, 80, 128) < 1e-4
    assert ss_case(launch, "Fp16", n, 48, 64) < 1e-4


@pytest.mark.parametrize("n", SIZES)
def test_wgmma_takes_a_from_registers(n: int, launch: Launch) -> None:
    assert rs_case(launch, "Bf16", n, 64, 128) < 1e-4
    assert rs_case(launch, "Fp16", n, 48, 64) < 1e-4


def test_wgmma_with_the_narrowest_swizzle(launch: Launch) -> None:
    assert ss_case(launch, "Bf16", 64, 48, 32) < 1e-4
    assert rs_case(launch, "Bf16", 64, 48, 32) < 1e-4


def test_wgmma_adds_to_its_accumulator(launch: Launch) -> None:
    x = operands("Bf16", 32, 32)
    start = np.random.default_rng(1).standard_normal((128, 16)).astype(np.float32)
    image, steps = tile_image(x.b, 64), mn_major_steps(0, 32, 64)
    got, want = (
        run_wgmma(each, "Bf16", 32, image, steps, registers=a_registers(x.a), start=start) for each in (launch, emulate)
    )
    np.testing.assert_allclose(got, want, atol=1e-4)

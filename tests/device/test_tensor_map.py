# SPDX-License-Identifier: Apache-2.0
"""Tensor maps: what the copy engine cannot read is refused with the reason, before any driver."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from fmha_runtime import config
from fmha_runtime.device import tensor_map
from fmha_runtime.device.tensor_map import Swizzle, TensorMapLayout
from fmha_runtime.errors import DriverError, InputError
from fmha_runtime.kernels.forward import params
from fmha_runtime.kernels.spec import DType
from fmha_runtime.toolchain import nvcc

GOOD = {
    "dims": (64, 100, 3, 2),
    "byte_strides": (384, 128, 38400),
    "box": (64, 128, 1, 1),
    "swizzle": Swizzle.B128,
    "dtype": DType.BF16,
}


def changed(**fields: object) -> TensorMapLayout:
    return TensorMapLayout(**{**GOOD, **fields})  # type: ignore[arg-type]


@pytest.fixture
def slot():
    """Address of 128 writable bytes, aligned to 64."""
    raw = ctypes.create_string_buffer(192)
    yield -(-ctypes.addressof(raw) // 64) * 64


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"dims": (8,) * 6, "byte_strides": (16,) * 5, "box": (8,) * 6},
            "1 to 5 dimensions, not 6",
        ),
        ({"byte_strides": (128,)}, "4 dimensions takes 3 strides and 4 box sizes, not 1 and 4"),
        ({"box": (64, 8)}, "4 dimensions takes 3 strides and 4 box sizes, not 3 and 2"),
        ({"dims": (64, 0, 3, 2)}, "dimension 1 has 0 elements"),
        ({"dims": (64, 1 << 32, 3, 2)}, r"4294967296 elements; 1 to 2\^32 - 1"),
        ({"box": (64, 257, 1, 1)}, "the box has 257 elements in dimension 1; allowed: 1 to 256"),
        ({"box": (64, 0, 1, 1)}, "the box has 0 elements"),
        (
            {"byte_strides": (384, 136, 38400)},
            "dimension 2 has a stride of 136 bytes.*multiples of",
        ),
        ({"byte_strides": (384, 128, 1 << 40)}, r"dimension 3 .* 0 to 2\^40 - 16"),
        ({"byte_strides": (384, 128, -16)}, "dimension 3 has a stride of -16 bytes"),
        ({"box": (20, 8, 1, 1)}, "the box is 40 bytes wide; allowed: multiples of 16"),
        ({"box": (72, 8, 1, 1)}, "144 bytes wide, but the 128-byte swizzle takes boxes up to its"),
        ({"swizzle": Swizzle.B64}, "128 bytes wide, but the 64-byte swizzle"),
    ],
)
def test_a_layout_that_the_copy_engine_cannot_read(fields, message) -> None:
    with pytest.raises(InputError, match=message):
        changed(**fields)


def test_the_limits_themselves_are_allowed() -> None:
    changed(dims=((1 << 32) - 1,) * 4, byte_strides=((1 << 40) - 16, 0, 16), box=(64, 256, 1, 1))
    changed(swizzle=Swizzle.NONE, box=(256, 256, 1, 1))


def test_bytes_of_a_box_include_what_lies_outside() -> None:
    assert changed(dims=(40, 2, 1, 1)).box_bytes == 64 * 128 * 2
    assert changed(dtype=DType.E4M3).box_bytes == 64 * 128


def test_swizzle_spans() -> None:
    assert [s.span for s in (Swizzle.B32, Swizzle.B64, Swizzle.B128)] == [32, 64, 128]


def test_a_dense_tensor_has_dimensions_column_row_head_batch() -> None:
    got = tensor_map.layout((2, 100, 3, 64), (19200, 192, 64, 1), DType.BF16, 128, 64, Swizzle.B128)
    assert got == changed()


def test_a_varlen_tensor_has_one_batch() -> None:
    got = tensor_map.layout((100, 3, 64), (192, 64, 1), DType.FP16, 128, 64, Swizzle.B128)
    assert got.dims == (64, 100, 3, 1) and got.byte_strides == (384, 128, 0)


def test_strides_of_dimensions_of_size_1_do_not_matter() -> None:
    got = tensor_map.layout((1, 100, 1, 64), (-3, 64, 7, 1), DType.BF16, 128, 64, Swizzle.B128)
    assert got.byte_strides == (128, 0, 0)
    with pytest.raises(InputError, match="dimension 2 has a stride of 14 bytes"):
        tensor_map.layout((1, 100, 2, 64), (-3, 64, 7, 1), DType.BF16, 128, 64, Swizzle.B128)


def test_equal_layouts_are_one_key() -> None:
    one = tensor_map.layout((1, 9, 1, 64), (5, 64, 7, 1), DType.BF16, 8, 64, Swizzle.B128)
    two = tensor_map.layout((1, 9, 1, 64), (9, 64, 1, 1), DType.BF16, 8, 64, Swizzle.B128)
    assert {one: 1}[two] == 1


@pytest.mark.parametrize(
    "shape, strides, message",
    [
        ((100, 64), (64, 1), r"shape \(100, 64\) .* is neither"),
        ((1, 100, 1, 64), (64, 1), "is neither"),
        ((1, 100, 1, 64), (6400, 64, 64, 2), "head dim has stride 2; it must be contiguous"),
        ((1, 0, 1, 64), (6400, 64, 64, 1), "dimension 1 has 0 elements"),
        ((1, 100, 2, 36), (7200, 72, 36, 1), "stride of 72 bytes.*make the tensor contiguous"),
    ],
)
def test_a_tensor_that_the_copy_engine_cannot_read(shape, strides, message) -> None:
    with pytest.raises(InputError, match=message):
        tensor_map.layout(shape, strides, DType.BF16, 8, 64, Swizzle.B128)


@pytest.mark.parametrize("encode", [tensor_map.encode, tensor_map.encode_emulated])
def test_addresses_are_checked_before_anything_is_encoded(encode, slot) -> None:
    with pytest.raises(InputError, match=r"starts at address 0x1008; .*multiples of 16"):
        encode(changed(), 0x1008, slot)
    with pytest.raises(InputError, match=r"tensor map at address .* is not aligned to 64 bytes"):
        encode(changed(), 0x1000, slot + 16)


@pytest.mark.parametrize("replace", [tensor_map.replace_address, tensor_map.replace_address_emulated])
def test_a_replaced_address_is_checked(replace, slot) -> None:
    with pytest.raises(InputError, match="starts at address 0x1008"):
        replace(slot, 0x1008)


def test_an_emulated_map_changes_only_its_address(slot) -> None:
    tensor_map.encode_emulated(changed(), 0x2000, slot)
    before = ctypes.string_at(slot, tensor_map.MAP_BYTES)
    tensor_map.replace_address_emulated(slot, 0x1000)
    tensor_map.replace_address_emulated(slot, 0x2000)
    assert ctypes.string_at(slot, tensor_map.MAP_BYTES) == before
    tensor_map.replace_address_emulated(slot, 0x3000)
    other = ctypes.string_at(slot, tensor_map.MAP_BYTES)
    assert [i for i in range(128) if other[i] != before[i]] == [9]
    tensor_map.encode_emulated(changed(), 0x3000, slot)
    assert ctypes.string_at(slot, tensor_map.MAP_BYTES) == other


def test_no_driver_is_said_so(slot) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        for call in (
            lambda: tensor_map.encode(changed(), 0x1000, slot),
            lambda: tensor_map.replace_address(slot, 0x1000),
        ):
            with pytest.raises(DriverError, match="no CUDA driver"):
                call()
    else:
        pytest.skip("there is a driver")


def test_the_parameter_block_of_tma_kernels_is_one_struct_in_python_and_cpp(
    tmp_path: Path,
) -> None:
    block = params.FwdTmaParams
    fields = [name for name, *_ in block._fields_ if name != "padding"]
    prints = "".join(f'printf("%zu ", offsetof(fmha::FwdTmaParams, {name}));' for name in fields)
    (tmp_path / "abi.cpp").write_text(
        '#include "params.h"\n#include <stdio.h>\nint main() {'
        f'{prints} printf("%zu %zu", sizeof(fmha::FwdTmaParams), alignof(fmha::FwdTmaParams)); }}'
    )
    include = f"-I{config.kernel_src() / 'fmha'}"
    command = [str(nvcc.find_host_cxx()), "-std=c++17", "-Wno-invalid-offsetof", include]
    subprocess.run([*command, "abi.cpp", "-o", "abi"], cwd=tmp_path, check=True)
    found = subprocess.run([tmp_path / "abi"], capture_output=True, text=True, check=True)
    want = [getattr(block, name).offset for name in fields]
    want += [ctypes.sizeof(block), tensor_map.MAP_ALIGN]
    assert [int(x) for x in found.stdout.split()] == want


class Strange:
    """A tensor that no machine here has the memory for."""

    def __init__(self, shape, strides, address=0x1000):
        self.shape, self.ndim = shape, len(shape)
        self.stride, self.data_ptr = (lambda: strides), (lambda: address)


@pytest.mark.parametrize(
    "tensor, message",
    [
        (Strange((2, 70, 8, 64), (1 << 40, 512, 64, 1)), r"a stride of 2199023255552 bytes.*from 0 to 2\^40 - 16"),
        (Strange((2, 70, 8, 64), (-512, 512, 64, 1)), "a stride of -1024 bytes"),
        (Strange((1 << 32, 8, 64), (512, 64, 1)), "has 4294967296 elements"),
        (Strange((70, 8, 64), (512, 64, 1), 0x1008), "starts at address 0x1008"),
    ],
)
def test_what_the_driver_refuses_is_said_by_name(monkeypatch, slot, tensor, message) -> None:
    refuses = SimpleNamespace(cuTensorMapEncodeTiled=lambda *_: 1)
    monkeypatch.setattr(tensor_map, "_library", lambda: refuses)
    encoder = tensor_map.Encoder(DType.BF16, 64, 64, Swizzle.B128, emulated=False)
    with pytest.raises(InputError, match=message):
        encoder.write(slot, tensor, encoder.sizes(tensor))
    good = Strange((70, 8, 64), (512, 64, 1))
    with pytest.raises(DriverError, match="cuTensorMapEncodeTiled failed: CUresult 1"):
        encoder.write(slot, good, encoder.sizes(good))


def test_numbers_of_the_driver_are_those_of_its_header() -> None:
    api = pytest.importorskip("cuda.bindings.driver")
    kind = api.CUtensorMapDataType
    assert {
        DType.FP16: int(kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16),
        DType.BF16: int(kind.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16),
        DType.E4M3: int(kind.CU_TENSOR_MAP_DATA_TYPE_UINT8),
    } == tensor_map._TYPES
    assert int(api.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE) == tensor_map._NO_INTERLEAVE
    assert int(api.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B) == tensor_map._L2_256B
    assert int(api.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == tensor_map._ZEROS
    assert [
        int(getattr(api.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{n}")) for n in ("NONE", "32B", "64B", "128B")
    ] == [*map(int, (Swizzle.NONE, Swizzle.B32, Swizzle.B64, Swizzle.B128))]

# SPDX-License-Identifier: Apache-2.0
"""Tensor maps: what the copy engine of Hopper knows of a tensor, for the driver and the emulator.

A layout is everything but the address, so that a plan encodes once and a call replaces addresses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

from ..errors import DriverError, InputError
from ..kernels.spec import DType

MAP_BYTES = 128
"""Size of a tensor map."""

MAP_ALIGN = 64
"""Alignment of a tensor map."""

_MAGIC = 0x70616D20756D6521
_MAX_RANK = 5
_MAX_BOX = 256
_MAX_STRIDE = 1 << 40
_MAX_DIM = 1 << 32


class Swizzle(IntEnum):
    """How 16-byte chunks of a tile are permuted in shared memory; the driver's numbers."""

    NONE = 0
    B32 = 1
    B64 = 2
    B128 = 3

    @property
    def span(self) -> int:
        """Bytes of a row of the swizzle's pattern, which a box must not exceed."""
        return 16 << self if self else _MAX_BOX * 16


@dataclass(frozen=True)
class TensorMapLayout:
    """A tensor seen by the copy engine, innermost dimension first.

    Attributes:
        dims: elements of each dimension.
        byte_strides: of each dimension but the innermost, which is contiguous.
        box: elements of each dimension that one copy brings.
        swizzle: how the box lies in shared memory.
        dtype: element type.
    """

    dims: tuple[int, ...]
    byte_strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: Swizzle
    dtype: DType

    def __post_init__(self) -> None:
        rank = len(self.dims)
        if not 1 <= rank <= _MAX_RANK:
            raise InputError(f"a tensor map has 1 to {_MAX_RANK} dimensions, not {rank}")
        if len(self.byte_strides) != rank - 1 or len(self.box) != rank:
            raise InputError(
                f"a tensor map of {rank} dimensions takes {rank - 1} strides and {rank} box sizes, "
                f"not {len(self.byte_strides)} and {len(self.box)}"
            )
        for i, size in enumerate(self.dims):
            if not 0 < size < _MAX_DIM:
                raise InputError(f"dimension {i} has {size} elements; 1 to 2^32 - 1 can be mapped")
        for i, size in enumerate(self.box):
            if not 0 < size <= _MAX_BOX:
                raise InputError(f"the box has {size} elements in dimension {i}; allowed: 1 to 256")
        for i, stride in enumerate(self.byte_strides, 1):
            if stride % 16 != 0 or not 0 <= stride < _MAX_STRIDE:
                raise InputError(
                    f"dimension {i} has a stride of {stride} bytes; the copy engine takes "
                    "multiples of 16 from 0 to 2^40 - 16: make the tensor contiguous"
                )
        inner = self.box[0] * self.dtype.itemsize
        if inner % 16 != 0:
            raise InputError(f"the box is {inner} bytes wide; allowed: multiples of 16")
        if inner > self.swizzle.span:
            raise InputError(
                f"the box is {inner} bytes wide, but the {self.swizzle.span}-byte swizzle takes "
                "boxes up to its own width"
            )

    @property
    def box_bytes(self) -> int:
        """Bytes that one copy counts on its mbarrier, those outside the tensor included."""
        size = self.dtype.itemsize
        for elements in self.box:
            size *= elements
        return size


def layout(
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: DType,
    box_rows: int,
    box_columns: int,
    swizzle: Swizzle,
) -> TensorMapLayout:
    """The layout of an attention operand: dimensions (head dim, row, head, batch).

    Args:
        shape: [batch, rows, heads, head dim], or [tokens, heads, head dim] with one batch.
        strides: in elements; the last must be 1. Those of dimensions of size 1 do not matter.
        dtype: element type.
        box_rows, box_columns: rows and head-dim columns of one copy.
        swizzle: how the box lies in shared memory.

    Raises:
        InputError: the copy engine cannot read such a tensor; the message says why.
    """
    if len(shape) not in (3, 4) or len(shape) != len(strides):
        raise InputError(
            f"shape {tuple(shape)} with strides {tuple(strides)} is neither [batch, rows, heads, "
            "head dim] nor [tokens, heads, head dim]"
        )
    if len(shape) == 3:
        shape, strides = (1, *shape), (0, *strides)
    batch, rows, heads, dim = shape
    if strides[3] != 1 and dim != 1:
        raise InputError(f"the head dim has stride {strides[3]}; it must be contiguous")
    dims = (dim, rows, heads, batch)
    steps = (strides[1], strides[2], strides[0])
    # A dimension of size 1 is never stepped along, whatever its stride says.
    size = dtype.itemsize
    byte_strides = (0 if count == 1 else step * size for count, step in zip(dims[1:], steps, strict=True))
    box = (box_columns, box_rows, 1, 1)
    return TensorMapLayout(dims, tuple(byte_strides), box, swizzle, dtype)


def check_address(address: int) -> None:
    """
    Raises:
        InputError: the tensor does not start at a multiple of 16 bytes.
    """
    if address % 16 != 0:
        raise InputError(
            f"the tensor starts at address {address:#x}; the copy engine takes multiples of 16 bytes: clone the tensor"
        )


def _check_slot(slot: int) -> None:
    if slot % MAP_ALIGN != 0:
        raise InputError(f"the tensor map at address {slot:#x} is not aligned to {MAP_ALIGN} bytes")


# --- the driver ---


@cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DriverError(
            f"cuda-bindings cannot be imported ({error}): pip install 'cuda-bindings>=12.8,<14'"
        ) from error
    return driver


def _checked(what: str, status: Any) -> None:
    if int(status) != 0:
        raise DriverError(f"{what} failed: {status.name}", code=int(status), name=status.name)


def encode(layout: TensorMapLayout, address: int, slot: int) -> None:
    """Writes the driver's tensor map; the calling thread has a CUDA context.

    Args:
        layout: what the tensor looks like.
        address: where it starts on the device.
        slot: address of 128 bytes, aligned to 64, that receive the map.

    Raises:
        InputError: the address or the slot is misaligned.
        DriverError: there is no driver, or it refuses.
    """
    check_address(address)
    _check_slot(slot)
    api = _driver()
    kind = api.CUtensorMapDataType
    types = {
        DType.FP16: kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        DType.BF16: kind.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        DType.E4M3: kind.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    }
    try:
        status, encoded = api.cuTensorMapEncodeTiled(
            types[layout.dtype],
            len(layout.dims),
            address,
            [api.cuuint64_t(x) for x in layout.dims],
            [api.cuuint64_t(x) for x in layout.byte_strides],
            [api.cuuint32_t(x) for x in layout.box],
            [api.cuuint32_t(1)] * len(layout.dims),
            api.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            api.CUtensorMapSwizzle(int(layout.swizzle)),
            api.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            api.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,  # zeros
        )
    except RuntimeError as error:  # the bindings find no libcuda
        raise DriverError(f"no CUDA driver on this machine ({error})") from error
    _checked("cuTensorMapEncodeTiled", status)
    words = (ctypes.c_uint64 * 16).from_address(slot)
    words[:] = [int(word) for word in encoded.opaque]


@cache
def _replace_function() -> Any:
    """cuTensorMapReplaceAddress itself: a plain call on the slot, where the bindings want an object
    of their own and two copies."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuTensorMapReplaceAddress
    except (OSError, AttributeError) as error:
        raise DriverError(f"no CUDA driver for Hopper on this machine ({error})") from error
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function


def replace_address(slot: int, address: int) -> None:
    """Points an encoded map at another tensor of the same layout.

    Raises:
        InputError: the address is not a multiple of 16.
        DriverError: the driver refuses.
    """
    if address & 15:
        check_address(address)
    status = _replace_function()(slot, address)
    if status != 0:
        raise DriverError(f"cuTensorMapReplaceAddress failed: CUresult {status}", code=status)


_PROBES = (0x2AAA_AAAA_AAA0, 0x5555_5555_5550)  # between them every bit of an address, set and clear


def address_word(slot: int, replace: Callable[[int, int], None]) -> ctypes.c_uint64 | None:
    """The word of an encoded map that is the address and nothing else, found by asking: ``replace`` points the map at
    two addresses, and exactly one word must follow them. Storing to it costs a tenth of a call into the driver.

    Args:
        slot: address of a map.
        replace: ``replace_address`` or ``replace_address_emulated``.

    Returns:
        the word, in place; None when this driver keeps the address in another form.
    """
    words = (ctypes.c_uint64 * 16).from_address(slot)
    before = list(words)
    seen = []
    try:
        for address in _PROBES:
            replace(slot, address)
            seen.append(tuple(words))
    except DriverError:
        return None
    finally:
        words[:] = before
    places = [i for i, values in enumerate(zip(*seen, strict=True)) if values == _PROBES]
    others = [i for i, values in enumerate(zip(before, *seen, strict=True)) if len(set(values)) > 1 and i not in places]
    return None if len(places) != 1 or others else ctypes.c_uint64.from_address(slot + 8 * places[0])


# --- the emulator ---


class _EmulatedMap(ctypes.Structure):
    """Mirror of EmulatedMap in kernel_src/emulator/tma.cpp."""

    _fields_ = [
        ("magic", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("byte_strides", ctypes.c_uint64 * 4),
        ("dims", ctypes.c_uint32 * 5),
        ("box", ctypes.c_uint16 * 5),
        ("element_bytes", ctypes.c_uint8),
        ("rank", ctypes.c_uint8),
        ("swizzle", ctypes.c_uint8),
        ("unused", ctypes.c_uint8 * 47),
    ]


def encode_emulated(layout: TensorMapLayout, address: int, slot: int) -> None:
    """Writes a tensor map that only the emulator reads; arguments and errors as for ``encode``."""
    check_address(address)
    _check_slot(slot)
    rank = len(layout.dims)
    target = _EmulatedMap.from_address(slot)
    ctypes.memset(slot, 0, MAP_BYTES)
    target.magic, target.address = _MAGIC, address
    target.element_bytes, target.rank, target.swizzle = layout.dtype.itemsize, rank, layout.swizzle
    target.dims[:rank], target.box[:rank] = layout.dims, layout.box
    target.byte_strides[: rank - 1] = layout.byte_strides


def replace_address_emulated(slot: int, address: int) -> None:
    """Points an emulated map at another tensor of its layout; errors as ``replace_address``."""
    check_address(address)
    _EmulatedMap.from_address(slot).address = address

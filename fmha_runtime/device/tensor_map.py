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
def _library() -> Any:
    """The driver itself, where the bindings want objects of their own and copies: a map is 128 bytes in a parameter
    block, and a call with a new length writes three."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        encode, replace = library.cuTensorMapEncodeTiled, library.cuTensorMapReplaceAddress
    except (OSError, AttributeError) as error:
        raise DriverError(f"no CUDA driver for Hopper on this machine ({error})") from error
    pointer, number = ctypes.c_void_p, ctypes.c_int
    encode.argtypes = [pointer, number, ctypes.c_uint32, *[pointer] * 5, *[number] * 4]
    replace.argtypes = [pointer, pointer]
    return library


# Numbers of cuda.h (CUtensorMapDataType, CUtensorMapInterleave, CUtensorMapL2promotion, CUtensorMapFloatOOBfill).
_TYPES = {DType.E4M3: 0, DType.FP16: 6, DType.BF16: 9}
_NO_INTERLEAVE, _L2_256B, _ZEROS = 0, 3, 0
_ONES = (ctypes.c_uint32 * _MAX_RANK)(*[1] * _MAX_RANK)  # element strides


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
    rank = len(layout.dims)
    dims, strides = (ctypes.c_uint64 * rank)(*layout.dims), (ctypes.c_uint64 * rank)(*layout.byte_strides)
    box = (ctypes.c_uint32 * rank)(*layout.box)
    status = _library().cuTensorMapEncodeTiled(
        slot, _TYPES[layout.dtype], rank, address, dims, strides, box, _ONES, _NO_INTERLEAVE, int(layout.swizzle),
        _L2_256B, _ZEROS,
    )  # fmt: skip
    if status:
        raise DriverError(f"cuTensorMapEncodeTiled failed: CUresult {status}", code=status)


class Encoder:
    """Writes the maps of one operand of a kernel. Element type, box and swizzle are given once, so that a tensor of
    another length costs one call of the driver."""

    __slots__ = ("_box", "_columns", "_dtype", "_encode", "_itemsize", "_rows", "_swizzle", "_type")

    def __init__(self, dtype: DType, box_rows: int, box_columns: int, swizzle: Swizzle, emulated: bool) -> None:
        self._dtype, self._rows, self._columns, self._swizzle = dtype, box_rows, box_columns, swizzle
        self._type, self._itemsize = _TYPES[dtype], dtype.itemsize
        self._box = (ctypes.c_uint32 * 4)(box_columns, box_rows, 1, 1)
        self._encode = None if emulated else _library().cuTensorMapEncodeTiled

    def sizes(self, tensor: Any) -> Any:
        """Dimensions and strides of a tensor, [batch, rows, heads, head dim] or [tokens, heads, head dim], as the
        driver reads them: tensors of equal shape and strides share them."""
        size = self._itemsize
        if tensor.ndim == 4:
            batch, rows, heads, dim = tensor.shape
            outer, step, next_head, _ = tensor.stride()
        else:
            (rows, heads, dim), batch = tensor.shape, 1
            step, next_head, _ = tensor.stride()
            outer = 0
        return _SIZES(
            dim, rows, heads, batch, step * size if rows > 1 else 0, next_head * size if heads > 1 else 0,
            outer * size if batch > 1 else 0,
        )  # fmt: skip

    def write(self, slot: int, tensor: Any, sizes: Any) -> None:
        """The map of a tensor with these ``sizes``, at a slot aligned to 64.

        Raises:
            InputError: the copy engine cannot read the tensor.
            DriverError: the driver refuses; the calling thread may have no context.
        """
        if self._encode is None:
            encode_emulated(self.layout(tensor), tensor.data_ptr(), slot)
            return
        at = ctypes.addressof(sizes)
        status = self._encode(
            slot, self._type, 4, tensor.data_ptr(), at, at + 32, self._box, _ONES, _NO_INTERLEAVE, self._swizzle,
            _L2_256B, _ZEROS,
        )  # fmt: skip
        if status:
            check_address(tensor.data_ptr())
            self.layout(tensor)
            raise DriverError(f"cuTensorMapEncodeTiled failed: CUresult {status}", code=status)

    def layout(self, tensor: Any) -> TensorMapLayout:
        """What ``write`` encodes, checked. Raises InputError: the copy engine cannot read the tensor."""
        return layout(tensor.shape, tensor.stride(), self._dtype, self._rows, self._columns, self._swizzle)


_SIZES = ctypes.c_uint64 * 7  # four dimensions, and three strides behind them


def replace_address(slot: int, address: int) -> None:
    """Points an encoded map at another tensor of the same layout.

    Raises:
        InputError: the address is not a multiple of 16.
        DriverError: the driver refuses.
    """
    if address & 15:
        check_address(address)
    status = _library().cuTensorMapReplaceAddress(slot, address)
    if status != 0:
        raise DriverError(f"cuTensorMapReplaceAddress failed: CUresult {status}", code=status)


_PROBES = (0x2AAA_AAAA_AAA0, 0x5555_5555_5550)  # between them every bit of an address, set and clear


def address_place(slot: int, replace: Callable[[int, int], None]) -> int | None:
    """Which word of an encoded map is the address and nothing else, found by asking: ``replace`` points the map at two
    addresses, and exactly one word must follow them. Storing to it costs a tenth of a call into the driver.

    Args:
        slot: address of a map.
        replace: ``replace_address`` or ``replace_address_emulated``.

    Returns:
        the word's index; None when this driver keeps the address in another form.
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
    return None if len(places) != 1 or others else places[0]


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

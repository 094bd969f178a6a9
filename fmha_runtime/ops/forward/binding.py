# SPDX-License-Identifier: Apache-2.0
"""A loaded kernel with the options of a call: all of a plan that depends neither on lengths nor on strides.

A call with lengths that were not seen before takes the binding of those before it, and touches no file.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Protocol

from ... import config
from ...device import driver, emulator, tensor_map
from ...device.loader import Kernel
from ...device.tensor_map import Swizzle
from ...kernels import catalog
from ...kernels.forward.params import FwdSm90Params
from ...kernels.spec import KernelSpec
from ...kernels.tile import Tile
from ...problem import tensors
from ...problem.arguments import Options, Shape
from .. import launcher

if TYPE_CHECKING:
    import torch

LOG2_E = math.log2(math.e)
_UNKNOWN = -1
_alive: weakref.WeakSet[Binding] = weakref.WeakSet()


def _unlock_in_child() -> None:
    """A thread that a forked child does not have may have held a lock."""
    for binding in _alive:
        binding.lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock_in_child)


class Work(Protocol):
    """The grid and the workspace of an op whose CTAs do not have a query tile each."""

    def __init__(self, binding: Binding, /) -> None: ...
    def share(self, block: Any, shape: Shape, /) -> int: ...
    def place(self, block: Any, stream: int, /) -> tuple[torch.Tensor, ...]: ...
    def place_emulated(self, block: Any, /) -> tuple[torch.Tensor, torch.Tensor]: ...


class Binding:
    """Kernel, tile and options, and what of the parameter block and the launch follows from them.

    Args:
        kernel: loaded, of ``spec`` and ``tile``.
        opts: of the call.
        page_size: tokens of a page of K and V; None: they are contiguous.
        work: what shares out the work of the kernel's op, where it is more than a tile a CTA (works.py).
    """

    __slots__ = (
        "__weakref__", "block_size", "block_type", "bytes_l2", "chunk", "debug", "device", "empty", "emulated",
        "encoders", "kernel", "lock", "options", "page_bits", "place", "replace", "scales", "slots", "smem", "spec",
        "tile", "work",
    )  # fmt: skip

    def __init__(
        self,
        kernel: Kernel,
        spec: KernelSpec,
        tile: Tile,
        opts: Options,
        page_size: int | None,
        work: type[Work] | None = None,
    ) -> None:
        self.kernel, self.spec, self.tile, self.options = kernel, spec, tile, opts
        self.lock = threading.Lock()
        """Held while a parameter block is filled and launched."""
        self.smem = catalog.smem_bytes(spec, tile)
        self.debug = config.debug()
        self.emulated = isinstance(kernel, emulator.Kernel)
        if self.emulated:
            self.device, self.empty = -1, launcher.empty
            self.slots, self.bytes_l2 = launcher.SMS * tile.ctas_per_sm, launcher.L2_BYTES
        else:
            self.device, self.empty = kernel.device, tensors.allocator()
            self.slots = driver.sm_count(self.device) * tile.ctas_per_sm
            self.bytes_l2 = driver.l2_bytes(self.device)
        scale = opts.scale if opts.scale is not None else spec.head_dim**-0.5
        tanh_scale = scale / opts.softcap if opts.softcap else 0.0
        self.scales = (scale, (opts.softcap or scale) * LOG2_E, tanh_scale)
        self.chunk = chunk_reciprocal(opts.attention_chunk)
        self.page_bits = 0 if page_size is None else page_size.bit_length() - 1
        self.block_type: type[Any] = catalog.block(spec)
        self.block_size = ctypes.sizeof(self.block_type)
        self.encoders: tuple[tensor_map.Encoder, ...] = ()
        self.replace = tensor_map.replace_address_emulated if self.emulated else tensor_map.replace_address
        self.place: int | None = _UNKNOWN
        if self.block_type is FwdSm90Params:
            self._encoders(page_size)
        self.work = None if work is None else work(self)
        _alive.add(self)

    def _encoders(self, page_size: int | None) -> None:
        columns = 32 if self.spec.head_dim <= 32 else 64  # FwdSm90Traits::kGroupColumns
        swizzle = Swizzle.B64 if columns == 32 else Swizzle.B128
        keys = self.tile.block_n
        if page_size is not None:  # what no page boundary cuts: piece_bits of wgmma_paged.cuh
            keys = min(page_size, keys & -keys)
        one = tensor_map.Encoder(self.spec.dtype, 64, columns, swizzle, self.emulated)  # Q: a consumer's rows
        other = tensor_map.Encoder(self.spec.dtype, keys, columns, swizzle, self.emulated)
        self.encoders = (one, other)

    def allocate(self) -> Any:
        """A zeroed parameter block at an address that is a multiple of 64."""
        room = ctypes.create_string_buffer(self.block_size + 63)
        return self.block_type.from_buffer(room, -ctypes.addressof(room) % 64)

    def write_maps(self, slots: tuple[int, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Tensor maps of q, k and v at these addresses.

        Raises:
            InputError: the copy engine cannot read such a tensor.
            DriverError: the driver refuses; the calling thread may have no context.
        """
        of_q, of_kv = self.encoders
        of_q.write(slots[0], q, of_q.sizes(q))
        sizes = of_kv.sizes(k)
        of_kv.write(slots[1], k, sizes)
        alike = v.shape == k.shape and v.stride() == k.stride()
        of_kv.write(slots[2], v, sizes if alike else of_kv.sizes(v))

    def address_words(self, slots: tuple[int, ...], addresses: tuple[int, ...]) -> tuple[ctypes.c_uint64, ...]:
        """The word of each written map that is its address, so that a launch need only store it; () where this driver
        hides it."""
        if self.place == _UNKNOWN:
            self.place = tensor_map.address_place(slots[0], self.replace)
        if self.place is None:
            return ()
        words = tuple([ctypes.c_uint64.from_address(slot + 8 * self.place) for slot in slots])
        return words if tuple([word.value for word in words]) == addresses else ()


def chunk_reciprocal(chunk: int) -> tuple[int, int]:
    """(multiplier, shift) with ``((2 * p + 1) * multiplier >> 32) >> shift == p // chunk`` for positions p up to 2^29.

    Division by an invariant number (Granlund and Montgomery, 1994); the factor 2 leaves room for rounding, so that the
    multiplier fits an int32 for every chunk.
    """
    if chunk == 0:
        return 0, 0
    shift = max(0, (2 * chunk - 1).bit_length() - 2)
    return min((1 << 31) - 1, -(-(1 << (32 + shift)) // (2 * chunk))), shift

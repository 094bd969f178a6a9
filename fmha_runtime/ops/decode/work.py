# SPDX-License-Identifier: Apache-2.0
"""What a launch of a decode kernel needs besides its tensors: a grid, room for results that are not complete, counters.

All of it follows from bounds that the host knows. How the keys are shared out is decided on the device, from the
lengths (worklist.cuh), so that a captured graph follows them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...device import counters
from ...errors import InputError
from ...kernels.decode.params import DecodeParams
from ...problem.arguments import Shape

if TYPE_CHECKING:
    import torch

    from ..forward.binding import Binding

LEAST_KEYS = 256
"""Keys that a CTA takes at least: below, sharing costs more than it saves (H100, 2026-11-27)."""
EMULATED_CTAS = 24
"""On the emulator; enough for results to meet in groups (merge.cuh)."""


def page_reciprocal(size: int) -> tuple[int, int]:
    """(multiplier, shift) with ``((2 * t + 1) * multiplier >> 32) >> shift == t // size`` for tokens t up to 2^29: see
    ``binding.chunk_reciprocal``."""
    if size == 0:
        return 0, 0
    shift = max(0, (2 * size - 1).bit_length() - 2)
    return min((1 << 31) - 1, -(-(1 << (32 + shift)) // (2 * size))), shift


class DecodeWork:
    """The grid and the workspace of decode launches of one binding."""

    __slots__ = ("ctas", "device", "empty", "least", "rows", "slot_floats", "step_keys")

    def __init__(self, binding: Binding) -> None:
        tile, spec = binding.tile, binding.spec
        self.rows, self.step_keys = tile.block_m, tile.block_n
        self.slot_floats = tile.block_m * (spec.head_dim_v + 2)
        self.device, self.empty = binding.device, binding.empty
        self.ctas = EMULATED_CTAS if binding.emulated else binding.slots
        self.least = 1 if binding.emulated else -(-LEAST_KEYS // tile.block_n)

    def share(self, block: DecodeParams, shape: Shape) -> int:
        """The grid for calls of these sizes; writes what the kernel is told of it.

        Raises:
            InputError: more steps than the kernel can count.
        """
        group = shape.heads // shape.heads_k
        units = shape.batch * shape.heads_k * -(-shape.seqlen_q * group // self.rows)
        steps = units * max(1, -(-shape.seqlen_k // self.step_keys))
        if steps >= 1 << 30:
            raise InputError(f"{steps} steps of {self.step_keys} keys exceed the limit of 2^30 - 1: split the batch")
        page = shape.page_size or 0
        block.ctas = min(self.ctas, max(units, -(-steps // self.least)))
        block.least_tiles = self.least
        block.page_size, (block.page_multiplier, block.page_shift) = page, page_reciprocal(page)
        return int(block.ctas)

    def place(self, block: DecodeParams, stream: int) -> tuple[torch.Tensor, ...]:
        """Gives the next launch its workspace; the tensors must live until it is enqueued."""
        import torch

        ctas = block.ctas
        room = self.empty((2 * ctas * self.slot_floats,), (1,), torch.float32)
        tensors: tuple[torch.Tensor, ...] = (room,)
        block.partials = room.data_ptr()
        found = counters.words(self.device, stream, 4 * ctas)
        if found is None:
            zeros = torch.zeros(4 * ctas, dtype=torch.int32, device=room.device)
            tensors, found = (room, zeros), zeros.data_ptr()
        block.counters = found
        if stream != torch._C._cuda_getCurrentRawStream(self.device):
            other = torch.cuda.ExternalStream(stream, device=self.device)
            for tensor in tensors:
                tensor.record_stream(other)
        return tensors

    def place_emulated(self, block: DecodeParams) -> tuple[torch.Tensor, torch.Tensor]:
        """The workspace of an emulated launch: room, and counters that must be zero again behind it."""
        import torch

        room = self.empty((2 * block.ctas * self.slot_floats,), (1,), torch.float32)
        count = torch.zeros(4 * block.ctas, dtype=torch.int32)
        block.partials, block.counters = room.data_ptr(), count.data_ptr()
        return room, count

# SPDX-License-Identifier: Apache-2.0
"""Packs masks where they lie: on a GPU with the table's own kernel, which reads each byte once, on the CPU with numpy.

packed_mask.py has the layout. The kernel reads bytes: bool and 8-bit masks as they are, with any strides; other dtypes
are compared with 0 by torch first.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from ...device import driver, loader
from ...errors import InputError, UnsupportedProblem
from ...kernels import catalog
from ...kernels.pack import family as pack_family
from ...kernels.pack import params
from ...kernels.spec import Arch, DType, KernelSpec, Op
from ...kernels.tile import Tile
from ...problem import arrays, dispatch, packed_mask
from ...problem.dispatch import Problem
from ...problem.packed_mask import BLOCK, PackedMask
from .. import launcher, obtain

if TYPE_CHECKING:
    import torch


def pack_mask(mask: Any, *, cu_seqlens_q: torch.Tensor | None = None) -> PackedMask:
    """Packs a mask on the device where it lies, on its current stream. Nothing waits for the device.

    Args:
        mask: True (or a nonzero integer) = attend; of floats, which SDPA adds to the scores, 0 = attend and -inf = hide
            (their values are read, which waits for the device). A torch tensor or other array.
            [Sq, Sk], [B or 1, H or 1, Sq, Sk]; with cu_seqlens_q [Tq, columns] or [H or 1, Tq, columns], where column
            j of a token's row is key j of its own sequence. Any strides.
        cu_seqlens_q: int32 [B + 1] for varlen queries.

    Raises:
        InputError: a shape that is none of these, or floats that are neither 0 nor -inf.
        UnsupportedProblem: there is no packer for this GPU.
        KernelNotBuilt, ArtifactError, DriverError: the packer is not built, damaged, or cannot be loaded (during a
            graph capture: call ``prepare`` or pack once before it).
    """
    import torch

    mask, cu_seqlens_q = arrays.view("mask", mask), arrays.view("cu_seqlens_q", cu_seqlens_q)
    if not (isinstance(mask, torch.Tensor) and mask.is_cuda):
        return packed_mask.pack(mask, cu_seqlens_q=cu_seqlens_q)
    packed_mask.planes(mask, cu_seqlens_q is not None)  # a wrong shape is said before a kernel is missed
    index = mask.device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    return run(_loaded(index, stream), mask, cu_seqlens_q)


def packed(mask: Any, cu_seqlens_q: Any, stream: int | None = None) -> PackedMask | None:
    """The mask of a call as kernels read it; anything but a PackedMask is packed now, on the stream of the call."""
    if mask is None or isinstance(mask, PackedMask):
        return mask
    if stream is not None and arrays.foreign(mask):
        with arrays.on_stream([mask], stream):
            return pack_mask(mask, cu_seqlens_q=cu_seqlens_q)
    if stream is None or not getattr(mask, "is_cuda", False):
        return pack_mask(mask, cu_seqlens_q=cu_seqlens_q)
    import torch

    with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=mask.device)):
        return pack_mask(mask, cu_seqlens_q=cu_seqlens_q)


def prepare(index: int) -> None:
    """Loads the packer of a GPU ahead of its first use, for example before a graph capture.

    Raises:
        UnsupportedProblem, KernelNotBuilt, ArtifactError, DriverError: as ``pack_mask``.
    """
    _loaded(index, 0)


@cache
def spec_for(index: int) -> KernelSpec:
    """The packer of a GPU.

    Raises:
        UnsupportedProblem: there is none.
    """
    major, minor = driver.capability(index)
    arch = Arch.for_capability(major, minor)
    if arch is None:
        raise UnsupportedProblem(
            f"there is no kernel that packs masks on compute capability {major}.{minor}; "
            "pack_mask(mask.cpu()) packs on the CPU"
        )
    return dispatch.choose(Problem(arch, DType.U8, 0, 0, Op.PACK)).spec


_kernels: dict[int, Any] = {}  # by device


def _loaded(index: int, stream: int) -> Any:
    kernel = _kernels.get(index)
    if kernel is None:
        kernel = _kernels[index] = obtain.kernel(spec_for(index), device=f"cuda:{index}", stream=stream)
    return kernel


def run(
    kernel: loader.Kernel,
    mask: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    tile: Tile | None = None,
) -> PackedMask:
    """Packs with exactly this kernel, on the current stream of the mask's device, or on the emulator.

    Args:
        out: contiguous int32 tensors to write, ``words`` and ``any`` of the result; default new ones.
        tile: that the kernel was built with; default the catalogue's.

    Raises:
        InputError: a shape that ``pack_mask`` does not take, or too large a mask.
    """
    import torch

    mask = _as_bytes(packed_mask.planes(mask, cu_seqlens_q is not None))
    batch, heads, rows, cols = mask.shape
    row_blocks, col_blocks, sequences = -(-rows // BLOCK), -(-cols // BLOCK), None
    if cu_seqlens_q is not None:
        cu_seqlens_q = cu_seqlens_q.to(mask.device, torch.int32).contiguous()
        sequences = len(cu_seqlens_q) - 1
        row_blocks = packed_mask.varlen_row_blocks(rows, sequences)
    shapes = packed_mask.shapes(batch, heads, row_blocks, col_blocks)
    words, seen = out or (torch.empty(shape, dtype=torch.int32, device=mask.device) for shape in shapes)
    grid = batch * heads * row_blocks * shapes[1][-1]
    if grid >= 1 << 31:
        raise InputError(f"a mask of shape {tuple(mask.shape)} is too large to be packed at once: split it")
    if grid:
        p = params.PackMaskParams(
            mask.data_ptr(), words.data_ptr(), seen.data_ptr(),
            None if cu_seqlens_q is None else cu_seqlens_q.data_ptr(),
            *mask.stride(), heads, rows, cols, sequences or 0, row_blocks, col_blocks,
        )  # fmt: skip
        spec = pack_family.spec(Arch.SM80)
        cut = tile or catalog.tile(spec)
        smem = catalog.smem_bytes(spec, cut)
        launcher.once(kernel, grid, cut.threads, smem, p, (mask, cu_seqlens_q), (words, seen))
    return PackedMask(words, seen, rows, cols, sequences)


def _as_bytes(mask: torch.Tensor) -> torch.Tensor:
    import torch

    if mask.element_size() != 1 or mask.dtype.is_floating_point:
        mask = packed_mask.attended(mask)
    return mask.view(torch.uint8)

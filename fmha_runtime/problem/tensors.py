# SPDX-License-Identifier: Apache-2.0
"""What a kernel needs to know of a tensor, and the rules a tensor must meet.

Layouts: q [B, Sq, H, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv]; varlen without the batch. Any strides with a contiguous
head dim whose rows start on 16-byte boundaries (cp.async and TMA move 16 bytes at a time).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..kernels.spec import DType

if TYPE_CHECKING:
    import torch

ALIGNMENT = 16
"""Bytes: base addresses and all strides but the innermost must be multiples of this."""

MAX_SEQLEN = 1 << 29
"""Longest sequence whose positions and window bounds stay inside the kernel's int32."""


def geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What a plan depends on: shape, strides, dtype, device."""
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def no_guard(*_: torch.Tensor) -> bool:
    """The guard that knows nothing."""
    return False


def guard(*given: torch.Tensor) -> Callable[..., bool]:
    """A quick look whether tensors have the geometry of these: dynamo's own test, in C++, in a third of the time that
    twelve attributes take.

    Returns:
        a function of as many arguments. True: their ``geometry`` is that of ``given``, and none of them requires a
        gradient. False: not known (other tensors, but also other kinds of tensor or another mode of torch: inference
        tensors beside plain ones, one tensor given twice, parameters). It holds none of the tensors.
        ``no_guard`` where there is none: a torch without it, tensors that require gradients, subclasses.
    """
    import torch

    maker = getattr(torch._C._dynamo.guards, "TensorGuards", None)  # private: it may go
    if maker is None or any(type(t) is not torch.Tensor or t.requires_grad for t in given):
        return no_guard
    sizes, strides = [list(t.shape) for t in given], [list(t.stride()) for t in given]
    try:  # never without the two lists: it then reads through a null pointer
        check: Callable[..., bool] = maker(*given, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return check if check(*given) is True else no_guard
    except Exception:  # a torch in which it means something else
        return no_guard


def allocator() -> Callable[..., torch.Tensor]:
    """(shape, strides, dtype) -> an uninitialised tensor on the current GPU: torch's own short cut below the
    dispatcher, which compiled code calls, in half the time of torch.empty."""
    import torch

    found: Callable[..., torch.Tensor] | None = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
    return found or _empty_strided


def _empty_strided(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    import torch

    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


def dtype_of(name: str, tensor: torch.Tensor) -> DType:
    """The table's element type of a tensor.

    Raises:
        InputError: no kernel reads this dtype.
    """
    import torch

    table = {torch.float16: DType.FP16, torch.bfloat16: DType.BF16}
    found = table.get(tensor.dtype)
    if found is None:
        raise InputError(
            f"{name} has dtype {tensor.dtype}; supported are torch.float16 and torch.bfloat16: "
            f"convert with {name}.to(torch.bfloat16)"
        )
    return found


def check_tensor(name: str, tensor: Any, rank: int, rows: str, columns: str) -> None:
    """One of q, k, v, out: rank, contiguous head dim, aligned rows. ``rows, columns`` is its layout, for the message.

    Raises:
        InputError: names the rule and the offender.
    """
    import torch

    if _plainly_fits(tensor, rank):
        return
    layout = f"{rows}, {columns}"
    if not isinstance(tensor, torch.Tensor):
        raise InputError(
            f"{name} is a {type(tensor).__name__}; a torch.Tensor of shape {layout} is needed "
            "(torch.from_dlpack makes one from any DLPack array without a copy)"
        )
    if tensor.ndim != rank:
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)}; {layout} is needed"
            + (" (unpacked [tokens, heads, dim] goes to attention_varlen)" if rank == 4 else "")
        )
    dtype_of(name, tensor)
    shape, stride = tensor.shape, tensor.stride()
    if shape[-1] > 1 and stride[-1] != 1:
        raise InputError(
            f"the head dim of {name} must be contiguous, but its stride is {stride[-1]} elements "
            f"(shape {tuple(shape)}, strides {tuple(stride)}): call {name}.contiguous()"
        )
    size = tensor.element_size()
    # Rows of other head dims cannot be aligned, and no kernel is to read them: dispatch says which head dims there are.
    aligned = shape[-1] * size % ALIGNMENT == 0
    for axis in range(rank - 1):
        if aligned and shape[axis] > 1 and stride[axis] * size % ALIGNMENT:
            raise InputError(
                f"stride {stride[axis]} of {name} (axis {axis}) is {stride[axis] * size} bytes; strides must be "
                f"multiples of {ALIGNMENT} bytes, {ALIGNMENT // size} elements: "
                f"call {name}.contiguous() or pad the rows"
            )
    check_address(name, tensor)


def _plainly_fits(tensor: Any, rank: int) -> bool:
    """Whether a tensor meets all rules at a glance: most do, and new lengths come with every token. False: look
    closer."""
    import torch

    if type(tensor) is not torch.Tensor or tensor.ndim != rank:
        return False
    dtype, stride = tensor.dtype, tensor.stride()
    return (
        (dtype is torch.bfloat16 or dtype is torch.float16)
        and stride[-1] == 1
        and not (stride[0] | stride[1] | stride[-2]) & (ALIGNMENT // 2 - 1)
        and not tensor.data_ptr() & (ALIGNMENT - 1)
    )


def check_address(name: str, tensor: torch.Tensor) -> None:
    """The base address of a tensor is 16-byte aligned.

    Raises:
        InputError: it is not (a slice that starts inside a 16-byte chunk).
    """
    address = tensor.data_ptr()
    if address % ALIGNMENT:
        raise InputError(
            f"{name} starts at address {address:#x}, which is not a multiple of {ALIGNMENT} bytes "
            f"(storage offset {tensor.storage_offset()} elements): call {name}.clone()"
        )


def check_index(name: str, tensor: Any, length: int, device: torch.device) -> None:
    """An int32 vector that the kernel reads on the device: cu_seqlens, seqused.

    Raises:
        InputError: wrong type, dtype, shape, stride or device.
    """
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise InputError(
            f"{name} is a {type(tensor).__name__}; an int32 tensor of shape [{length}] on {device} is needed"
        )
    if tensor.dtype is not torch.int32:
        raise InputError(f"{name} has dtype {tensor.dtype}; torch.int32 is needed: {name}.to(torch.int32)")
    if tensor.ndim != 1 or tensor.shape[0] != length:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}; [{length}] is needed for this batch")
    if length > 1 and tensor.stride(0) != 1:
        raise InputError(f"{name} must be contiguous: call {name}.contiguous()")
    if tensor.device != device:
        raise InputError(f"{name} is on {tensor.device}, q is on {device}: move it with .to({str(device)!r})")


def extent_bytes(tensor: torch.Tensor) -> int:
    """Bytes from the first to just past the last element that a tensor addresses."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()

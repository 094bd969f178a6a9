# SPDX-License-Identifier: Apache-2.0
"""Fills caches: one kernel copies new keys and values to their places, whatever their dtype and strides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...device import driver, loader
from ...errors import InputError, UnsupportedProblem
from ...kernels import catalog
from ...kernels.append import family
from ...kernels.append.params import AppendParams, ByteStrides
from ...kernels.spec import Arch
from ...problem import kinds
from .. import launcher, obtain
from . import reference

if TYPE_CHECKING:
    import torch

CHUNK = 16
"""Bytes that a thread copies at a time."""
MOST_SLOTS = (1 << 31) - 1


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    slot_mapping: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    device: str | None = None,
) -> None:
    """Copies new keys and values into a cache, in place, on the current stream. Nothing waits for the device.

    Say where they go either by ``slot_mapping`` or by ``cache_seqlens``, the keys that each sequence has already.

    Args:
        k: [T, Hk, D], or [B, S, Hk, D]. Any dtype and strides; what is not made of chunks of 16 bytes is copied by
            torch.
        v: [T, Hk, Dv] or [B, S, Hk, Dv].
        k_cache: a pool [pages, page_size, Hk, D], or [B, room, Hk, D].
        v_cache: [pages, page_size, Hk, Dv] or [B, room, Hk, Dv].
        slot_mapping: int64, one a token: page * page_size + row. A negative slot, or one past the pool, is nowhere:
            that token is not copied.
        cache_seqlens: int32 [B]: token i of sequence b goes to key cache_seqlens[b] + i. Tokens without room are not
            copied.
        page_table: int32 [B, pages of a sequence], with cache_seqlens; None: sequence b has k_cache[b].
        cu_seqlens: int32 [B + 1], with cache_seqlens and k as [T, Hk, D].
        device: None, where the tensors are: a GPU's kernel, or plain torch on the CPU. "emulator" runs the kernel on
            the CPU.

    Raises:
        InputError: shapes, dtypes or devices that do not fit each other; neither or both ways to say where.
        UnsupportedProblem: a cache that requires a gradient; no kernel for this GPU.
        KernelNotBuilt, ArtifactError, DriverError: the kernel is not built, damaged, or cannot be loaded (during a
            graph capture: call once before it).
    """
    pages, page_size = _check(k, v, k_cache, v_cache)
    flat = k.shape[:-2]
    _check_places(flat, slot_mapping, cache_seqlens, page_table, cu_seqlens, k_cache)
    where = loader.emulated_arch(device)
    if where is None and device is not None:
        raise InputError(f"device is {device!r}; None (where the tensors are), 'emulator' or 'emulator:ARCH' is needed")
    if where is not None and k.device.type != "cpu":
        raise InputError(f"the emulator runs CPU tensors; k is on {k.device}: call k.cpu()")
    given = (k, v, k_cache, v_cache)
    in_torch = kinds.traced() or kinds.are_special(given) or (where is None and k.device.type == "cpu")
    if in_torch or not _in_chunks(*given):
        if slot_mapping is None:
            assert cache_seqlens is not None
            slot_mapping = reference.slots_of(tuple(flat), cache_seqlens, cu_seqlens, page_table, pages, page_size)
        reference.write((k_cache, v_cache), (k.flatten(0, -3), v.flatten(0, -3)), slot_mapping)
        return
    if where is not None:
        kernel: Any = obtain.kernel(family.spec(where), device="emulator")
    else:
        kernel = _loaded(k.device.index)
    run(kernel, k, v, k_cache, v_cache, slot_mapping, cache_seqlens, page_table, cu_seqlens)


def _check(k: Any, v: Any, k_cache: Any, v_cache: Any) -> tuple[int, int]:
    """The rules of the tensors; returns the cache's pages and the tokens of each."""
    import torch

    named = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    for name, x in named.items():
        if not isinstance(x, torch.Tensor):
            raise InputError(f"{name} is {type(x).__name__}; a torch.Tensor is needed")
        ranks = (4,) if name.endswith("cache") else (3, 4)
        if x.ndim not in ranks:
            raise InputError(f"{name} has shape {tuple(x.shape)}; {' or '.join(map(str, ranks))} axes are needed")
        if x.dtype is not k.dtype or x.device != k.device:
            raise InputError(f"{name} is {x.dtype} on {x.device}, k is {k.dtype} on {k.device}: they must be equal")
    if k.shape[:-1] != v.shape[:-1] or k_cache.shape[:-1] != v_cache.shape[:-1]:
        raise InputError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}, k_cache {tuple(k_cache.shape)} and v_cache "
            f"{tuple(v_cache.shape)}: all but the last dim must be equal"
        )
    for new, cache in ((k, k_cache), (v, v_cache)):
        if new.shape[-2:] != cache.shape[-2:]:
            raise InputError(
                f"new tokens have {tuple(new.shape[-2:])} heads and head dim, the cache {tuple(cache.shape[-2:])}: "
                "they must be equal"
            )
    if torch.is_grad_enabled() and any(x.requires_grad for x in named.values()):
        raise UnsupportedProblem("append_kv has no backward: call it under torch.no_grad(), or detach the tensors")
    pages, page_size = k_cache.shape[:2]
    if pages * page_size > MOST_SLOTS:
        raise InputError(f"the cache has {pages * page_size} slots; at most {MOST_SLOTS} are supported")
    return pages, page_size


def _check_places(
    tokens: torch.Size, slots: Any, lengths: Any, table: Any, cu_seqlens: Any, k_cache: torch.Tensor
) -> None:
    import torch

    if (slots is None) == (lengths is None):
        raise InputError(
            "say where new tokens go by slot_mapping or by cache_seqlens: exactly one of the two is needed"
        )
    if slots is not None:
        if table is not None or cu_seqlens is not None:
            raise InputError("slot_mapping says where each token goes: leave out page_table and cu_seqlens")
        count = tokens.numel()
        _check_ints("slot_mapping", slots, torch.int64, (count,), k_cache.device)
        return
    if (cu_seqlens is None) != (len(tokens) == 2):
        raise InputError(
            f"k has {len(tokens)} axes before its heads and cu_seqlens is {'not ' * (cu_seqlens is None)}given: "
            "[B, S, Hk, D] goes without it, [T, Hk, D] with it"
        )
    batch = tokens[0] if cu_seqlens is None else len(lengths)
    _check_ints("cache_seqlens", lengths, torch.int32, (batch,), k_cache.device)
    if cu_seqlens is not None:
        _check_ints("cu_seqlens", cu_seqlens, torch.int32, (batch + 1,), k_cache.device)
    if table is None:
        if k_cache.shape[0] != batch:
            raise InputError(f"the cache has {k_cache.shape[0]} rows for {batch} sequences: give a page_table")
    else:
        columns = table.shape[1] if isinstance(table, torch.Tensor) and table.ndim == 2 else "pages of a sequence"
        _check_ints("page_table", table, torch.int32, (batch, columns), k_cache.device)


def _check_ints(name: str, given: Any, dtype: torch.dtype, shape: tuple[Any, ...], device: torch.device) -> None:
    import torch

    if not isinstance(given, torch.Tensor) or given.dtype is not dtype or tuple(given.shape) != shape:
        got = f"{given.dtype} {list(given.shape)}" if isinstance(given, torch.Tensor) else type(given).__name__
        raise InputError(f"{name} is {got}; {dtype} [{', '.join(map(str, shape))}] is needed")
    if given.device != device:
        raise InputError(f"{name} is on {given.device}, the cache on {device}: move it with .to({str(device)!r})")
    if given.shape[-1] > 1 and given.stride(-1) != 1:
        raise InputError(f"{name} must be contiguous: call {name}.contiguous()")


def _in_chunks(*given: torch.Tensor) -> bool:
    """Whether every head of these is contiguous, begins at a multiple of 16 bytes and ends at one."""
    for x in given:
        size = x.element_size()
        if x.data_ptr() % CHUNK or x.shape[-1] * size % CHUNK or (x.shape[-1] > 1 and x.stride(-1) != 1):
            return False
        if any(stride * size % CHUNK for stride, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1):
            return False
    return True


_kernels: dict[int, Any] = {}  # by device


def _loaded(index: int) -> Any:
    kernel = _kernels.get(index)
    if kernel is None:
        import torch

        capability = driver.capability(index)
        arch = Arch.for_capability(*capability)
        if arch is None:
            raise UnsupportedProblem(
                f"there is no kernel that fills caches on compute capability {capability[0]}.{capability[1]}: write "
                "k_cache[page, row] = k in torch"
            )
        stream = torch._C._cuda_getCurrentRawStream(index)
        kernel = _kernels[index] = obtain.kernel(family.spec(arch), device=f"cuda:{index}", stream=stream)
    return kernel


def run(
    kernel: loader.Kernel,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> None:
    """``append_kv`` of checked tensors, on exactly this kernel."""
    pages, page_size = k_cache.shape[:2]
    tokens = k.shape[:-2].numel()
    dense = k.ndim == 4
    if not (tokens and pages and page_size and k.shape[-2]):
        return

    def strides(x: torch.Tensor) -> ByteStrides:
        each = [stride * x.element_size() for stride in x.stride()[:-1]]
        return ByteStrides(*(each if x.ndim == 4 else (0, *each)))

    def address(x: torch.Tensor | None) -> int | None:
        return None if x is None else x.data_ptr()

    size = k.element_size()
    block = AppendParams(
        k.data_ptr(), v.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), address(slots), address(cu_seqlens),
        address(lengths), address(table), strides(k), strides(v), strides(k_cache), strides(v_cache),
        0 if table is None else table.stride(0), tokens, 0 if lengths is None else len(lengths),
        k.shape[1] if dense else 0, k.shape[-2], k.shape[-1] * size // CHUNK, v.shape[-1] * size // CHUNK, pages,
        page_size, page_size * (1 if table is None else table.shape[1]), 0,
    )  # fmt: skip
    tile = catalog.tile(family.spec(Arch.SM80))
    read = (k, v, slots, lengths, table, cu_seqlens)
    launcher.once(kernel, -(-tokens // tile.warps), tile.threads, 0, block, read, (k_cache, v_cache))

# SPDX-License-Identifier: Apache-2.0
"""From a chosen kernel and checked tensors to one launch: parameter block, grid, plan.

Decides nothing about which kernel. A ``Plan`` holds everything that depends on shapes, strides and options; a run only
patches addresses and launches.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from typing import TYPE_CHECKING, Any

from ... import config
from ...device import driver, emulator, tensor_map, tile_queue
from ...device.loader import Kernel
from ...errors import DriverError, InputError, UnsupportedProblem
from ...kernels import catalog
from ...kernels.forward import params
from ...kernels.forward.params import UNLIMITED, FwdSm90Params, FwdTmaParams
from ...kernels.spec import KernelSpec
from ...kernels.tile import Tile
from ...problem import arguments, tensors
from ...problem.arguments import NO_EXTRAS, Extras, Options, Shape
from ...problem.packed_mask import PackedMask, pack
from .. import launcher
from .sections import section_heads

if TYPE_CHECKING:
    import torch

LOG2_E = math.log2(math.e)
NO_BACKWARD = (
    "an input requires a gradient and there is no backward kernel yet: call under torch.no_grad() or "
    "torch.inference_mode(), or use torch's scaled_dot_product_attention for training"
)


GUARDS = 8
"""How many guards of its geometry a plan makes at most. A guard also tells inference mode and autocast from plain
calls, so a program that switches between these modes would otherwise pay for a new guard at every switch."""


class Plan:
    """A kernel bound to shapes, strides and options. ``run`` accepts any tensors with the same geometry.

    Runs of one plan from several threads are serialised for the microseconds that filling and launching take.
    """

    # Look-ups in an object with more than 30 attributes are slow without.
    __slots__ = (
        "__weakref__", "_argument", "_bare", "_block", "_current_device", "_current_stream",
        "_debug", "_device", "_empty", "_emulated", "_extras_key", "_guard", "_guards_left", "_lengths", "_lock",
        "_lse", "_map_words", "_maps", "_out", "_params", "_queued", "_smem", "_start", "_threads", "_torch",
        "geometry", "grid", "kernel", "options", "shape", "spec", "tile",
    )  # fmt: skip

    def __init__(
        self,
        kernel: Kernel,
        spec: KernelSpec,
        tile: Tile,
        shape: Shape,
        opts: Options,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor | None = None,
        extras: Extras = NO_EXTRAS,
        lengths: tuple[Any, Any, Any] = (None, None, None),  # cu_seqlens_q, cu_seqlens_k, seqused_k
    ) -> None:
        import torch

        self.spec, self.tile, self.kernel, self.shape, self.options = spec, tile, kernel, shape, opts
        self._extras_key = extras.key
        self._lengths = tuple(None if t is None else tensors.geometry(t) for t in lengths)
        self._bare = self._extras_key is None and self._lengths == (None, None, None)  # no optional tensors
        self._debug = config.debug()
        self.geometry = (*tensors.geometry(q), *tensors.geometry(k), *tensors.geometry(v))
        self._guard, self._guards_left = tensors.no_guard, GUARDS
        self._lock = threading.Lock()
        self._threads = tile.threads
        self._smem = catalog.smem_bytes(spec, tile)
        self._emulated = isinstance(kernel, emulator.Kernel)
        self._torch = torch
        if self._emulated:
            self._device, self._empty = -1, launcher.empty
            self._current_device, self._current_stream = (lambda: -1), (lambda device: 0)
        else:  # bound once: each look-up would cost every call
            self._device, self._empty = kernel.device, tensors.allocator()
            self._current_device = torch._C._cuda_getDevice
            self._current_stream = torch._C._cuda_getCurrentRawStream
        block = params.allocate(spec)
        p = self._params = block.tma.fwd if isinstance(block, FwdSm90Params) else block
        strides = tuple(out.stride()) if out is not None else _contiguous(shape.out)
        self._out = (shape.out, strides, q.dtype)
        self._lse = (shape.lse, _contiguous(shape.lse), torch.float32)
        for stride, own in (
            (p.q_stride, q.stride()),
            (p.k_stride, k.stride()),
            (p.v_stride, v.stride()),
            (p.o_stride, strides),
        ):
            stride.batch = own[0] if len(own) == 4 else 0
            stride.row, stride.head = own[-3], own[-2]
        lse = _contiguous(shape.lse)
        p.lse_batch_stride = 0 if shape.varlen else lse[0]
        p.lse_head_stride = lse[-2]
        p.batch, p.heads, p.heads_per_kv = shape.batch, shape.heads, shape.heads // shape.heads_k
        p.seqlen_q, p.seqlen_k = shape.seqlen_q, shape.seqlen_k
        p.window_left, p.window_right = opts.window_left, opts.window_right
        p.m_blocks = -(-shape.seqlen_q // tile.block_m)
        # Masks as bits are mostly causal ones with exceptions (trees, prefixes): later rows see more.
        p.longest_first = int(opts.window_right != UNLIMITED or extras.mask is not None)
        slots, l2 = self._machine()
        p.section_heads = section_heads(
            shape, opts, longest_first=bool(p.longest_first), block_m=tile.block_m, itemsize=spec.dtype.itemsize,
            slots=slots, l2_bytes=l2,
        )  # fmt: skip
        p.attention_chunk = opts.attention_chunk
        p.chunk_multiplier, p.chunk_shift = chunk_reciprocal(opts.attention_chunk)
        p.scale = opts.scale if opts.scale is not None else shape.head_dim**-0.5
        p.scale_log2 = (opts.softcap or p.scale) * LOG2_E
        p.tanh_scale = p.scale / opts.softcap if opts.softcap else 0.0
        self._place(extras)
        self.grid = p.m_blocks * shape.batch * shape.heads
        if self.grid >= 1 << 31:
            raise InputError(f"{self.grid} query tiles exceed the grid limit of 2^31 - 1: split the batch")
        self._maps: tuple[int, ...] = ()
        self._map_words: tuple[ctypes.c_uint64, ...] = ()
        self._queued = False
        if isinstance(block, FwdSm90Params):
            tiles, self.grid = self.grid, min(self.grid, slots)  # CTAs that work through several tiles each
            block.tma.ctas = self.grid
            self._queued = self.grid < tiles
            self._encode_maps(block.tma, (q, k, v))
        self._block = block
        self._argument = (ctypes.c_void_p * 1)(ctypes.addressof(block))
        if not self._emulated:
            self._bind()

    def __str__(self) -> str:
        return f"{self.spec.name} tile {self.tile} grid {self.grid} smem {self._smem} {self.shape} {self.options}"

    def _machine(self) -> tuple[int, int]:
        """(CTAs that fit the GPU at once, bytes of its L2)"""
        if self._emulated:
            return launcher.SMS * self.tile.ctas_per_sm, launcher.L2_BYTES
        return driver.sm_count(self._device) * self.tile.ctas_per_sm, driver.l2_bytes(self._device)

    def _bind(self) -> None:
        argument = ctypes.addressof(self._argument)
        self._start = self.kernel.bound(self.grid, self._threads, self._smem, argument)

    def use_plain_grid(self) -> None:
        """One CTA a query tile instead of as many as fit the GPU, where there is the choice (Hopper); for tuning."""
        if isinstance(self._block, FwdSm90Params):
            p = self._params
            self.grid = self._block.tma.ctas = p.m_blocks * p.batch * p.heads
            self._queued, self._block.queue = False, None
            if not self._emulated:
                self._bind()

    def _encode_maps(self, block: FwdTmaParams, operands: tuple[torch.Tensor, ...]) -> None:
        """Tensor maps of q, k and v. Where there are no keys, nothing is loaded, but the kernel still prefetches its
        maps: those of q stand in, and no launch touches them again."""
        if 0 in operands[0].shape:
            return
        empty = any(0 in t.shape for t in operands)
        operands = operands[:1] * 3 if empty else operands
        columns = 32 if self.shape.head_dim <= 32 else 64  # FwdSm90Traits::kGroupColumns
        swizzle = tensor_map.Swizzle.B64 if columns == 32 else tensor_map.Swizzle.B128
        encode = tensor_map.encode_emulated if self._emulated else tensor_map.encode
        if not self._emulated:
            driver.ensure_context(self._device)  # the driver encodes in a context; a new thread has none
        replace = tensor_map.replace_address_emulated if self._emulated else tensor_map.replace_address
        keys = self.tile.block_n
        if self.shape.page_size is not None:  # what no page boundary cuts: piece_bits of paged_sm90.cuh
            keys = min(self.shape.page_size, keys & -keys)
        rows = (64, keys, keys)  # Q: a consumer's
        slots = (block.q_map, block.k_map, block.v_map)
        for slot, tensor, box_rows in zip(slots, operands, rows, strict=True):
            layout = tensor_map.layout(tensor.shape, tensor.stride(), self.spec.dtype, box_rows, columns, swizzle)
            encode(layout, tensor.data_ptr(), ctypes.addressof(slot))
        if empty:
            return
        self._maps = tuple(ctypes.addressof(slot) for slot in slots)
        words = [tensor_map.address_word(slot, replace) for slot in self._maps]
        found = tuple(word for word in words if word is not None)
        self._map_words = found if len(found) == len(words) else ()

    def _place(self, extras: Extras) -> None:
        """What the parameter block says of the optional tensors, their addresses aside."""
        p, slopes, table = self._params, extras.alibi_slopes, extras.page_table
        if slopes is not None:
            p.alibi_batch_stride = slopes.stride(0) if slopes.ndim == 2 else 0
        if table is not None:
            assert self.shape.page_size is not None
            p.page_table_stride = table.stride(0)
            p.page_bits = self.shape.page_size.bit_length() - 1
        if extras.mask is not None:
            batch, heads, p.mask_row_blocks, p.mask_col_blocks, _ = extras.mask.words.shape
            p.mask_batch_stride = heads * p.mask_row_blocks if batch > 1 else 0
            p.mask_head_stride = p.mask_row_blocks if heads > 1 else 0

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
        return_lse: bool = False,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
        seqused_k: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        page_table: torch.Tensor | None = None,
        mask: PackedMask | None = None,
        stream: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Launches on tensors with the geometry that the plan was made for.

        Returns:
            out, or (out, lse) with lse fp32 in natural log.

        Raises:
            InputError: another geometry, other optional tensors than planned, or a misaligned address.
        """
        guarded = self._guard(q, k, v)
        if not guarded:
            self._compare(q, k, v)
        if out is not None and ((out.shape, out.stride(), out.dtype) != self._out or out.device != q.device):
            raise InputError(
                f"out is {out.dtype} {tuple(out.shape)} with strides {out.stride()} on {out.device}; this plan writes "
                f"{self._out[2]} {self._out[0]} with strides {self._out[1]} on {q.device}"
            )
        extras = NO_EXTRAS
        if not (
            self._bare
            and cu_seqlens_q is cu_seqlens_k is seqused_k is alibi_slopes is sinks is page_table is mask is None
        ):
            self._check_lengths(cu_seqlens_q, cu_seqlens_k, seqused_k)
            if not (alibi_slopes is sinks is page_table is mask is None):
                extras = Extras(alibi_slopes, sinks, page_table, mask)
            self._check_extras(extras)
        return self.launch(
            q, k, v, out, return_lse, cu_seqlens_q, cu_seqlens_k, seqused_k, stream, extras, None, guarded
        )

    def _compare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """The geometry of tensors that the guard does not know, and a guard that knows them, where one can be had."""
        if (*tensors.geometry(q), *tensors.geometry(k), *tensors.geometry(v)) != self.geometry:
            self._refuse(q, k, v)
        if self._guards_left:
            self._guards_left -= 1
            self._guard = tensors.guard(q, k, v)

    def _check_lengths(self, *given: torch.Tensor | None) -> None:
        for name, tensor, planned in zip(
            ("cu_seqlens_q", "cu_seqlens_k", "seqused_k"), given, self._lengths, strict=True
        ):
            now = None if tensor is None else tensors.geometry(tensor)
            if now != planned:
                raise InputError(
                    f"{name} has (shape, strides, dtype, device) {now}; this plan was made for {planned}: "
                    "make another plan, or call attention()"
                )

    def _check_extras(self, extras: Extras) -> None:
        if extras.key == self._extras_key:
            return
        names = ("alibi_slopes", "sinks", "page_table", "mask")
        nothing = (None,) * len(names)
        each = zip(names, extras.key or nothing, self._extras_key or nothing, strict=True)
        changed = "; ".join(f"{name} is {now}, planned was {then}" for name, now, then in each if now != then)
        raise InputError(
            "a plan is for one set of optional tensors (alibi_slopes, sinks, page_table, mask) and their (shape, "
            f"strides, dtype, device): {changed}. Make another plan, or call attention()"
        )

    def _refuse(self, *given: torch.Tensor) -> None:
        for i, (name, tensor) in enumerate(zip("qkv", given, strict=True)):
            planned = self.geometry[4 * i : 4 * i + 4]
            if tensors.geometry(tensor) != planned:
                raise InputError(
                    f"{name} has (shape, strides, dtype, device) {tensors.geometry(tensor)}; this plan was made for "
                    f"{planned}: make another plan, or call attention()"
                )

    def launch(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor | None,
        return_lse: bool,
        cu_seqlens_q: torch.Tensor | None,
        cu_seqlens_k: torch.Tensor | None,
        seqused_k: torch.Tensor | None,
        stream: int | None,
        extras: Extras = NO_EXTRAS,
        lse: torch.Tensor | None = None,
        guarded: bool = False,
    ) -> Any:
        """``run`` without the geometry check, for callers that looked the plan up by geometry.

        ``lse`` is a contiguous tensor to write instead of a new one; only with ``return_lse``. ``guarded`` says that q,
        k and v passed a guard (``tensors.guard``), so that none of them requires a gradient.

        Nearly all of a warm call is in this one function: ten more of them are a microsecond.
        """
        if (
            (not guarded and (q.requires_grad or k.requires_grad or v.requires_grad))
            or (extras is not NO_EXTRAS and extras.requires_grad)
        ) and self._torch.is_grad_enabled():
            raise UnsupportedProblem(NO_BACKWARD)
        if self._current_device() != self._device:
            with self._torch.cuda.device(self._device):
                return self.launch(
                    q, k, v, out, return_lse, cu_seqlens_q, cu_seqlens_k, seqused_k, stream, extras, lse, guarded
                )  # fmt: skip
        if out is None:
            out = self._empty(*self._out)
        if return_lse and lse is None:
            lse = self._empty(*self._lse)
        if not self.grid:
            return out if lse is None else (out, lse)
        if stream is None:
            stream = self._current_stream(self._device)
        q_at, k_at, v_at, out_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        if (q_at | k_at | v_at | out_at) & 15:
            for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
                tensors.check_address(name, tensor)
        if self._debug:  # before the launch, so that the call that crashes is the last line
            print(f"fmha: {self}", file=sys.stderr, flush=True)
        with self._lock:  # not acquire() and try, at half the price: an interrupt between the two would keep it locked
            if extras is NO_EXTRAS:
                params.write_addresses(
                    self._params, 0, q_at, k_at, v_at, out_at, 0 if lse is None else lse.data_ptr(),
                    0 if cu_seqlens_q is None else cu_seqlens_q.data_ptr(),
                    0 if cu_seqlens_k is None else cu_seqlens_k.data_ptr(),
                    0 if seqused_k is None else seqused_k.data_ptr(),
                )  # fmt: skip
            else:
                mask, slopes, sinks, table = extras.mask, extras.alibi_slopes, extras.sinks, extras.page_table
                params.write_all_addresses(
                    self._params, 0, q_at, k_at, v_at, out_at, 0 if lse is None else lse.data_ptr(),
                    0 if cu_seqlens_q is None else cu_seqlens_q.data_ptr(),
                    0 if cu_seqlens_k is None else cu_seqlens_k.data_ptr(),
                    0 if seqused_k is None else seqused_k.data_ptr(), 0 if sinks is None else sinks.data_ptr(),
                    0 if slopes is None else slopes.data_ptr(), 0 if table is None else table.data_ptr(),
                    0 if mask is None else mask.words.data_ptr(), 0 if mask is None else mask.any.data_ptr(),
                )  # fmt: skip
            if self._map_words:
                q_word, k_word, v_word = self._map_words
                q_word.value, k_word.value, v_word.value = q_at, k_at, v_at
            elif self._maps:
                replace = tensor_map.replace_address_emulated if self._emulated else tensor_map.replace_address
                for slot, address in zip(self._maps, (q_at, k_at, v_at), strict=True):
                    replace(slot, address)
            if self._emulated:
                read = (q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, *extras.tensors)
                launcher.launch(
                    self.kernel, self.grid, self._threads, self._smem, self._block, self._queued, read, (out, lse)
                )
            else:
                try:
                    self._enqueue(stream)
                except DriverError as error:
                    driver.bind_after(error, self._device)
                    self._enqueue(stream)
        return out if lse is None else (out, lse)

    def _enqueue(self, stream: int) -> None:
        if self._queued:
            self._block.queue = tile_queue.word(self._device, stream)
        self._start(stream)


def chunk_reciprocal(chunk: int) -> tuple[int, int]:
    """(multiplier, shift) with ``((2 * p + 1) * multiplier >> 32) >> shift == p // chunk`` for positions p up to 2^29.

    Division by an invariant number (Granlund and Montgomery, 1994); the factor 2 leaves room for rounding, so that the
    multiplier fits an int32 for every chunk.
    """
    if chunk == 0:
        return 0, 0
    shift = max(0, (2 * chunk - 1).bit_length() - 2)
    return min((1 << 31) - 1, -(-(1 << (32 + shift)) // (2 * chunk))), shift


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * max(1, n))
    return tuple(reversed(strides))


def packed(mask: Any, cu_seqlens_q: Any) -> PackedMask | None:
    """The mask of a call as kernels read it; anything but a PackedMask is packed now, without a kernel."""
    if mask is None or isinstance(mask, PackedMask):
        return mask
    return pack(mask, cu_seqlens_q=cu_seqlens_q)


def run(
    kernel: Kernel,
    spec: KernelSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    attention_chunk: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    mask: Any = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    return_lse: bool = False,
    stream: int | None = None,
    tile: Tile | None = None,
) -> Any:
    """One call on exactly this kernel, with the checks of the public calls: what verification is built on.

    ``lse`` is a contiguous fp32 tensor to write instead of a new one, so that what lies around it can be watched.

    Raises:
        InputError: bad tensors or options, or a problem that this kernel does not compute.
    """
    extras = Extras(alibi_slopes, sinks, page_table, packed(mask, cu_seqlens_q))
    shape = arguments.check_call(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, out=out, extras=extras, cache=page_table is not None,
    )  # fmt: skip
    opts = arguments.options(
        causal=causal, window=window, scale=scale, softcap=softcap, attention_chunk=attention_chunk
    )
    dtype, score, family = tensors.dtype_of("q", q), arguments.score(opts, extras), arguments.mask(extras)
    wanted = (dtype, shape.head_dim, shape.head_dim_v, family, score, shape.kv)
    if wanted != (spec.dtype, spec.head_dim, spec.head_dim_v, spec.mask, spec.score, spec.kv):
        raise InputError(
            f"{spec.name} does not compute {dtype.value} with head dims {wanted[1]}x{wanted[2]}, {family.value} mask, "
            f"{score.value} scores, {shape.kv.value} K and V"
        )
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_k)
    if lse is not None and not (return_lse and _is_lse(lse, shape, q)):
        raise InputError(
            f"lse is {lse.dtype} {tuple(lse.shape)} on {lse.device}; this call needs return_lse=True and a contiguous "
            f"torch.float32 {shape.lse} on {q.device}"
        )
    plan = Plan(kernel, spec, tile or catalog.tile(spec), shape, opts, q, k, v, out, extras, lengths)
    return plan.launch(q, k, v, out, return_lse, cu_seqlens_q, cu_seqlens_k, seqused_k, stream, extras, lse)


def _is_lse(lse: torch.Tensor, shape: Shape, q: torch.Tensor) -> bool:
    import torch

    form = (tuple(lse.shape), lse.dtype, lse.device)
    return form == (shape.lse, torch.float32, q.device) and lse.is_contiguous()

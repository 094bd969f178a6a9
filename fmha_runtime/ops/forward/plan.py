# SPDX-License-Identifier: Apache-2.0
"""From a binding and checked tensors to one launch: parameter block, grid, tensor maps.

Decides nothing about which kernel. A ``Plan`` holds everything that depends on shapes, strides and options; a run only
patches addresses and launches.
"""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING, Any

from ...device import driver, tensor_map, tile_queue
from ...errors import DriverError, InputError, UnsupportedProblem
from ...kernels.forward import params
from ...kernels.forward.params import UNLIMITED, FwdSm90Params
from ...problem import tensors
from ...problem.arguments import NO_EXTRAS, Extras, Shape
from ...problem.overlap import Memory
from ...problem.packed_mask import PackedMask
from .. import launcher
from .binding import Binding
from .sections import section_heads

if TYPE_CHECKING:
    import torch

NO_BACKWARD = (
    "an input requires a gradient and there is no backward kernel yet: call under torch.no_grad() or "
    "torch.inference_mode(), or use torch's scaled_dot_product_attention for training"
)


_NOTHING = (0,) * 13

GUARDS = 8
"""How many guards of its geometry a plan makes at most. A guard also tells inference mode and autocast from plain
calls, so a program that switches between these modes would otherwise pay for a new guard at every switch."""


class Plan:
    """A kernel bound to shapes, strides and options. ``run`` accepts any tensors with the same geometry.

    Runs of one plan from several threads are serialised for the microseconds that filling and launching take.
    """

    # Look-ups in an object with more than 30 attributes are slow without.
    __slots__ = (
        "__weakref__", "_argument", "_bare", "_block", "_current_device", "_current_stream", "_debug", "_device",
        "_empty", "_extras_key", "_guards_left", "_hopper", "_lengths", "_lse", "_mapped", "_memory", "_out", "_params",
        "_queued", "_slots", "_start", "_torch", "_words", "_work", "binding", "emulated", "geometry", "grid", "guard",
        "key", "shape",
    )  # fmt: skip

    def __init__(
        self,
        binding: Binding,
        shape: Shape,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor | None = None,
        extras: Extras = NO_EXTRAS,
    ) -> None:
        import torch

        self.binding = binding
        self._torch = torch
        self.emulated, self._debug = binding.emulated, binding.debug
        self._device, self._empty = binding.device, binding.empty
        if self.emulated:
            self._current_device, self._current_stream = _no_device, _no_stream
        else:  # bound once: each look-up would cost every call
            self._current_device = torch._C._cuda_getDevice
            self._current_stream = torch._C._cuda_getCurrentRawStream
        self._block = block = binding.allocate()
        self._hopper = isinstance(block, FwdSm90Params)
        self._work = binding.work
        self._params = block.tma.fwd if self._hopper else block if self._work is None else block.fwd
        at = ctypes.addressof(block)
        self._argument = (ctypes.c_void_p * 1)(at)
        self._slots = (at, at + tensor_map.MAP_BYTES, at + 2 * tensor_map.MAP_BYTES)
        self._words: tuple[ctypes.c_uint64, ...] | None = None  # not asked for yet
        self._queued = False
        self._start: Any = None
        if not self.emulated:
            self._start = binding.kernel.bound(binding.tile.threads, binding.smem, ctypes.addressof(self._argument))
        self.key: Any = None
        """What the plan cache knows this plan by."""
        self.aim(shape, q, k, v, out, extras)

    def aim(
        self,
        shape: Shape,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor | None = None,
        extras: Extras = NO_EXTRAS,
    ) -> None:
        """Makes this a plan for tensors of another geometry, checked like those before. Only for who alone has it."""
        own, self.shape = self.binding, shape
        out_shape, lse_shape = shape.out, shape.lse
        rows, heads, dim = max(1, out_shape[-3]), max(1, shape.heads), max(1, shape.head_dim_v)
        if out is not None:
            strides = out.stride()
        elif shape.total_q is None:
            strides = (rows * heads * dim, heads * dim, dim, 1)
        else:
            strides = (heads * dim, dim, 1)
        lse_strides = (heads * rows, rows, 1) if shape.total_q is None else (rows, 1)
        self._out, self._lse = (out_shape, strides, q.dtype), (lse_shape, lse_strides, self._torch.float32)
        self._memory: Memory | None = None
        self.guard, self._guards_left = tensors.no_guard, GUARDS
        """A quick look whether tensors have this plan's geometry: see tensors.guard."""
        m_blocks = -(-shape.seqlen_q // own.tile.block_m)
        grid = m_blocks * shape.batch * shape.heads
        if grid >= 1 << 31:
            raise InputError(f"{grid} query tiles exceed the grid limit of 2^31 - 1: split the batch")
        params.write_all_addresses(self._params, 0, *_NOTHING)  # a launch without optional tensors leaves theirs alone
        self._fill(m_blocks, q.stride(), k.stride(), v.stride(), strides, lse_strides, extras)
        self._mapped = False
        if self._hopper:
            self._one_cta_each(grid, min(grid, own.slots))  # CTAs that work through several tiles each
            if grid and 0 not in q.shape:
                self._write_maps(q, k, v)
        elif self._work is not None and grid:
            self.grid = self._work.share(self._block, shape)
        else:
            self.grid = grid

    def _one_cta_each(self, tiles: int, ctas: int) -> None:
        """The grid of a Hopper kernel; with fewer CTAs than tiles they draw them from a queue."""
        self.grid = self._block.tma.ctas = ctas
        if self._queued and ctas == tiles:
            self._block.queue = None
        self._queued = ctas < tiles

    def for_runs(self, given: tuple[torch.Tensor, ...], lengths: tuple[Any, ...], extras: Extras) -> Plan:
        """Keeps what ``run`` compares: the geometry of q, k, v, of the lengths (cu_seqlens_q, cu_seqlens_k, seqused_k)
        and of the optional tensors. Plans that are looked up by geometry do not need it."""
        self.geometry = tuple([x for t in given for x in tensors.geometry(t)])
        self._extras_key = extras.key
        self._lengths = tuple(None if t is None else tensors.geometry(t) for t in lengths)
        self._bare = self._extras_key is None and self._lengths == (None, None, None)  # no optional tensors
        return self

    def learn(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Has a guard made that knows tensors of this plan's geometry which its present one did not know."""
        if self._guards_left:
            self._guards_left -= 1
            self.guard = tensors.guard(q, k, v)

    spec = property(lambda self: self.binding.spec, doc="The kernel that computes this.")
    tile = property(lambda self: self.binding.tile, doc="How it is cut.")
    options = property(lambda self: self.binding.options, doc="The checked options.")

    def __str__(self) -> str:
        own = self.binding
        return f"{own.spec.name} tile {own.tile} grid {self.grid} smem {own.smem} {self.shape} {own.options}"

    def _fill(
        self,
        m_blocks: int,
        q: tuple[int, ...],
        k: tuple[int, ...],
        v: tuple[int, ...],
        out: tuple[int, ...],
        lse: tuple[int, ...],
        extras: Extras,
    ) -> None:
        """Everything of the parameter block but addresses, from the strides of the tensors."""
        own, shape = self.binding, self.shape
        opts, mask, slopes, table = own.options, extras.mask, extras.alibi_slopes, extras.page_table
        # Masks as bits are mostly causal ones with exceptions (trees, prefixes): later rows see more.
        longest_first = opts.window_right != UNLIMITED or mask is not None
        section = section_heads(
            shape, opts, longest_first=longest_first, block_m=own.tile.block_m, itemsize=own.spec.dtype.itemsize,
            slots=own.slots, l2_bytes=own.bytes_l2,
        )  # fmt: skip
        row_blocks = col_blocks = mask_batch = mask_head = 0
        if mask is not None:
            batch, heads, row_blocks, col_blocks, _ = mask.words.shape
            mask_batch = heads * row_blocks if batch > 1 else 0
            mask_head = row_blocks if heads > 1 else 0
        params.write_geometry(
            self._params, params.GEOMETRY,
            q[0] if len(q) == 4 else 0, q[-3], q[-2], k[0] if len(k) == 4 else 0, k[-3], k[-2],
            v[0] if len(v) == 4 else 0, v[-3], v[-2], out[0] if len(out) == 4 else 0, out[-3], out[-2],
            0 if shape.total_q is not None else lse[0], lse[-2],
            0 if table is None else table.stride(0), mask_batch, mask_head,
            shape.batch, shape.heads, shape.heads // shape.heads_k, shape.seqlen_q, shape.seqlen_k,
            opts.window_left, opts.window_right, m_blocks, section, longest_first, opts.attention_chunk, *own.chunk,
            slopes.stride(0) if slopes is not None and slopes.ndim == 2 else 0, own.page_bits, row_blocks, col_blocks,
            *own.scales,
        )  # fmt: skip

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a Plan belongs to its process and its GPU and cannot be pickled or copied: make it anew with "
            "fmha_runtime.plan(...) where it is needed"
        )

    def use_plain_grid(self) -> None:
        """One CTA a query tile instead of as many as fit the GPU, where there is the choice (Hopper); for tuning."""
        if self._hopper:
            tiles = self._params.m_blocks * self._params.batch * self._params.heads
            self._one_cta_each(tiles, tiles)

    def _write_maps(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Tensor maps of q, k and v. Where there are no keys, nothing is loaded, but the kernel still prefetches its
        maps: those of q stand in, and no launch touches them again."""
        self._mapped = not (0 in k.shape or 0 in v.shape)
        operands = (q, k, v) if self._mapped else (q, q, q)
        try:
            self.binding.write_maps(self._slots, *operands)
        except DriverError as error:  # the driver encodes in a context; a new thread has none
            driver.bind_after(error, self._device)
            self.binding.write_maps(self._slots, *operands)
        if self._words is None and self._mapped:
            self._words = self.binding.address_words(self._slots, (q.data_ptr(), k.data_ptr(), v.data_ptr()))

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
        guarded = self.guard(q, k, v)
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
        self.learn(q, k, v)

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
        given = out is not None
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
        if given:
            if self._memory is None:
                self._memory = Memory(q, k, v, out)
            self._memory.check(q_at, k_at, v_at, out_at)
        if self._debug:  # before the launch, so that the call that crashes is the last line
            print(f"fmha: {self}", file=sys.stderr, flush=True)
        # Not acquire() and try, at half the price: an interrupt between the two would keep it locked.
        with self.binding.lock:
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
            if self._mapped:
                if self._words:
                    q_word, k_word, v_word = self._words
                    q_word.value, k_word.value, v_word.value = q_at, k_at, v_at
                else:
                    for slot, address in zip(self._slots, (q_at, k_at, v_at), strict=True):
                        self.binding.replace(slot, address)
            if self.emulated:
                read = (q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, *extras.tensors)
                own = self.binding
                work = () if self._work is None else self._work.place_emulated(self._block)
                launcher.launch(
                    own.kernel, self.grid, own.tile.threads, own.smem, self._block, self._queued, read, (out, lse),
                    work,
                )  # fmt: skip
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
        elif self._work is not None:
            room = self._work.place(self._block, stream)  # noqa: F841  # alive until the launch is enqueued
        self._start(self.grid, stream)


def _no_device() -> int:
    return -1


def _no_stream(device: int) -> int:
    return 0

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

from . import build, call, catalog, config, driver, emulator, manifest, params, tensor_map, tensors
from .call import NO_EXTRAS, Extras, Options, Shape
from .catalog import Tile
from .errors import BuildError, DriverError, EmulatorFault, InputError, KernelNotBuilt
from .packed_mask import PackedMask, pack
from .params import UNLIMITED, FwdSm90Params, FwdTmaParams
from .spec import Arch, KernelSpec

if TYPE_CHECKING:
    import torch

Kernel = Any  # driver.Kernel or emulator.Kernel: the same interface, no common base needed

EMULATED_L2 = 16 << 20
EMULATED_SMS = 2
LOG2_E = math.log2(math.e)


def emulated_arch(device: object) -> Arch | None:
    """The arch that ``device="emulator"`` or ``"emulator:sm90"`` names; None when it is no emulator.

    Raises:
        InputError: an emulator of an unknown arch.
    """
    if not isinstance(device, str) or not device.startswith("emulator"):
        return None
    word = device.removeprefix("emulator").removeprefix(":") or Arch.SM80.value
    try:
        return Arch(word)
    except ValueError:
        raise InputError(
            f"device is {device!r}; 'emulator' or 'emulator:ARCH' with one of "
            f"{', '.join(a.value for a in Arch)} is needed"
        ) from None


def load(
    spec: KernelSpec,
    *,
    device: str = "cuda:0",
    via: str = "cubin",
    tile: Tile | None = None,
    stream: int = 0,
) -> Kernel:
    """A kernel ready to launch.

    Args:
        spec: which kernel.
        device: "cuda:N" or "emulator".
        via: "cubin", or "ptx" to compile PTX and let the driver's JIT finish it (runs an older arch's kernel on a
            newer GPU, for verification).
        tile: forced, for experiments; a cubin of it is built when there is none.
        stream: the stream of the coming launch (see driver.load).

    Raises:
        KernelNotBuilt: no current cubin; FMHA_BUILD_ON_DEMAND=1 builds it instead.
        ArtifactError, DriverError, BuildError, ToolchainError: see the modules that do the work.
    """
    if emulated_arch(device) is not None:
        return emulator.load(spec, tile)
    index = int(device.partition(":")[2] or 0)
    smem = catalog.smem_bytes(spec, tile or catalog.tile(spec))
    size = ctypes.sizeof(params.block_type(spec))
    if via == "ptx":
        image = build.compile_ptx(spec, tile)
    elif via == "cubin":
        image = manifest.load_image(_built(spec) if tile is None else _built_with(spec, tile))
    else:
        raise InputError(f"via is {via!r}; 'cubin' or 'ptx' is needed")
    return driver.load(image, spec.name, index, smem, size, stream)


def _built(spec: KernelSpec) -> manifest.KernelRow:
    row = manifest.find(spec)
    if row is not None:
        return row
    command = f"fmha build {spec.name}"
    if config.build_on_demand():
        (result,) = build.build([spec])
        if result.error is not None:
            raise result.error
        row = manifest.find(spec)
        if row is not None:
            return row
    state = manifest.state(spec)
    raise KernelNotBuilt(
        f"{spec.name} is {state.word}: {state.reason}. Build it with\n  {command}\n"
        "or set FMHA_BUILD_ON_DEMAND=1 to build missing kernels at their first use.",
        name=spec.name,
        command=command,
    )


def _built_with(spec: KernelSpec, tile: Tile) -> manifest.KernelRow:
    """A cubin of a forced tile. Asking for one is asking for its build, spills and all."""
    row = manifest.find_tile(spec, tile)
    if row is None:
        (result,) = build.build([spec], tile=tile, spills=True)
        if result.error is not None:
            raise BuildError(f"tile {tile} cannot be built: {result.error}", command=result.command, log=result.log)
        row = result.row
    assert row is not None
    return row


class Plan:
    """A kernel bound to shapes, strides and options. ``run`` accepts any tensors with the same geometry.

    Runs of one plan from several threads are serialised for the microseconds that filling and launching take.
    """

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
        self._asked = extras.given
        self._lengths = tuple(None if t is None else geometry(t) for t in lengths)
        self._out_shape, self._lse_shape = shape.out, shape.lse
        self._debug = config.debug()
        self.geometry = (geometry(q), geometry(k), geometry(v))
        self._lock = threading.Lock()
        self._threads = tile.threads
        self._smem = catalog.smem_bytes(spec, tile)
        self._emulated = isinstance(kernel, emulator.Kernel)
        self._device = -1 if self._emulated else kernel.device
        self._torch = torch
        block = params.allocate(spec)
        p = self._params = block.tma.fwd if isinstance(block, FwdSm90Params) else block
        strides = out.stride() if out is not None else _contiguous(shape.out)
        self._out_strides = strides
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
        p.section_heads = self._section()
        p.longest_first = int(opts.window_right != UNLIMITED)
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
        self._queued = False
        if isinstance(block, FwdSm90Params):
            tiles, self.grid = self.grid, self._ctas()
            block.tma.ctas = self.grid
            self._queued = self.grid < tiles
            self._encode_maps(block.tma, (q, k, v))
        self._block = block
        self._argument = (ctypes.c_void_p * 1)(ctypes.addressof(block))
        self._argument_address = ctypes.addressof(self._argument)

    def __str__(self) -> str:
        return f"{self.spec.name} tile {self.tile} grid {self.grid} smem {self._smem} {self.shape} {self.options}"

    def _ctas(self) -> int:
        """CTAs of a Hopper kernel: as many as fit the GPU at once, each of which works through several tiles."""
        sms = EMULATED_SMS if self._emulated else driver.sm_count(self._device)
        return min(self.grid, sms * self.tile.ctas_per_sm)

    def use_plain_grid(self) -> None:
        """One CTA a query tile instead of as many as fit the GPU, where there is the choice (Hopper); for tuning."""
        if isinstance(self._block, FwdSm90Params):
            p = self._params
            self.grid = self._block.tma.ctas = p.m_blocks * p.batch * p.heads
            self._queued, self._block.queue = False, None

    def _encode_maps(self, block: FwdTmaParams, operands: tuple[torch.Tensor, ...]) -> None:
        """Tensor maps of q, k and v; left out where there is nothing to load."""
        if any(0 in t.shape for t in operands):
            return
        columns = 32 if self.shape.head_dim <= 32 else 64  # FwdSm90Traits::kGroupColumns
        swizzle = tensor_map.Swizzle.B64 if columns == 32 else tensor_map.Swizzle.B128
        encode = tensor_map.encode_emulated if self._emulated else tensor_map.encode
        rows = (64, self.tile.block_n, self.tile.block_n)  # Q: a consumer's
        slots = (block.q_map, block.k_map, block.v_map)
        for slot, tensor, box_rows in zip(slots, operands, rows, strict=True):
            layout = tensor_map.layout(tensor.shape, tensor.stride(), self.spec.dtype, box_rows, columns, swizzle)
            encode(layout, tensor.data_ptr(), ctypes.addressof(slot))
        self._maps = tuple(ctypes.addressof(slot) for slot in slots)

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

    def _section(self) -> int:
        """Query heads that run side by side: as many as keep their K and V in a quarter of the L2."""
        s = self.shape
        kv_bytes = s.seqlen_k * (s.head_dim + s.head_dim_v) * self.spec.dtype.itemsize
        l2 = EMULATED_L2 if self._emulated else driver.l2_bytes(self._device) // 4
        kv_heads = max(1, l2 // max(1, kv_bytes))
        return int(min(max(1, s.batch * s.heads), kv_heads * (s.heads // s.heads_k)))

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
        if (geometry(q), geometry(k), geometry(v)) != self.geometry:
            self._refuse(q, k, v)
        if out is not None and (out.shape != self._out_shape or out.stride() != self._out_strides):
            raise InputError(
                f"out has shape {tuple(out.shape)} and strides {out.stride()}; this plan writes "
                f"{self._out_shape} with strides {tuple(self._out_strides)}"
            )
        if not (cu_seqlens_q is cu_seqlens_k is seqused_k is None and self._lengths == (None, None, None)):
            self._check_lengths(cu_seqlens_q, cu_seqlens_k, seqused_k)
        extras = NO_EXTRAS
        if not (alibi_slopes is sinks is page_table is mask is None):
            extras = Extras(alibi_slopes, sinks, page_table, mask)
        if extras.given != self._asked:
            raise InputError(
                "a plan is for one set of optional tensors (alibi_slopes, sinks, page_table, mask): "
                f"this one was made with {self._asked}, this run has {extras.given}"
            )
        return self.launch(q, k, v, out, return_lse, cu_seqlens_q, cu_seqlens_k, seqused_k, stream, extras)

    def _check_lengths(self, *given: torch.Tensor | None) -> None:
        for name, tensor, planned in zip(
            ("cu_seqlens_q", "cu_seqlens_k", "seqused_k"), given, self._lengths, strict=True
        ):
            now = None if tensor is None else geometry(tensor)
            if now != planned:
                raise InputError(
                    f"{name} has (shape, strides, dtype, device) {now}; this plan was made for {planned}: "
                    "make another plan, or call attention()"
                )

    def _refuse(self, *given: torch.Tensor) -> None:
        for name, tensor, planned in zip("qkv", given, self.geometry, strict=True):
            if geometry(tensor) != planned:
                raise InputError(
                    f"{name} has (shape, strides, dtype, device) {geometry(tensor)}; this plan was made for "
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
    ) -> Any:
        """``run`` without the geometry check, for callers that looked the plan up by geometry.

        ``lse`` is a contiguous tensor to write instead of a new one; only with ``return_lse``.
        """
        torch = self._torch
        if out is None:
            out = torch.empty(self._out_shape, dtype=q.dtype, device=q.device)
            if self._emulated:
                out.fill_(float("nan"))  # what a kernel forgets to write shows
        if return_lse and lse is None:
            lse = torch.empty(self._lse_shape, dtype=torch.float32, device=q.device)
        if self.grid:
            addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
            if (addresses[0] | addresses[1] | addresses[2] | addresses[3]) & 15:
                for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
                    tensors.check_address(name, tensor)
            p = self._params
            if self._debug:  # before the launch, so that the call that crashes is the last line
                print(f"fmha: {self}", file=sys.stderr, flush=True)
            with self._lock:
                p.q, p.k, p.v, p.o = addresses
                p.lse = None if lse is None else lse.data_ptr()
                p.cu_seqlens_q = None if cu_seqlens_q is None else cu_seqlens_q.data_ptr()
                p.cu_seqlens_k = None if cu_seqlens_k is None else cu_seqlens_k.data_ptr()
                p.seqused_k = None if seqused_k is None else seqused_k.data_ptr()
                if extras is not NO_EXTRAS:
                    p.alibi_slopes = _address(extras.alibi_slopes)
                    p.sinks = _address(extras.sinks)
                    p.page_table = _address(extras.page_table)
                    if extras.mask is not None:
                        p.mask, p.mask_any = extras.mask.words.data_ptr(), extras.mask.any.data_ptr()
                if self._emulated:
                    inputs = (q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, *extras.tensors)
                    self._emulate(addresses, inputs, (out, lse))
                else:
                    try:
                        self._enqueue(addresses, stream)
                    except DriverError as error:
                        if error.code != driver.INVALID_CONTEXT:
                            raise
                        driver.bind(self._device)  # this thread's first CUDA call
                        self._enqueue(addresses, stream)
        return out if lse is None else (out, lse)

    def _enqueue(self, addresses: tuple[int, ...], stream: int | None) -> None:
        for slot, address in zip(self._maps, addresses, strict=False):
            tensor_map.replace_address(slot, address)
        device = self._device
        cuda = self._torch._C
        if stream is None:
            stream = cuda._cuda_getCurrentRawStream(device)
        if self._queued:
            self._block.queue = driver.queue_word(device, stream)
        if cuda._cuda_getDevice() == device:
            self.kernel.launch(self.grid, self._threads, self._smem, stream, self._argument_address)
        else:
            with self._torch.cuda.device(device):
                self.kernel.launch(self.grid, self._threads, self._smem, stream, self._argument_address)

    def _emulate(
        self,
        addresses: tuple[int, ...],
        inputs: tuple[torch.Tensor | None, ...],
        outputs: tuple[torch.Tensor | None, ...],
    ) -> None:
        for slot, address in zip(self._maps, addresses, strict=False):
            tensor_map.replace_address_emulated(slot, address)
        queue = ctypes.c_uint32(0)
        buffers = [
            (t.data_ptr(), tensors.extent_bytes(t), writable)
            for group, writable in ((inputs, False), (outputs, True))
            for t in group
            if t is not None
        ]
        if self._queued:
            self._block.queue = ctypes.addressof(queue)
            buffers.append((self._block.queue, 4, True))
        self.kernel.launch(self.grid, self._threads, self._smem, 0, ctypes.addressof(self._block), buffers)
        if queue.value:
            raise EmulatorFault(f"kernel {self.spec.name} left its tile queue at {queue.value}, which must be 0 again")


def geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What a plan depends on: shape, strides, dtype, device."""
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def chunk_reciprocal(chunk: int) -> tuple[int, int]:
    """(multiplier, shift) with ``((2 * p + 1) * multiplier >> 32) >> shift == p // chunk`` for positions p up to 2^29.

    Division by an invariant number (Granlund and Montgomery, 1994); the factor 2 leaves room for rounding, so that the
    multiplier fits an int32 for every chunk.
    """
    if chunk == 0:
        return 0, 0
    shift = max(0, (2 * chunk - 1).bit_length() - 2)
    return min((1 << 31) - 1, -(-(1 << (32 + shift)) // (2 * chunk))), shift


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


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
    shape = call.check_call(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, out=out, extras=extras, cache=page_table is not None,
    )  # fmt: skip
    opts = call.options(causal=causal, window=window, scale=scale, softcap=softcap, attention_chunk=attention_chunk)
    dtype, score, family = tensors.dtype_of("q", q), call.score(opts, extras), call.mask(extras)
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

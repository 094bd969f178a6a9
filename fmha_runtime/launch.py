# SPDX-License-Identifier: Apache-2.0
"""From a chosen kernel and checked tensors to one launch: parameter block, grid, plan.

Decides nothing about which kernel. A ``Plan`` holds everything that depends on shapes, strides and options; a run only
patches addresses and launches.
"""

from __future__ import annotations

import ctypes
import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import build, catalog, config, driver, emulator, manifest, tensors
from .catalog import Tile
from .errors import InputError, KernelNotBuilt
from .params import UNLIMITED, FwdParams
from .spec import Arch, KernelSpec

if TYPE_CHECKING:
    import torch

Kernel = Any  # driver.Kernel or emulator.Kernel: the same interface, no common base needed

EMULATED_L2 = 16 << 20
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Options:
    """What a call asks besides its tensors, checked and normalised by ``options``."""

    window_left: int = UNLIMITED
    window_right: int = UNLIMITED
    scale: float | None = None  # None: 1 / sqrt(head dim)
    causal: bool = False

    @property
    def window(self) -> tuple[int | None, int | None]:
        """(left, right) with None for unlimited."""
        left, right = self.window_left, self.window_right
        return (None if left == UNLIMITED else left, None if right == UNLIMITED else right)


def options(
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
) -> Options:
    """Checks the run-time options of a call.

    Raises:
        InputError: a window that is not two bounds, a bound that is negative or absurd, a window that reaches right
            of the diagonal of a causal call, or a scale that is not a positive finite number.
    """
    if not isinstance(causal, bool):
        raise InputError(f"causal is {causal!r}; True or False is needed")
    bounds = (None, None) if window is None else window
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise InputError(
            f"window is {window!r}; a pair (left, right) of visible keys on either side of the diagonal is needed, "
            "None = unlimited"
        )
    left = _bound("left", bounds[0])
    right = _bound("right", bounds[1])
    if causal:
        if right not in (0, UNLIMITED):
            raise InputError(
                f"causal=True and window right bound {right} contradict each other: "
                "causal means a right bound of 0; drop one of the two"
            )
        right = 0
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise InputError(f"scale is {scale!r}; a Python float is needed (default 1/sqrt(head_dim))")
        if not (math.isfinite(scale) and scale > 0):
            raise InputError(
                f"scale is {scale}; it must be a positive finite number (default 1/sqrt(head_dim))"
            )
        scale = float(scale)
    return Options(left, right, scale, causal)


def _bound(side: str, value: object) -> int:
    if value is None or value == -1:
        return UNLIMITED
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"the {side} window bound is {value!r}; an int or None is needed")
    if not 0 <= value <= tensors.MAX_SEQLEN:
        raise InputError(
            f"the {side} window bound is {value}; it counts visible keys, 0 to {tensors.MAX_SEQLEN}, "
            "and None (or -1) means unlimited"
        )
    return value


@dataclass(frozen=True)
class Shape:
    """Sizes of a checked call. For varlen, seqlen_q and seqlen_k are the caller's upper bounds."""

    batch: int
    heads: int
    heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    total_q: int | None = None  # tokens of a varlen batch

    @property
    def varlen(self) -> bool:
        """Whether q is [tokens, heads, dim]."""
        return self.total_q is not None

    @property
    def out(self) -> tuple[int, ...]:
        """Shape of the output."""
        rows = (self.batch, self.seqlen_q) if self.total_q is None else (self.total_q,)
        return (*rows, self.heads, self.head_dim_v)

    @property
    def lse(self) -> tuple[int, ...]:
        """Shape of the log-sum-exp."""
        if self.total_q is None:
            return (self.batch, self.heads, self.seqlen_q)
        return (self.heads, self.total_q)


def check_call(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_k: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    out: Any = None,
) -> Shape:
    """All rules about the tensors of one call.

    Raises:
        InputError: names the rule, the offender and what to do.
    """
    varlen = cu_seqlens_q is not None
    if varlen != (cu_seqlens_k is not None):
        raise InputError("cu_seqlens_q and cu_seqlens_k come together: one of them is missing")
    rank = 3 if varlen else 4
    rows = "[tokens" if varlen else "[batch, seq"
    for name, tensor, heads, dim in (
        ("q", q, "heads", "head_dim"),
        ("k", k, "heads_k", "head_dim"),
        ("v", v, "heads_k", "head_dim_v"),
    ):
        tensors.check_tensor(name, tensor, rank, f"{rows}, {heads}, {dim}]")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype is not q.dtype:
            raise InputError(f"{name} has dtype {tensor.dtype}, q has {q.dtype}: all three must agree")
        if tensor.device != q.device:
            raise InputError(
                f"{name} is on {tensor.device}, q is on {q.device}: all tensors of a call are on one device"
            )
    heads, heads_k = q.shape[-2], k.shape[-2]
    if k.shape[-1] != q.shape[-1]:
        raise InputError(f"q has head dim {q.shape[-1]}, k has {k.shape[-1]}: they must be equal")
    if k.shape[:-1] != v.shape[:-1]:
        raise InputError(
            f"k has shape {tuple(k.shape)}, v has {tuple(v.shape)}: all but the head dim must be equal"
        )
    if heads_k == 0 or heads % heads_k:
        raise InputError(
            f"{heads} query heads cannot share {heads_k} key/value heads evenly: heads must be a multiple of heads_k"
        )
    if varlen:
        lengths = (_max_seqlen("max_seqlen_q", max_seqlen_q), _max_seqlen("max_seqlen_k", max_seqlen_k))
        if not hasattr(cu_seqlens_q, "shape") or len(cu_seqlens_q.shape) != 1 or cu_seqlens_q.shape[0] < 1:
            raise InputError(
                "cu_seqlens_q must be an int32 tensor of batch + 1 offsets that start at 0, got "
                f"{tuple(cu_seqlens_q.shape) if hasattr(cu_seqlens_q, 'shape') else cu_seqlens_q!r}"
            )
        batch = cu_seqlens_q.shape[0] - 1
        tensors.check_index("cu_seqlens_q", cu_seqlens_q, batch + 1, q.device)
        tensors.check_index("cu_seqlens_k", cu_seqlens_k, batch + 1, q.device)
        total = q.shape[0]
    else:
        batch = q.shape[0]
        if k.shape[0] != batch:
            raise InputError(f"q has batch {batch}, k and v have {k.shape[0]}: they must be equal")
        lengths = (_max_seqlen("q's length", q.shape[1]), _max_seqlen("k's length", k.shape[1]))
        total = None
    if seqused_k is not None:
        tensors.check_index("seqused_k", seqused_k, batch, q.device)
    shape = Shape(batch, heads, heads_k, *lengths, q.shape[-1], v.shape[-1], total)
    if out is not None:
        tensors.check_tensor("out", out, rank, f"{rows}, heads, head_dim_v]")
        if tuple(out.shape) != shape.out or out.dtype is not q.dtype or out.device != q.device:
            raise InputError(
                f"out is {out.dtype} {tuple(out.shape)} on {out.device}; this call needs "
                f"{q.dtype} {shape.out} on {q.device}"
            )
        if any(n > 1 and s == 0 for n, s in zip(out.shape, out.stride(), strict=True)):
            raise InputError("out has a stride of 0: several results would share one place in memory")
    return shape


def _max_seqlen(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= tensors.MAX_SEQLEN:
        raise InputError(
            f"{name} is {value!r}; a Python int from 0 to {tensors.MAX_SEQLEN} is needed "
            "(an upper bound is allowed; it is not read from the device)"
        )
    return value


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
        tile: another tile than the catalogue's; only for "ptx" and the emulator.
        stream: the stream of the coming launch (see driver.load).

    Raises:
        KernelNotBuilt: no current cubin; FMHA_BUILD_ON_DEMAND=1 builds it instead.
        ArtifactError, DriverError, BuildError, ToolchainError: see the modules that do the work.
    """
    if emulated_arch(device) is not None:
        return emulator.load(spec, tile)
    index = int(device.partition(":")[2] or 0)
    smem = catalog.smem_bytes(spec, tile or catalog.tile(spec))
    size = ctypes.sizeof(FwdParams)
    if via == "ptx":
        image = build.compile_ptx(spec, tile)
    elif via == "cubin":
        image = manifest.load_image(_built(spec))
    else:
        raise InputError(f"via is {via!r}; 'cubin' or 'ptx' is needed")
    return driver.load(image, spec.name, index, smem, size, stream)


def _built(spec: KernelSpec) -> manifest.KernelRow:
    row = manifest.find(spec)
    if row is not None:
        return row
    command = f"fmha build {spec.name}"
    if config.build_on_demand():
        build.build([spec])
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
    ) -> None:
        import torch

        self.spec, self.tile, self.kernel, self.shape, self.options = spec, tile, kernel, shape, opts
        self.geometry = (geometry(q), geometry(k), geometry(v))
        self._lock = threading.Lock()
        self._threads = tile.threads
        self._smem = catalog.smem_bytes(spec, tile)
        self._emulated = isinstance(kernel, emulator.Kernel)
        self._device = -1 if self._emulated else kernel.device
        self._torch = torch
        p = self._params = FwdParams()
        strides = out.stride() if out is not None else _contiguous(shape.out)
        self._out_strides = strides
        for stride, own in (
            (p.q_stride, q.stride()),
            (p.k_stride, k.stride()),
            (p.v_stride, v.stride()),
            (p.o_stride, strides),
        ):
            stride.batch = 0 if shape.varlen else own[0]
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
        p.scale = opts.scale if opts.scale is not None else shape.head_dim**-0.5
        p.scale_log2 = p.scale * LOG2_E
        self.grid = p.m_blocks * shape.batch * shape.heads
        if self.grid >= 1 << 31:
            raise InputError(
                f"{self.grid} query tiles exceed the grid limit of 2^31 - 1: split the batch"
            )
        self._argument = (ctypes.c_void_p * 1)(ctypes.addressof(p))
        self._argument_address = ctypes.addressof(self._argument)

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
        stream: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Launches on tensors with the geometry that the plan was made for.

        Returns:
            out, or (out, lse) with lse fp32 in natural log.

        Raises:
            InputError: another geometry, or a misaligned address.
        """
        if (geometry(q), geometry(k), geometry(v)) != self.geometry:
            self._refuse(q, k, v)
        if out is not None and (out.shape != self.shape.out or out.stride() != self._out_strides):
            raise InputError(
                f"out has shape {tuple(out.shape)} and strides {out.stride()}; this plan writes "
                f"{self.shape.out} with strides {tuple(self._out_strides)}"
            )
        return self.launch(
            q, k, v, out, return_lse, cu_seqlens_q, cu_seqlens_k, seqused_k, stream
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
    ) -> Any:
        """``run`` without the geometry check, for callers that looked the plan up by geometry."""
        torch = self._torch
        if out is None:
            out = torch.empty(self.shape.out, dtype=q.dtype, device=q.device)
        lse = None
        if return_lse:
            lse = torch.empty(self.shape.lse, dtype=torch.float32, device=q.device)
        if self.grid:
            addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
            if (addresses[0] | addresses[1] | addresses[2] | addresses[3]) & 15:
                for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
                    tensors.check_address(name, tensor)
            p = self._params
            with self._lock:
                p.q, p.k, p.v, p.o = addresses
                p.lse = None if lse is None else lse.data_ptr()
                p.cu_seqlens_q = None if cu_seqlens_q is None else cu_seqlens_q.data_ptr()
                p.cu_seqlens_k = None if cu_seqlens_k is None else cu_seqlens_k.data_ptr()
                p.seqused_k = None if seqused_k is None else seqused_k.data_ptr()
                if self._emulated:
                    inputs = (q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k)
                    self._emulate(inputs, (out, lse))
                else:
                    self._enqueue(stream)
        return out if lse is None else (out, lse)

    def _enqueue(self, stream: int | None) -> None:
        device = self._device
        cuda = self._torch._C
        if stream is None:
            stream = cuda._cuda_getCurrentRawStream(device)
        if cuda._cuda_getDevice() == device:
            self.kernel.launch(
                self.grid, self._threads, self._smem, stream, self._argument_address
            )
        else:
            with self._torch.cuda.device(device):
                self.kernel.launch(
                    self.grid, self._threads, self._smem, stream, self._argument_address
                )

    def _emulate(
        self, inputs: tuple[torch.Tensor | None, ...], outputs: tuple[torch.Tensor | None, ...]
    ) -> None:
        buffers = [
            (t.data_ptr(), tensors.extent_bytes(t), writable)
            for group, writable in ((inputs, False), (outputs, True))
            for t in group
            if t is not None
        ]
        self.kernel.launch(
            self.grid, self._threads, self._smem, 0, ctypes.addressof(self._params), buffers
        )


def geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What a plan depends on: shape, strides, dtype, device."""
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * max(1, n))
    return tuple(reversed(strides))


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
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    stream: int | None = None,
    tile: Tile | None = None,
) -> Any:
    """One call on exactly this kernel, with the checks of ``attention()``: what verification is built on.

    Raises:
        InputError: bad tensors or options, or a problem that this kernel does not compute.
    """
    shape = check_call(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, out=out,
    )  # fmt: skip
    wanted = (tensors.dtype_of("q", q), shape.head_dim, shape.head_dim_v)
    if wanted != (spec.dtype, spec.head_dim, spec.head_dim_v):
        raise InputError(
            f"{spec.name} does not compute {wanted[0].value} with head dims {wanted[1]}x{wanted[2]}"
        )
    opts = options(causal=causal, window=window, scale=scale)
    plan = Plan(kernel, spec, tile or catalog.tile(spec), shape, opts, q, k, v, out)
    return plan.launch(q, k, v, out, return_lse, cu_seqlens_q, cu_seqlens_k, seqused_k, stream)

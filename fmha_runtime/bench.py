# SPDX-License-Identifier: Apache-2.0
"""How fast, next to every attention that torch has: same process, same tensors, interleaved runs.

Between any two runs 256 MiB are written, so no run finds its tensors in the L2, and the host is
ahead of the GPU by that write: events around a run see the run and not the host. Medians.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from . import ledger, sources
from .bench_record import OURS, BenchRecord, HostTime, Timing
from .errors import DriverError, FmhaError
from .spec import DType

if TYPE_CHECKING:
    from torch import Tensor

Call = Callable[[], Any]

TOKENS = 16384  # batch * seqlen of every cell
WIDTH = 2048  # heads * head_dim of every cell, as near as whole heads allow
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
PEERS = ("cudnn", "flash", "efficient", "math")  # backends of torch's SDPA
MATH_LENGTH = 2048
"""Longest sequence for torch's math backend, which writes out every score."""
REPS = 20
MIN_REPS = 10
FLUSH_BYTES = 256 << 20
AGREEMENT = 1e-2
"""Largest relative L2 distance between our output and a peer's; two right ones are 3e-3 apart."""
HOST_CASE = "b1_s128_h8_d128"


class Absent(Exception):
    """A provider does not run a cell; the text is the reason that the record keeps."""


@dataclass(frozen=True)
class Cell:
    """One problem of the grid: self attention of ``batch`` equal sequences."""

    dtype: DType
    head_dim: int
    head_dim_v: int
    seqlen: int
    causal: bool
    window: tuple[int | None, int | None] | None = None

    @property
    def batch(self) -> int:
        return max(1, TOKENS // self.seqlen)

    @property
    def heads(self) -> int:
        return round(WIDTH / self.head_dim)

    @property
    def key(self) -> str:
        """For example bf16_d64_s512_c: c is causal, n neither causal nor windowed."""
        dims = f"d{self.head_dim}"
        dims += "" if self.head_dim_v == self.head_dim else f"x{self.head_dim_v}"
        mask = "c" if self.causal else "n"
        if self.window is not None:
            left, right = ("inf" if x is None else x for x in self.window)
            mask += f"_w{left}-{right}"
        return f"{self.dtype.value}_{dims}_s{self.seqlen}_{mask}"

    @property
    def pairs(self) -> float:
        """Query-key pairs of a head that count: half of all for causal, the band for a window."""
        n = self.seqlen
        if self.window is None:
            return n * n / 2 if self.causal else float(n * n)
        left, right = self.window
        left = n if left is None else left
        right = 0 if self.causal else (n if right is None else right)
        return float(sum(min(n - 1, i + right) - max(0, i - left) + 1 for i in range(n)))

    @property
    def flops(self) -> float:
        """Multiply and add of both matrix products: 4 * B * H * Sq * Sk * D where D = Dv."""
        return 2 * self.batch * self.heads * self.pairs * (self.head_dim + self.head_dim_v)


def grid(
    dtypes: Iterable[DType] = (DType.BF16, DType.FP16),
    head_dims: Iterable[tuple[int, int]] = ((64, 64), (80, 80), (128, 128)),
    lengths: Iterable[int] = LENGTHS,
    masks: Iterable[bool] = (False, True),
    window: tuple[int | None, int | None] | None = None,
) -> tuple[Cell, ...]:
    """The standard cells: dtypes x head dims x lengths x (full, causal)."""
    dtypes, lengths, masks = tuple(dtypes), tuple(lengths), tuple(masks)
    return tuple(
        Cell(dtype, d, dv, n, causal, window)
        for dtype in dtypes
        for d, dv in head_dims
        for n in lengths
        for causal in masks
    )


@dataclass(frozen=True)
class Runnable:
    """One provider, ready to run on the tensors of one cell."""

    call: Call
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    kernel: str | None = None
    tile: str | None = None


class Timer(Protocol):
    """What measures. Tests put one without a GPU in its place."""

    def begin(self, call: Call) -> Any:
        """Start a timed run on a cold cache; returns a token."""

    def microseconds(self, tokens: Sequence[Any]) -> list[float]:
        """Wait for runs to end; how long each took."""

    def peak_mib(self, call: Call) -> float:
        """Memory that a call allocates at its peak."""


class CudaTimer:
    """CUDA events around a single run, after a write that empties the L2."""

    def __init__(self, device: str) -> None:
        import torch

        self._torch, self._device = torch, device
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def begin(self, call: Call) -> tuple[Any, Any]:
        start, stop = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        call()
        stop.record()
        return start, stop

    def microseconds(self, tokens: Sequence[tuple[Any, Any]]) -> list[float]:
        self._torch.cuda.synchronize(self._device)
        return [1e3 * start.elapsed_time(stop) for start, stop in tokens]

    def peak_mib(self, call: Call) -> float:
        cuda = self._torch.cuda
        cuda.synchronize(self._device)
        cuda.reset_peak_memory_stats(self._device)
        before = cuda.memory_allocated(self._device)
        result = call()
        peak = cuda.max_memory_allocated(self._device)
        del result
        return (peak - before) / 2**20


def interleave(runnables: Mapping[str, Runnable], timer: Timer, reps: int, seconds: float) -> dict[str, list[float]]:
    """Microseconds of each provider's runs, taking turns; fewer turns once ``seconds`` are over."""
    found: dict[str, list[float]] = {name: [] for name in runnables}
    begin = time.monotonic()
    for rep in range(reps):
        if rep >= min(reps, MIN_REPS) and time.monotonic() - begin > seconds:
            break
        tokens = []
        for runnable in runnables.values():
            with runnable.context():
                tokens.append(timer.begin(runnable.call))
        for name, value in zip(runnables, timer.microseconds(tokens), strict=True):
            found[name].append(value)
    return found


def run(
    cells: Sequence[Cell],
    *,
    device: int = 0,
    peers: Sequence[str] = PEERS,
    seconds: float = 180.0,
    reps: int = REPS,
    on_cell: Callable[[Cell, int, int], None] | None = None,
) -> BenchRecord:
    """Measure every cell with every provider.

    Args:
        seconds: for the whole run. Cells that are left when they are over are recorded as absent.
        on_cell: called with the cell, its number and the count before each cell.

    Raises:
        DriverError: there is no GPU, or torch cannot use it.
    """
    import torch

    from . import driver

    info = driver.device_info(device)
    if not torch.cuda.is_available():
        raise DriverError(
            f"torch {torch.__version__} cannot use the GPU ({info.name}); benchmarks need a torch "
            "built for CUDA: see https://pytorch.org/get-started"
        )
    name = f"cuda:{device}"
    torch.cuda.set_device(device)
    timer = CudaTimer(name)
    clock_before = _clock_mhz(device)
    begin = time.monotonic()
    timings: list[Timing] = []
    kernels: dict[str, dict[str, str]] = {}
    for number, cell in enumerate(cells):
        if on_cell is not None:
            on_cell(cell, number, len(cells))
        left = seconds - (time.monotonic() - begin)
        if left <= 0:
            reason = f"not run: the {seconds:.0f} s of --seconds were over"
            timings += (Timing(cell.key, p, absent=reason) for p in (OURS, *peers))
            continue
        ready, absent = _prepare(cell, name, peers)
        timings += measure(cell, ready, absent, timer, reps, left / (len(cells) - number))
        for runnable in ready.values():
            if runnable.kernel is not None:
                kernels[runnable.kernel] = _identity(runnable)
    meta = {
        **{"gpu": info.name, "capability": list(info.capability), "driver": info.driver_version},
        **{"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()},
        **{"commit": ledger.commit(), "kernels": kernels},
        **{"clock_mhz_before": clock_before, "clock_mhz_after": _clock_mhz(device)},
        **{"date": datetime.now(timezone.utc).isoformat(timespec="seconds")},
        **{"seconds": round(time.monotonic() - begin, 1), "tokens": TOKENS, "width": WIDTH},
        **{"flush_mib": FLUSH_BYTES >> 20, "math_backend_up_to": MATH_LENGTH},
    }
    return BenchRecord(meta, tuple(timings), tuple(host_times(name, peers)))


def measure(
    cell: Cell,
    ready: Mapping[str, Runnable],
    absent: Mapping[str, str],
    timer: Timer,
    reps: int,
    seconds: float,
) -> list[Timing]:
    """The timings of one cell, of who is ready and who is absent."""
    found = interleave(ready, timer, reps, seconds)
    timings = [Timing(cell.key, name, absent=reason) for name, reason in absent.items()]
    for name, times in found.items():
        runnable = ready[name]
        with runnable.context():
            peak = timer.peak_mib(runnable.call)
        median = statistics.median(times)
        timings.append(
            Timing(
                case=cell.key,
                provider=name,
                median_us=round(median, 2),
                best_us=round(min(times), 2),
                tflops=round(cell.flops / median / 1e6, 1),
                reps=len(times),
                peak_mib=round(peak, 1),
                kernel=runnable.kernel,
            )
        )
    return sorted(timings, key=lambda t: (t.provider != OURS, t.provider))


def host_times(device: str, peers: Sequence[str] = PEERS) -> list[HostTime]:
    """Microseconds of host time per call: ``attention()``, a prepared plan, and every peer."""
    import torch

    from . import api

    cell = Cell(DType.BF16, 128, 128, 128, False)
    q, k, v = (torch.randn(1, 128, 8, 128, dtype=torch.bfloat16, device=device) for _ in range(3))
    found = []
    for name in (OURS, "ours, plan.run", *peers):
        try:
            if name == OURS:
                runnable = Runnable(partial(api.attention, q, k, v))
            elif name in PEERS:
                runnable = _peer(name, cell, q, k, v)
            else:
                runnable = Runnable(partial(api.plan(q, k, v).run, q, k, v))
            with runnable.context():
                found.append(HostTime(HOST_CASE, name, round(_host_us(runnable.call), 2)))
        except (Absent, FmhaError) as reason:
            found.append(HostTime(HOST_CASE, name, absent=_reason(reason)))
    return found


def _host_us(call: Call, batches: int = 7, calls: int = 100) -> float:
    """Median over batches; 100 calls stay below the depth of the launch queue, so nothing waits."""
    import torch

    times = []
    for _ in range(batches):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(1e6 * (time.perf_counter() - begin) / calls)
    torch.cuda.synchronize()
    return statistics.median(times)


def _prepare(cell: Cell, device: str, peers: Sequence[str]) -> tuple[dict[str, Runnable], dict[str, str]]:
    """Who can run a cell, warmed up and in agreement, and why the others cannot."""
    import torch

    dtype = {DType.BF16: torch.bfloat16, DType.FP16: torch.float16}[cell.dtype]
    random = torch.Generator(device).manual_seed(0)

    def normal(dim: int) -> Tensor:
        shape = (cell.batch, cell.seqlen, cell.heads, dim)
        return torch.randn(shape, generator=random, device=device, dtype=dtype)

    q, k, v = normal(cell.head_dim), normal(cell.head_dim), normal(cell.head_dim_v)
    ready: dict[str, Runnable] = {}
    absent: dict[str, str] = {}
    outputs: dict[str, Tensor] = {}
    for name in (OURS, *peers):
        try:
            runnable = _ours(cell, q, k, v) if name == OURS else _peer(name, cell, q, k, v)
            with runnable.context():
                for _ in range(2):
                    outputs[name] = runnable.call()
            ready[name] = runnable
        except (Absent, FmhaError) as reason:
            absent[name] = _reason(reason)
    torch.cuda.synchronize()
    rivals = [name for name in outputs if name != OURS]
    if OURS in outputs and rivals:
        theirs = outputs[rivals[0]].transpose(1, 2).float()
        distance = float((outputs[OURS].float() - theirs).norm() / theirs.norm())
        if not distance <= AGREEMENT:
            del ready[OURS]
            absent[OURS] = f"wrong: relative L2 distance {distance:.1e} to {rivals[0]}"
    return ready, absent


def _ours(cell: Cell, q: Tensor, k: Tensor, v: Tensor) -> Runnable:
    from . import api

    plan = api.plan(q, k, v, causal=cell.causal, window=cell.window)
    return Runnable(
        partial(api.attention, q, k, v, causal=cell.causal, window=cell.window),
        kernel=plan.spec.name,
        tile=str(plan.tile),
    )


def _peer(name: str, cell: Cell, q: Tensor, k: Tensor, v: Tensor) -> Runnable:
    """A backend of torch's SDPA on the same memory, seen as [batch, heads, seq, dim]."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    backend = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }[name]
    if cell.window is not None:
        raise Absent("torch's SDPA has no sliding window (other than as a mask tensor)")
    if name == "math" and cell.seqlen > MATH_LENGTH:
        raise Absent(f"it writes out every score: measured up to {MATH_LENGTH} tokens")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def call() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=cell.causal)

    with warnings.catch_warnings(record=True) as notes, sdpa_kernel([backend]):
        warnings.simplefilter("always")
        try:
            call()
        except RuntimeError as error:
            reasons = [str(note.message).split(" (Triggered")[0].strip() for note in notes]
            raise Absent("; ".join(reasons) or _reason(error)) from error
    return Runnable(call, lambda: sdpa_kernel([backend]))


def _identity(runnable: Runnable) -> dict[str, str]:
    from .spec import KernelSpec

    spec = KernelSpec.parse(str(runnable.kernel))
    return {"tile": str(runnable.tile), "source_hash": sources.source_hash(spec)}


def _clock_mhz(device: int) -> int | None:
    """The SM clock now; None where NVML or its Python package does not tell."""
    import torch

    try:
        return int(torch.cuda.clock_rate(device))
    except Exception:  # NVML has exceptions of its own, and the clock is a remark, not a result
        return None


def _reason(error: BaseException) -> str:
    """The message on one line; CUDA's own run to pages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."

# SPDX-License-Identifier: Apache-2.0
"""How fast, next to torch's attention and other libraries: same process, same tensors, interleaved runs.

Between any two runs 256 MiB are written, so no run finds its tensors in the L2, and the host is
ahead of the GPU by that write: events around a run see the run and not the host. Medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from .. import records
from ..errors import DriverError, FmhaError
from ..kernels import sources
from ..kernels.spec import DType
from ..kernels.tile import Tile
from . import peers as bench_peers
from .cells import TOKENS, WIDTH, Cell, Inputs, inputs
from .peers import MATH_LENGTH, SDPA
from .provider import Absent, Call, Runnable, reason
from .record import OURS, BenchRecord, HostTime, Timing

if TYPE_CHECKING:
    from torch import Tensor

BAND = "ours, band"
"""This library's band kernel on a packed cell: what the packed mask is held against."""
REPS = 20
SHORT_REPS = 50
SHORT_FLOPS = 3e11
"""Cells below this (about 1 ms) take SHORT_REPS: they are cheap, and noisier."""
MIN_REPS = 10
FLUSH_BYTES = 256 << 20
HEAD_START_CYCLES = 400_000  # 0.2 ms: ten times what a launch takes the host
AGREEMENT = 1e-2
"""Largest relative L2 distance between our output and a peer's; two right ones are 3e-3 apart."""
HOST_CASE = "b1_s128_h8_d128"


class Timer(Protocol):
    """What measures. Tests put one without a GPU in its place."""

    def begin(self, call: Call) -> Any:
        """Start a timed run on a cold cache; returns a token."""

    def microseconds(self, tokens: Sequence[Any]) -> list[float]:
        """Wait for runs to end; how long each took."""

    def peak_mib(self, call: Call) -> float:
        """Memory that a call allocates at its peak."""


class CudaTimer:
    """CUDA events around a single run, after a write that empties the L2 and a pause in which the host gets ahead: an
    event waits for nobody, so a host that is late with its launch would be timed too."""

    def __init__(self, device: str) -> None:
        import torch

        self._torch, self._device = torch, device
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def begin(self, call: Call) -> tuple[Any, Any]:
        start, stop = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        self._torch.cuda._sleep(HEAD_START_CYCLES)
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
    peers: Sequence[str] = SDPA,
    seconds: float = 180.0,
    reps: int | None = None,
    tile: str | None = None,
    on_cell: Callable[[Cell, int, int], None] | None = None,
) -> BenchRecord:
    """Measure every cell with every provider.

    Args:
        peers: who else, as bench_peers.find understands them; who cannot be imported is noted in the record.
        seconds: a cap on the whole run: repetitions are cut down to ``MIN_REPS`` first, then the
            cells that were not reached when they are over are recorded as absent.
        reps: runs of a provider on a cell; None: ``REPS``, and ``SHORT_REPS`` for short ones.
        tile: force a target and tile of ours (see ``attention``), for example "sm90".
        on_cell: called with the cell, its number and the count before each cell.

    Raises:
        DriverError: there is no GPU, or torch cannot use it.
        InputError: an unknown peer.
    """
    import torch

    from ..device import driver

    found, missing = bench_peers.find(peers)
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
            why = f"not run: the {seconds:.0f} s of --seconds were over"
            timings += (Timing(cell.key, p, absent=why) for p in (OURS, *found))
            continue
        ready, absent = _prepare(cell, name, found, tile)
        turns = reps or (SHORT_REPS if cell.flops < SHORT_FLOPS else REPS)
        timings += measure(cell, ready, absent, timer, turns, left / (len(cells) - number))
        for runnable in ready.values():
            if runnable.kernel is not None:
                kernels[runnable.kernel] = _identity(runnable)
    meta = {
        **{"gpu": info.name, "capability": list(info.capability), "driver": info.driver_version},
        **{"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()},
        **{"commit": records.commit(), "kernels": kernels, "tile": tile, "missing": missing},
        **{"clock_mhz_before": clock_before, "clock_mhz_after": _clock_mhz(device)},
        **{"date": records.now()},
        **{"seconds": round(time.monotonic() - begin, 1), "tokens": TOKENS, "width": WIDTH},
        **{"flush_mib": FLUSH_BYTES >> 20, "bytes": {cell.key: cell.bytes for cell in cells if cell.queries == 1}},
        # A fixed batch goes as far as the memory allows; who is absent says how much that was.
        **{"math_backend_up_to": None if any(cell.sequences for cell in cells) else MATH_LENGTH},
    }
    return BenchRecord(meta, tuple(timings), tuple(host_times(name, found)))


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


def host_times(device: str, peers: Sequence[str] = SDPA) -> list[HostTime]:
    """Microseconds of host time per call: ``attention()``, a prepared plan, and every peer."""
    import torch

    from ..calls import api

    cell = Cell(DType.BF16, 128, 128, 128, False, grouped=(8, 8))
    q, k, v = (torch.randn(1, 128, 8, 128, dtype=torch.bfloat16, device=device) for _ in range(3))
    found = []
    for name in (OURS, "ours, plan.run", *peers):
        try:
            if name == OURS:
                runnable = Runnable(partial(api.attention, q, k, v))
            elif name in peers:
                runnable = bench_peers.prepare(name, cell, Inputs(q, k, v))
            else:
                runnable = Runnable(partial(api.plan(q, k, v).run, q, k, v))
            with runnable.context():
                found.append(HostTime(HOST_CASE, name, round(_host_us(runnable.call), 2)))
        except (Absent, FmhaError) as error:
            found.append(HostTime(HOST_CASE, name, absent=reason(error)))
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


def _prepare(
    cell: Cell, device: str, peers: Sequence[str], tile: str | None = None
) -> tuple[dict[str, Runnable], dict[str, str]]:
    """Who can run a cell, warmed up and in agreement, and why the others cannot."""
    import torch

    x = inputs(cell, device)
    ready: dict[str, Runnable] = {}
    absent: dict[str, str] = {}
    outputs: dict[str, Tensor] = {}
    for name in (OURS, *((BAND,) if cell.packed else ()), *peers):
        try:
            if name == OURS:
                runnable = ours(cell, x, tile)
            elif name == BAND:
                runnable = ours(replace(cell, packed=False), x, tile)
            else:
                runnable = bench_peers.prepare(name, cell, x)
            with runnable.context():
                for _ in range(2):
                    outputs[name] = runnable.output(runnable.call())
            ready[name] = runnable
        except (Absent, FmhaError) as error:
            absent[name] = reason(error)
        except Exception as error:  # a peer's own way of refusing, or a bug: on record, and the other cells run
            absent[name] = f"{type(error).__name__}: {reason(error)}"
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    for name, why in wrong(cell, x, outputs).items():
        del ready[name]
        absent[name] = f"wrong: {why}"
    return ready, absent


def wrong(cell: Cell, x: Inputs, outputs: Mapping[str, Tensor]) -> dict[str, str]:
    """Who computed something else, and how far off: nobody where all agree with us; otherwise two heads of everyone are
    held against the fp32 reference, and if that clears us both, it is us."""
    # ALiBi as a bf16 mask tensor is rounded: torch is not held to it.
    mine = [name for name in (OURS, BAND) if name in outputs]
    rivals = [name for name in outputs if name not in mine and not (cell.alibi and name in SDPA)]
    far: dict[str, float] = {}
    if OURS in mine:
        distances = {name: _distance(outputs[OURS], outputs[name]) for name in rivals}
        far = {name: distance for name, distance in distances.items() if not distance <= AGREEMENT}
        if rivals and not far:
            return {}
    found: dict[str, str] = {}
    for b, h in sorted({(0, 0), (cell.batch - 1, cell.heads - 1)}):
        want = _reference(cell, x, b, h)
        for name in (*mine, *rivals):
            distance = _distance(_part(cell, outputs[name], b, h), want)
            if not distance <= AGREEMENT:
                text = f"relative L2 distance {distance:.1e} to the reference in sequence {b}, head {h}"
                found.setdefault(name, text)
    unexplained = [name for name in far if name not in found]
    if unexplained and OURS not in found:
        found[OURS] = f"relative L2 distance {far[unexplained[0]]:.1e} to {unexplained[0]}"
    return found


def _distance(ours: Tensor, theirs: Tensor) -> float:
    theirs = theirs.float()
    return float((ours.float() - theirs).norm() / theirs.norm())


def _part(cell: Cell, t: Tensor, b: int, h: int) -> Tensor:
    """[1, S, 1, D] of sequence b and head h."""
    if cell.lengths:
        start = sum(cell.lengths[:b])
        return t[None, start : start + cell.lengths[b], h : h + 1]
    return t[b : b + 1, :, h : h + 1]


def _reference(cell: Cell, x: Inputs, b: int, h: int) -> Tensor:
    """[1, Sq, 1, Dv] fp32 of sequence b and query head h."""
    import torch

    from ..ops.forward import reference

    k, v = x.k, x.v
    if x.table is not None:
        k, v = (t[x.table[b].long()].flatten(0, 1)[None] for t in (k, v))
    if x.used is not None:
        k, v = (t[:, : int(x.used[b])] for t in (k, v))
    hk, bk = h * cell.heads_k // cell.heads, 0 if x.table is not None else b
    out, _ = reference.attention(
        *(_part(cell, x.q, b, h), _part(cell, k, bk, hk), _part(cell, v, bk, hk)),
        causal=cell.causal,
        window=cell.window,
        softcap=cell.softcap,
        alibi_slopes=None if x.slopes is None else x.slopes[h : h + 1],
        compute_dtype=torch.float32,
    )
    return out


def ours(cell: Cell, x: Inputs, tile: str | None = None, plain_grid: bool = False) -> Runnable:
    """This library on the tensors of a cell; a forced tile runs by way of its plan, and so does ``plain_grid``: one CTA
    a query tile on Hopper."""
    from ..calls import api

    tensors: dict[str, Any] = {"alibi_slopes": x.slopes, "mask": x.mask if cell.packed else None}
    options: dict[str, Any] = {
        "causal": cell.causal and not cell.packed,
        "window": cell.window,
        "softcap": cell.softcap,
    }
    lengths: dict[str, Any] = {}
    longest: dict[str, Any] = {}
    if cell.lengths:
        lengths = {"cu_seqlens_q": x.cu_seqlens, "cu_seqlens_k": x.cu_seqlens}
        longest = {"max_seqlen_q": max(cell.lengths), "max_seqlen_k": max(cell.lengths)}
    if x.used is not None:
        lengths = {"page_table": x.table, "seqused_k": x.used}
    plan = api.plan(x.q, x.k, x.v, **options, **tensors, **lengths, **longest, tile=tile)
    if plain_grid:
        plan.use_plain_grid()
    call: Call
    if tile is not None or plain_grid:
        call = partial(plan.run, x.q, x.k, x.v, **tensors, **lengths)
    elif cell.lengths:
        call = partial(api.attention_varlen, x.q, x.k, x.v, **lengths, **longest, **options, **tensors)
    elif x.used is not None:
        call = partial(
            api.attention_with_kvcache,
            *(x.q, x.k, x.v),
            **{"cache_seqlens": x.used, "page_table": x.table, **options, **tensors},
        )
    else:
        call = partial(api.attention, x.q, x.k, x.v, **options, **tensors)
    return Runnable(call, kernel=plan.spec.name, tile=str(plan.tile))


def _identity(runnable: Runnable) -> dict[str, str]:
    from ..kernels.spec import KernelSpec

    spec = KernelSpec.parse(str(runnable.kernel))
    return {"tile": str(runnable.tile), "code": sources.code(spec, Tile.parse(str(runnable.tile)))}


def _clock_mhz(device: int) -> int | None:
    """The SM clock now; None where NVML or its Python package does not tell."""
    import torch

    try:
        return int(torch.cuda.clock_rate(device))
    except Exception:  # NVML has exceptions of its own, and the clock is a remark, not a result
        return None

# SPDX-License-Identifier: Apache-2.0
"""Tuning: build the variants of a kernel, throw out the wrong ones, time the others on the present GPU.

A variant that is wrong or hangs can neither win nor cost the run: each is checked against the reference in another
process, which is ended when it falls silent, and only what passed is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

from .. import config, records
from ..bench import peers as bench_peers
from ..bench.cells import SOFTCAP, Cell
from ..errors import DriverError, FmhaError
from ..kernels import catalog, sources
from ..kernels.spec import Arch, KernelSpec, KvLayout, Mask, Score
from ..kernels.tile import Tile
from ..ops.forward.variants import variants
from ..ops.pack import packer
from ..toolchain import build
from . import worker as tune_worker
from .record import OK, Outcome, Tuned, TuneRecord
from .worker import PLAIN, Job

LENGTHS = (512, 2048, 16384)
SHORT_LENGTHS = (512, 1024)
PAGE = 64
START_SECONDS = 120.0  # of a process: importing torch, opening the GPU, the tensors of the first cell
Say = Callable[[str], None]
Talk = Callable[[str, Job, float], Iterator[tuple[Any, ...]]]
"""Runs a job somewhere and hands out its messages: a ``Worker``, or what a test puts in its place."""


def cells_for(spec: KernelSpec, lengths: Sequence[int] | None = None) -> tuple[Cell, ...]:
    """Where a kernel is timed: full and causal at each length (a packed mask: causal).

    Without ``lengths``: at ``LENGTHS``, or ``SHORT_LENGTHS`` for a short row.
    """
    lengths = lengths or (SHORT_LENGTHS if spec.short else LENGTHS)
    masks = (True,) if spec.mask is Mask.PACKED else (False, True)
    return tuple(
        Cell(
            *(spec.dtype, spec.head_dim, spec.head_dim_v, n, causal),
            softcap=SOFTCAP if spec.score is Score.SOFTCAP else 0.0,
            alibi=spec.score is Score.ALIBI,
            packed=spec.mask is Mask.PACKED,
            page_size=PAGE if spec.kv is KvLayout.PAGED else 0,
        )
        for n in lengths
        for causal in masks
    )


def build_all(
    wanted: Sequence[tuple[KernelSpec, Tile]], jobs: int | None = None, say: Say = lambda text: None
) -> dict[tuple[KernelSpec, Tile], Outcome]:
    """Build variants into the cache, spills allowed; an outcome each, "ok" or "not built".

    Those of a short row are built under its long twin's name, on which dispatch forces tiles.

    Raises:
        ToolchainError: there is no nvcc.
    """

    def one(item: tuple[KernelSpec, Tile]) -> Outcome:
        spec, tile = item
        (result,) = build.build([spec.long], tile=tile, jobs=1, spills=True)
        if result.row is None:
            return Outcome(str(tile), "not built", str(result.error))
        row = result.row
        return Outcome(str(tile), OK, "", row.registers, row.spill_bytes, row.smem_bytes)

    found = {}
    with ThreadPoolExecutor(jobs or config.build_jobs()) as pool:
        for number, (item, outcome) in enumerate(zip(wanted, pool.map(one, wanted), strict=True), 1):
            found[item] = outcome
            if number % max(1, len(wanted) // 10) == 0:
                say(f"built {number}/{len(wanted)}")
    return found


def run(
    specs: Sequence[KernelSpec],
    *,
    tiles: Sequence[str] = (),
    lengths: Sequence[int] | None = None,
    peers: Sequence[str] = ("cudnn",),
    device: int = 0,
    jobs: int | None = None,
    seconds: float = 1200.0,
    timeout: float = 30.0,
    reps: int = 10,
    plain_grid: bool = False,
    say: Say = lambda text: None,
) -> TuneRecord:
    """Tune kernels, one after the other.

    Args:
        tiles: only these, and the catalogue's (see forced_tile.parse); default ``tune_variants.variants``.
        lengths: tokens at which all are timed; default as for ``cells_for``.
        seconds: a cap on all: kernels that were not reached are left out, and noted in the record.
        timeout: of one variant's check, and of its first runs in a cell.
        plain_grid: time Hopper's variants with one CTA a query tile as well, as "TILE plain".

    Raises:
        DriverError: no GPU, or a process cannot start on it.
        ToolchainError: no nvcc, and something to build.
    """
    from ..device import driver

    info = driver.device_info(device)
    found, missing = bench_peers.find(peers)
    begin = time.monotonic()
    wanted = [(spec, tile) for spec in specs for tile in candidates(spec, tiles)]
    outcomes = build_all(wanted, jobs, say)
    if any(spec.mask is Mask.PACKED for spec in specs):  # their inputs are packed on the GPU
        (built,) = build.build([packer.spec_for(device)])
        if built.error is not None:
            raise built.error
    tuned, skipped = [], []
    with closing(Worker()) as worker:
        for spec in specs:
            if time.monotonic() - begin > seconds:
                skipped.append(spec.name)
                continue
            mine = [outcome for (of, _), outcome in outcomes.items() if of == spec]
            job = Job(spec.long.name, (), cells_for(spec, lengths), found, f"cuda:{device}", reps)
            tuned.append(tune_kernel(spec, mine, job, timeout, worker, say, plain_grid=plain_grid))
    meta = {
        **{"gpu": info.name, "capability": list(info.capability), "driver": info.driver_version},
        **{"date": records.now(), "commit": records.commit()},
        **{
            "lengths": sorted({cell.seqlen for spec in specs for cell in cells_for(spec, lengths)}),
            "reps": reps,
            "missing": missing,
            "not_reached": skipped,
        },
        **{"seconds": round(time.monotonic() - begin, 1)},
    }
    return TuneRecord(meta, tuple(tuned))


def candidates(spec: KernelSpec, tiles: Sequence[str] = ()) -> tuple[Tile, ...]:
    """The tiles to try, the catalogue's first."""
    from ..kernels import forced_tile

    if not tiles:
        return variants(spec)
    return tuple(dict.fromkeys((catalog.tile(spec), *(forced_tile.parse(spec, text) for text in tiles))))


def tune_kernel(
    spec: KernelSpec,
    built: Sequence[Outcome],
    job: Job,
    timeout: float,
    talk: Talk,
    say: Say = lambda text: None,
    plain_grid: bool = False,
) -> Tuned:
    """Check, then time the variants of one kernel that were built."""
    outcomes = {outcome.variant: outcome for outcome in built}
    _check(job, outcomes, timeout, talk)
    say(f"{spec.name}: {_alive(outcomes)} of {len(outcomes)} variants built and right")
    if plain_grid and spec.arch is Arch.SM90A:
        twins = [replace(one, variant=one.variant + PLAIN) for one in outcomes.values() if one.state == OK]
        outcomes |= {twin.variant: twin for twin in twins}
    cells, peers = _time(job, outcomes, timeout, talk)
    catalogue = str(catalog.tile(spec))
    result = Tuned(spec.name, sources.code(spec, catalog.tile(spec)), catalogue, cells, tuple(outcomes.values()), peers)
    if result.choice is not None:
        say(f"{spec.name}: {result.choice.variant} (catalogue: {catalogue})")
    return result


def _alive(outcomes: dict[str, Outcome]) -> int:
    return sum(outcome.state == OK for outcome in outcomes.values())


def _check(job: Job, outcomes: dict[str, Outcome], timeout: float, talk: Talk) -> None:
    """Ask one process after the other until every variant has a verdict."""
    left = [name for name, outcome in outcomes.items() if outcome.state == OK]
    while left:
        now, before, why = None, len(left), "it ended early"

        def verdict(name: str, state: str, reason: str) -> None:
            outcomes[name] = replace(outcomes[name], state=state, reason=reason)
            left.remove(name)

        for message in talk("check", replace(job, variants=tuple(left)), timeout):
            if message[0] == "checking":
                now = message[1]
            elif message[0] == "checked":
                now = None
                verdict(*message[1:])
            elif message[0] == "lost":
                why = message[2]
                if now is not None:
                    verdict(now, message[1], f"while it was checked: {why}")
        if len(left) == before:
            raise DriverError(f"the process that checks variants of {job.kernel} does nothing: {why}")


def _time(
    job: Job, outcomes: dict[str, Outcome], timeout: float, talk: Talk
) -> tuple[tuple[str, ...], dict[str, dict[str, float]]]:
    """The cells that were timed, and the peers' TFLOP/s by cell; the variants' go into ``outcomes``."""
    left, peers = list(job.cells), list(job.peers)
    done: list[str] = []
    speeds: dict[str, dict[str, float]] = {}

    def drop(name: str, state: str, reason: str) -> None:
        if name in outcomes:
            outcomes[name] = replace(outcomes[name], state=state, reason=reason)
        elif state != "not run":  # a peer that only refuses a cell may run the next
            peers.remove(name)

    while left and _alive(outcomes):
        alive = tuple(name for name, outcome in outcomes.items() if outcome.state == OK)
        before = len(left), len(alive), len(peers)
        trying: tuple[str, str] | None = None
        turns, why = False, "it ended early"
        for message in talk("measure", replace(job, variants=alive, cells=tuple(left), peers=tuple(peers)), timeout):
            word = message[0]
            if word == "trying":
                trying = message[1], message[2]
            elif word == "refused":
                trying = None
                drop(message[2], message[3], f"{message[1]}: {message[4]}")
            elif word == "turns":
                trying, turns = None, True
            elif word == "timed":
                turns = False
                done.append(message[1])
                left = [cell for cell in left if cell.key != message[1]]
                for name, value in message[2].items():
                    if name in outcomes:
                        tflops = {**outcomes[name].tflops, message[1]: value}
                        outcomes[name] = replace(outcomes[name], tflops=tflops)
                    else:
                        speeds.setdefault(name, {})[message[1]] = value
            elif word == "lost":
                why = message[2]
                if trying is not None:
                    drop(trying[1], message[1], f"{trying[0]}: {why}")
                elif turns:  # all were right and answered, and yet it stopped: this cell cannot be timed
                    left = left[1:]
        if (len(left), _alive(outcomes), len(peers)) == before:
            raise DriverError(f"the process that times variants of {job.kernel} does nothing: {why}")
    return tuple(done), speeds


class Worker:
    """A process of its own that runs one job after the other, and its successors: whoever falls silent or dies is
    replaced at the next job. Call it like a function; ``close`` ends it."""

    def __init__(self) -> None:
        self._process: Any = None
        self._channel: Any = None

    def __call__(self, task: str, job: Job, timeout: float) -> Iterator[tuple[Any, ...]]:
        """The messages of a job (see tune_worker.py).

        A process that says nothing for ``timeout`` seconds is killed; the last message is then ("lost", "hung", why),
        or ("lost", "fault", why) where it died.
        """
        if self._process is None:
            self._start()
        self._channel.send((task, job))
        allowed, intact = START_SECONDS, False
        try:
            while True:
                if not self._channel.poll(allowed):
                    yield ("lost", "hung", f"no answer in {allowed:.0f} s")
                    return
                try:
                    message = self._channel.recv()
                except (EOFError, ConnectionResetError):
                    self._process.join(5)
                    yield ("lost", "fault", f"its process ended with code {self._process.exitcode}")
                    return
                intact = message[0] == "end"
                yield message
                if intact:
                    return
                allowed = timeout + (job.seconds if message[0] == "turns" else 0.0)
        finally:
            if not intact:
                self.close()

    def _start(self) -> None:
        context = get_context("spawn")  # a forked child could not use CUDA
        self._channel, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is None:
            return
        self._channel.close()
        self._process.kill()
        self._process.join(30)
        self._process = self._channel = None


def _serve(channel: Any) -> None:
    """The body of the other process: jobs, until one of them says that the GPU's context is lost."""
    try:
        tasks = {"check": tune_worker.check, "measure": tune_worker.measure}
        while True:
            task, job = channel.recv()
            if not tasks[task](job, channel.send):
                return
    except EOFError:
        return
    except FmhaError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error

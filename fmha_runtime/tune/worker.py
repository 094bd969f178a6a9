# SPDX-License-Identifier: Apache-2.0
"""What runs in a process of its own while tuning: check variants of a kernel, and time them, taking turns.

A variant may hang or take the GPU's context down. So every step is announced before it begins, and tune.py ends a
process that falls silent and knows by the last announcement which variant it was.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..bench.cells import Cell
from ..errors import DriverError, FmhaError
from ..kernels.spec import KernelSpec
from ..kernels.tile import Tile

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = " plain"
"""Behind a tile: launched with one CTA a query tile. The cubin is the same, so ``check`` never sees it."""

Send = Callable[[tuple[Any, ...]], None]
"""Messages: ("ready",) ("checking", variant) ("checked", variant, state, reason) ("trying", cell, variant)
("refused", cell, variant, state, reason) ("turns", cell) ("timed", cell, {name: TFLOP/s}) ("end",)."""


@dataclass(frozen=True)
class Job:
    """What one process is to do."""

    kernel: str
    variants: tuple[str, ...]  # tiles, as text; to be timed also with PLAIN behind
    cells: tuple[Cell, ...] = ()
    peers: tuple[str, ...] = ()
    device: str = "cuda:0"
    reps: int = 10
    seconds: float = 10.0  # of a cell


def check(job: Job, send: Send) -> bool:
    """Hold every variant to the number rule of verify.py, on its quick cases. False: the context is lost."""
    import torch

    from ..ops import obtain
    from ..ops.forward import direct
    from ..verify import run as verifier

    spec = KernelSpec.parse(job.kernel)
    if job.device.startswith("cuda"):  # opening the GPU takes seconds, which are not the first variant's
        torch.cuda.set_device(job.device)
        torch.ones(64, 64, dtype=torch.float64, device=job.device).matmul(
            torch.ones(64, 64, device=job.device).double()
        )
        torch.cuda.synchronize()
    send(("ready",))
    for variant in job.variants:
        send(("checking", variant))
        tile = Tile.parse(variant)
        try:
            kernel = obtain.kernel(spec, device=job.device, tile=tile)

            def run(q: Tensor, k: Tensor, v: Tensor, kernel: Any = kernel, tile: Tile = tile, **options: Any) -> Any:
                return direct.run(kernel, spec, q, k, v, tile=tile, **options)

            report = verifier.verify_kernel(spec, device=job.device, quick=True, runner=run)
        except DriverError as error:
            send(("checked", variant, "fault", str(error)))
            return False
        except FmhaError as error:
            send(("checked", variant, "not built", str(error)))
            continue
        fault = any(f.check == "fault" for r in report.failed for f in r.failures)
        why = [f"case {r.case.id}: {r.failures[0]}" for r in report.failed]
        send(("checked", variant, "ok" if report.ok else "fault" if fault else "wrong", "; ".join(why[:2])))
        if fault:
            return False
    send(("end",))
    return True


def measure(job: Job, send: Send) -> bool:
    """TFLOP/s of variants and peers in every cell. False: the context is lost."""
    import torch

    from ..bench import peers as bench_peers
    from ..bench import run as bencher
    from ..bench.cells import inputs
    from ..bench.provider import Absent, Runnable
    from ..bench.record import OURS

    spec = KernelSpec.parse(job.kernel)
    torch.cuda.set_device(job.device)
    timer = bencher.CudaTimer(job.device)
    send(("ready",))
    for cell in job.cells:
        x = inputs(cell, job.device)
        ready: dict[str, Runnable] = {}
        outputs: dict[str, Tensor] = {}
        for name in (*job.peers, *job.variants):
            send(("trying", cell.key, name))
            try:
                if name in job.peers:
                    runnable = bench_peers.prepare(name, cell, x)
                else:
                    tile = name.removesuffix(PLAIN)
                    runnable = bencher.ours(cell, x, f"{spec.arch.value} {tile}", plain_grid=tile != name)
                with runnable.context():
                    for _ in range(2):
                        out = runnable.output(runnable.call())
                    torch.cuda.synchronize()
            except (Absent, FmhaError) as error:
                if isinstance(error, DriverError):
                    send(("refused", cell.key, name, "fault", str(error)))
                    return False
                send(("refused", cell.key, name, "not run", str(error)))
                continue
            except Exception as error:  # torch.AcceleratorError where a kernel failed: the context is lost
                send(("refused", cell.key, name, "fault", f"{type(error).__name__}: {error}"))
                return False
            if name in job.peers:
                outputs[name] = out
            elif why := bencher.wrong(cell, x, {**outputs, OURS: out}).get(OURS):
                send(("refused", cell.key, name, "wrong", why))
                continue
            ready[name] = runnable
        send(("turns", cell.key))
        found = bencher.interleave(ready, timer, job.reps, job.seconds)
        speeds = {name: round(cell.flops / statistics.median(times) / 1e6, 1) for name, times in found.items()}
        send(("timed", cell.key, speeds))
    send(("end",))
    return True

# SPDX-License-Identifier: Apache-2.0
"""How a long job shows itself on stderr: how long it will take, then a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..kernels.spec import Arch, KernelSpec
from ..toolchain.build import Event

_LINES = 10  # in a log: about this many lines however many kernels there are
_SECONDS = {
    **{Arch.SM80: 0.82, Arch.SM86: 0.72, Arch.SM89: 0.72},
    **{Arch.SM90: 0.86, Arch.SM90A: 0.88, Arch.SM120: 0.65},
}
"""Of one compiler for one kernel: the mean of eight kernels of each arch, compiled one after the other by nvcc 13.0.88
on an AMD EPYC on 2026-11-27. Other machines differ; a build corrects it by its own pace."""


class Pace:
    """How long a build will take: at first by ``_SECONDS``, then by what its own kernels took."""

    def __init__(self, specs: Sequence[KernelSpec], workers: int, clock: Callable[[], float] = time.monotonic) -> None:
        """``specs``: what is to be compiled. ``workers``: compilers at once. ``clock``: seconds, for tests."""
        self._weight = sum(_SECONDS[spec.arch] for spec in specs)
        self._workers, self._clock, self._begin = workers, clock, clock()
        self._count, self._done = 0, 0.0

    def done(self, spec: KernelSpec) -> None:
        """One kernel is finished, or has failed."""
        self._count += 1
        self._done += _SECONDS[spec.arch]

    def left(self) -> float:
        """Seconds until the end."""
        rest = max(0.0, self._weight - self._done)
        if self._count < self._workers:  # nothing is known of this machine before every compiler was done once
            return max(0.0, self._weight / self._workers - (self._clock() - self._begin))
        return (self._clock() - self._begin) * rest / self._done


def duration(seconds: float) -> str:
    """For people: 20 s, 5 min, 1 h 10 min; never more exact than an estimate is."""
    if seconds < 90:
        return f"{max(5, 5 * round(seconds / 5))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class BuildProgress:
    """The ``on_event`` of ``build.build``; a context manager, so that the bar goes away."""

    def __init__(self, console: Console | None = None) -> None:
        """``console``: where to write, stderr by default."""
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("building"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.description}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, left="")
        self._pace: Pace | None = None

    def __enter__(self) -> BuildProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event; a failure and a warning always get their own lines."""
        name = event.result.spec.name if event.result else ""
        left = self._follow(event)
        self._bar.update(self._task, completed=event.done, total=event.total, description=name, left=left)
        if event.result is not None and event.result.error is not None:
            self._print(f"FAIL  {event.result.error}")
        if event.result is not None and event.result.warning:
            self._print(f"warning: {event.result.warning}")
        if event.result is not None and not self._console.is_terminal and self._worth_a_line(event):
            self._print("  ".join(filter(None, [f"building {event.done}/{event.total}", name, left])))

    def _follow(self, event: Event) -> str:
        """What is left of the build in words; a build begins with how long it will take."""
        if event.kind == "plan" and event.specs:
            self._pace = Pace(event.specs, event.workers)
            self._print(
                f"building {event.total} {'kernel' if event.total == 1 else 'kernels'}, {event.workers} at once: "
                f"about {duration(self._pace.left())} (a rough guess; it gets better as kernels are finished)"
            )
        if self._pace is None or event.result is None:
            return ""
        self._pace.done(event.result.spec)
        return f"about {duration(self._pace.left())} left" if event.done < event.total else ""

    def _print(self, text: str) -> None:
        # Compiler output is full of brackets, which are markup to rich.
        self._console.print(text, markup=False)

    @staticmethod
    def _worth_a_line(event: Event) -> bool:
        if event.total == 0:
            return False
        step = -(-event.total // _LINES)
        return event.done % step == 0 or event.done == event.total

# SPDX-License-Identifier: Apache-2.0
"""How a long job shows itself on stderr: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..toolchain.build import Event

_LINES = 10  # in a log: about this many lines however many kernels there are


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
            TextColumn("{task.description}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)

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
        self._bar.update(self._task, completed=event.done, total=event.total, description=name)
        if event.result is not None and event.result.error is not None:
            self._print(f"FAIL  {event.result.error}")
        if event.result is not None and event.result.warning:
            self._print(f"warning: {event.result.warning}")
        if not self._console.is_terminal and self._worth_a_line(event):
            self._print(f"building {event.done}/{event.total}  {name}".rstrip())

    def _print(self, text: str) -> None:
        # Compiler output is full of brackets, which are markup to rich.
        self._console.print(text, markup=False)

    @staticmethod
    def _worth_a_line(event: Event) -> bool:
        if event.total == 0:
            return False
        step = -(-event.total // _LINES)
        return event.done % step == 0 or event.done == event.total

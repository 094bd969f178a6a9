# SPDX-License-Identifier: Apache-2.0
"""Starts compilers, none of which outlives this process: not on Ctrl-C, not even after kill -9.

A compiler starts others (nvcc starts cicc and ptxas), and the kernel tells none of them that this process is gone. So
each runs in a process group of its own, beside a shell that reads from a pipe which only this process could write to.
When the pipe closes, by ``cut`` or because there is nobody left to hold it open, that shell kills the group. Nothing
runs between fork and exec, so any number of threads may start compilers at once.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from .. import config
from ..errors import ToolchainError

# Shells give what runs in the background an empty standard input, so the pipe has to move to another number first.
_WATCHED = """
exec 3<&0 </dev/null
"$@" 3<&- &
compiler=$!
{ read -r _ <&3; kill -KILL 0; } >/dev/null 2>&1 &
watch=$!
wait $compiler
code=$?
exec >/dev/null 2>&1
kill -KILL $watch
exit $code
"""


class Leash:
    """What ties compilers to this process. Any number may run on one, from any threads."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        self._cut = False

    def cut(self) -> None:
        """End the compilers that run on it, and those that start later."""
        if not self._cut:
            self._cut = True
            os.close(self._write)

    @contextmanager
    def cut_on_error(self) -> Iterator[None]:
        """For what stands inside a pool of threads: leaving it by an exception ends what the threads wait for."""
        try:
            yield
        except BaseException:
            self.cut()
            raise

    def run(self, command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
        """Run a compiler in a folder and wait for it; its output and its errors are one text.

        A program that does not start exits with 126 or 127, one that was killed with 128 and the signal's number.
        """
        return _run(["/bin/sh", "-c", _WATCHED, "compiler", *command], folder, self._read, True)

    def __enter__(self) -> Leash:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End what runs on it and let go of the pipe."""
        self.cut()
        os.close(self._read)


def run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """``Leash.run`` for one compiler alone."""
    with Leash() as leash:
        return leash.run(command, folder)


def output(command: Sequence[str]) -> str:
    """What a program prints that is done at once, such as ``nvcc --version``.

    Raises:
        ToolchainError: it does not start, or it failed.
    """
    try:
        done = _run(command, Path.cwd(), subprocess.DEVNULL, False)
    except OSError as error:
        raise ToolchainError(f"cannot run {command[0]}: {error.strerror}") from None
    if done.returncode:
        said = done.stdout.strip().splitlines()[-1:]
        raise ToolchainError(": ".join([f"`{shlex.join(command)}` exited with {done.returncode}", *said]))
    return done.stdout


def _run(command: Sequence[str], folder: Path, stdin: int, own_group: bool) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env=config.tool_environment(),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        start_new_session=own_group,
    )

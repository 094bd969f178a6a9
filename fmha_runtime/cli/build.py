# SPDX-License-Identifier: Apache-2.0
"""``fmha build``: compile kernels, or compare what compiling them gives with the manifest."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from .. import config
from ..errors import InputError
from ..kernels.spec import KernelSpec
from ..kernels.tile import Tile
from . import report
from .exits import FAILED
from .options import json_flag, selectable
from .output import say, show
from .selection import Selection


@click.command()
@json_flag
@click.option("--dry-run", is_flag=True, help="Print the commands instead of running them.")
@click.option("--jobs", type=click.IntRange(1), help="Compilers at once.")
@click.option("--keep", is_flag=True, help="Leave source and command beside the cubin.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first failure.")
@click.option("--force", is_flag=True, help="Build what is up to date too.")
@click.option("--into", type=click.Path(path_type=Path), help="A packaged root, not the cache.")
@click.option("--tile", metavar="TILE", help="Another tile, e.g. '128x64 w4 s2 c2'; experiments.")
@click.option("--all", "everything", is_flag=True, help="Every kernel of the catalogue, which is also the default.")
@click.option("--check", is_flag=True, help="Compare with the packaged manifest instead; builds nothing for use.")
@click.option("--compile", "compile_all", is_flag=True, help="With --check: compile where the code is equal, too.")
@click.option("--update", is_flag=True, help="With --check: write the new code of rows that are identical by bytes.")
@click.option("--allow-changed", is_flag=True, help="With --check: exit with 0 although some changed.")
@selectable
def build(
    chosen: Selection, as_json: bool, dry_run: bool, jobs: int | None, keep: bool,
    fail_fast: bool, force: bool, into: Path | None, tile: str | None, everything: bool,
    check: bool, compile_all: bool, update: bool, allow_changed: bool,
) -> None:  # fmt: skip
    """Compile kernels with nvcc: what is not up to date, into the cache.

    --check says of every row of the packaged manifest whether the present sources still give its cubin: identical by
    code (nothing is compiled), identical by bytes, or changed. It needs no GPU, and exits with 1 when one changed.
    """
    from ..toolchain import build as builder
    from .progress import BuildProgress

    if everything and chosen != Selection():
        raise InputError("--all is every kernel: leave out the names and the other criteria")
    if not check and (compile_all or update or allow_changed):
        raise InputError("--compile, --update and --allow-changed belong to --check")
    if check and (dry_run or keep or fail_fast or force or into or tile):
        raise InputError("--check compares and builds nothing for use: leave out the options of building")
    specs = chosen.kernels()
    if check:
        _check(specs, as_json, jobs, compile_all, update, allow_changed)
        return
    cut = Tile.parse(tile) if tile else None
    if dry_run:
        show(report.build_script(specs, cut))
        return
    results: list[builder.BuildResult] = []
    begin = time.perf_counter()
    interrupted: KeyboardInterrupt | None = None
    with BuildProgress() as progress:

        def on_event(event: builder.Event) -> None:
            progress(event)
            if event.result is not None:
                results.append(event.result)
                if fail_fast and event.result.error is not None:
                    raise _Stop

        try:
            results = builder.build(specs, jobs=jobs, force=force, keep=keep, into=into, tile=cut, on_event=on_event)
        except _Stop:
            say("stopped at the first failure (--fail-fast)")
        except KeyboardInterrupt as error:
            interrupted = error
    results.sort(key=lambda result: result.spec.name)
    if as_json:
        click.echo(report.envelope(map(report.build_item, results)))
    else:
        show([report.build_line(result) for result in results])
    seconds = time.perf_counter() - begin
    say(report.build_totals(results, len(specs), seconds, jobs or config.build_jobs()))
    if interrupted is not None:
        raise interrupted
    if any(result.error is not None for result in results):
        sys.exit(FAILED)


def _check(
    specs: Sequence[KernelSpec], as_json: bool, jobs: int | None, compile_all: bool, update: bool, allow_changed: bool
) -> None:
    from ..toolchain import check

    begin = time.perf_counter()

    def on_done(done: int, total: int) -> None:
        if done % max(1, total // 10) == 0 or done == total:
            say(f"compiled {done}/{total}")

    checked = check.check(specs, compile_all=compile_all, jobs=jobs, on_done=on_done)
    shown = [one for one in checked if not one.ok or one.reason]
    if as_json:
        click.echo(report.envelope(map(report.check_item, checked)))
    else:
        show([report.check_line(one) for one in shown])
    say(report.check_totals(checked, time.perf_counter() - begin))
    if update:
        written = check.update(checked)
        say(f"{len(written)} rows of {config.package_root()} have their new code")
    if not allow_changed and not all(one.ok for one in checked):
        sys.exit(FAILED)


class _Stop(Exception):
    """--fail-fast has seen a failure."""

# SPDX-License-Identifier: Apache-2.0
"""``fmha tune``: which tile a kernel should have on this GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from . import report, selection
from .exits import FAILED
from .options import selectable
from .output import say, show
from .selection import Selection


@click.command()
@click.option("--dry-run", is_flag=True, help="List the variants; needs no GPU.")
@click.option("--build-only", is_flag=True, help="Build them into the cache; needs no GPU.")
@click.option("--tile", "tiles", multiple=True, metavar="TILE", help="Only these and the catalogue's: 128x176, ...")
@click.option("--plain-grid", is_flag=True, help="Time Hopper's also with one CTA a query tile.")
@click.option("--seqlens", metavar="N,N,...", help="Default: 512,2048,16384 (short rows: 512,1024), "
              "full and causal.")  # fmt: skip
@click.option("--against", default="cudnn", show_default=True, metavar="NAME,NAME,...", help="As for bench.")
@click.option("--jobs", type=click.IntRange(1), help="Compilers at once.")
@click.option("--seconds", type=click.FloatRange(1), default=1200.0, show_default=True)
@click.option("--timeout", type=click.FloatRange(1), default=30.0, show_default=True, help="Until a variant hangs.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the record.")
@selectable
def tune(
    chosen: Selection, dry_run: bool, build_only: bool, tiles: tuple[str, ...], seqlens: str | None, against: str,
    jobs: int | None, seconds: float, timeout: float, json_path: Path | None, plain_grid: bool,
) -> None:  # fmt: skip
    """Build tiles of kernels, check each against the reference, time the right ones on this GPU.

    Without names, --arch, --dtype or features: the plain bf16 kernels of this GPU's first target.
    """
    from ..tune import run as tuner

    specs = selection.for_tuning(chosen).kernels()
    wanted = [(spec, tile) for spec in specs for tile in tuner.candidates(spec, tiles)]
    if dry_run:
        show([report.variant_line(spec, tile) for spec, tile in wanted])
        say(f"{len(wanted)} variants of {len(specs)} kernels")
        return
    if build_only:
        outcomes = tuner.build_all(wanted, jobs, say)
        for (spec, _), outcome in outcomes.items():
            click.echo(f"{spec.name}  {outcome}")
        return
    record = tuner.run(
        specs,
        tiles=tiles,
        lengths=selection.lengths(seqlens) if seqlens else None,
        peers=against.split(","),
        jobs=jobs,
        seconds=seconds,
        timeout=timeout,
        plain_grid=plain_grid,
        say=say,
    )
    for tuned in record.kernels:
        show([*tuned.lines(), ""])
    if json_path is not None:
        record.save(json_path)
        say(f"wrote {json_path}")
    say("tiles: fmha_runtime/kernels/forward/tiles.py; `fmha cache prune` removes the variants that it does not have")
    if not record.choices():
        sys.exit(FAILED)

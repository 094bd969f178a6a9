# SPDX-License-Identifier: Apache-2.0
"""``fmha explain``: which kernel serves a problem."""

from __future__ import annotations

import sys

import click

from ..kernels import catalog
from ..kernels.spec import Arch
from . import report, selection
from .exits import FAILED
from .options import json_flag
from .output import say


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="d=128 dtype=bf16 [sq=1024 ...]")
@click.option("--arch", type=click.Choice([a.value for a in Arch]), help="Default: this GPU's.")
@click.option("--tile", metavar="[TARGET] TILE", help="As attention(tile=...) would force it.")
@json_flag
def explain(words: tuple[str, ...], arch: str | None, tile: str | None, as_json: bool) -> None:
    """Say which kernel serves a problem and why the nearest others do not.

    Words: b=2 sq=1024 sk=1024 h=32 hk=8 d=128 (or d=192x128) dtype=bf16 causal window=127,0 varlen
    softcap alibi packed paged. Exits with 1 when no kernel serves it.
    """
    from ..problem import dispatch

    trace = dispatch.trace(selection.problem(words, Arch(arch) if arch else selection.device_arch()), tile)
    if as_json:
        item = {
            "problem": str(trace.problem),
            "chosen": trace.chosen.name if trace.chosen else None,
            "tile": str(trace.forced or catalog.tile(trace.chosen)) if trace.chosen else None,
            "rejected": [{"name": spec.name, "reason": why} for spec, why in trace.rejected],
        }
        click.echo(report.envelope([item]))
    else:
        click.echo(str(trace))
    if trace.chosen is None:
        say("no kernel computes this; attention(..., fallback='torch') runs it in plain torch")
        sys.exit(FAILED)

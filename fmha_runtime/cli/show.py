# SPDX-License-Identifier: Apache-2.0
"""``fmha list`` and ``fmha inspect``: what is known of kernels, a line each or in full."""

from __future__ import annotations

import click

from .. import records
from ..errors import InputError
from . import report
from .options import json_flag, selectable
from .output import say, show
from .selection import Selection


@click.command("list")
@json_flag
@selectable
def list_(chosen: Selection, as_json: bool) -> None:
    """Show kernels: tile, resources, where the cubin is, how it was verified."""
    from ..kernels.store import Inventory

    inventory = Inventory.of(chosen.kernels())
    states = inventory.states
    items = [
        report.list_item(*each, proof) for each, proof in zip(states.items(), report.proofs(inventory), strict=True)
    ]
    if as_json:
        click.echo(report.envelope(items))
        return
    header, *rows = records.table([report.LIST_HEADER, *map(report.list_row, items)])
    say(header)
    show(rows)
    say(report.list_totals(items))
    for error in inventory.broken:
        say(f"broken: {error}")


@click.command()
@json_flag
@selectable
def inspect(chosen: Selection, as_json: bool) -> None:
    """Show registers, shared memory, spills, identity and instruction mix of kernels."""
    from . import inspection

    if not chosen.names:
        raise InputError("name the kernels to inspect (globs work): `fmha list` shows them")
    found = [inspection.inspect(spec) for spec in chosen.kernels()]
    if as_json:
        click.echo(report.envelope(one.item() for one in found))
    else:
        for one in found:
            show(one.lines())

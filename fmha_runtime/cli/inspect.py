# SPDX-License-Identifier: Apache-2.0
"""``fmha inspect``: what is inside kernels."""

from __future__ import annotations

import click

from ..errors import InputError
from . import report
from .options import json_flag, selectable
from .output import show
from .selection import Selection


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

# SPDX-License-Identifier: Apache-2.0
"""``fmha doctor``: what is wrong with this machine, and what helps."""

from __future__ import annotations

import sys

import click

from .options import json_flag
from .output import show


@click.command()
@json_flag
def doctor(as_json: bool) -> None:
    """Show what this machine has, what is broken, and the command that repairs it."""
    from . import diagnosis

    found = diagnosis.examine()
    if as_json:
        click.echo(found.json())
    else:
        show(found.text())
    sys.exit(found.exit_code)

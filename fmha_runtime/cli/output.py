# SPDX-License-Identifier: Apache-2.0
"""The two ways to a reader: stdout is data, so that ``fmha list | wc -l`` counts kernels; stderr is the rest."""

from __future__ import annotations

from collections.abc import Sequence

import click


def say(text: str = "") -> None:
    """A remark, to stderr."""
    click.echo(text, err=True)


def show(lines: Sequence[str]) -> None:
    """Data, to stdout."""
    for line in lines:
        click.echo(line)

# SPDX-License-Identifier: Apache-2.0
"""``fmha cache``: the folder of kernels built on this machine."""

from __future__ import annotations

import sys

import click

from .. import config
from . import report
from .exits import FAILED
from .output import say, show


@click.group()
def cache() -> None:
    """The folder of kernels built on this machine."""


@cache.command("dir")
def cache_dir() -> None:
    """Print the folder."""
    click.echo(str(config.cache_dir()))


@cache.command("clean")
@click.option("--dry-run", is_flag=True, help="Only list what would go.")
def cache_clean(dry_run: bool) -> None:
    """Remove every kernel in it. What is not ours stays."""
    _sweep(True, dry_run)


@cache.command("prune")
@click.option("--dry-run", is_flag=True, help="Only list what would go.")
def cache_prune(dry_run: bool) -> None:
    """Remove what is damaged, outdated or abandoned. What is not ours stays."""
    _sweep(False, dry_run)


def _sweep(everything: bool, dry_run: bool) -> None:
    from ..kernels.cache import sweep

    swept = sweep(config.cache_dir(), everything=everything, dry_run=dry_run)
    show(report.sweep_lines(swept) if dry_run else [])
    say("\n".join(report.sweep_totals(swept, dry_run)))
    if swept.failed:
        sys.exit(FAILED)

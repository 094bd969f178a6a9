# SPDX-License-Identifier: Apache-2.0
"""The program ``fmha`` as tests run it."""

from __future__ import annotations

from click.testing import CliRunner

from fmha_runtime.cli.program import main

from . import artefacts

SMALL = artefacts.SMALL.name
PLAIN = ["--mask", "band", "--score", "plain", "--no-paged", "--no-short"]


def fmha(*words):
    """Run it with these words, in this process."""
    return CliRunner().invoke(main, [str(word) for word in words])


def names(result):
    """The first word of each line of stdout."""
    return [line.split()[0] for line in result.stdout.splitlines()]

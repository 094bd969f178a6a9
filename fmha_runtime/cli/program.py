# SPDX-License-Identifier: Apache-2.0
"""The program ``fmha``: its commands, and what becomes of their errors.

The commands are in files beside this one: they parse, call and print, no logic lives there. Exit codes: 0 done, 1 the
subject failed, 2 usage or nothing selected, 3 environment (GPU, driver, nvcc, g++, torch), 4 an artefact is invalid,
130 interrupted. Heavy imports happen inside the commands.
"""

from __future__ import annotations

from typing import Any

import click

from .. import __version__, config
from ..errors import FmhaError, InputError
from .bench import bench
from .build import build
from .cache import cache
from .doctor import doctor
from .exits import INTERRUPTED, exit_code
from .explain import explain
from .output import say
from .show import inspect, list_
from .tune import tune
from .verify import verify


def _sentence(error: BaseException) -> str:
    """What went wrong and what to do next."""
    if isinstance(error, ImportError) and error.name:
        package = error.name.partition(".")[0]
        return f"{package} is not installed and this needs it: pip install {package}"
    if isinstance(error, FmhaError):
        return str(error)
    return f"{type(error).__name__}: {error}; this is a bug: FMHA_DEBUG=1 shows where it happened"


def _debug() -> bool:
    try:
        return config.debug()
    except InputError:
        return False


class _Program(click.Group):
    """A click group that turns our exceptions into one sentence and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            say("interrupted; what is finished stays")
            ctx.exit(INTERRUPTED)
        except Exception as error:
            if _debug():
                raise
            say(f"error: {_sentence(error)}")
            ctx.exit(exit_code(error))


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fmha")
def main() -> None:
    """Attention kernels as data: list, build, verify, measure and explain them.

    Exit codes: 0 done, 1 the subject failed, 2 usage or nothing selected, 3 environment, 4 an
    artefact is invalid, 130 interrupted.
    """


for _command in (list_, explain, build, verify, bench, tune, inspect, doctor, cache):
    main.add_command(_command)

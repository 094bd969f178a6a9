# SPDX-License-Identifier: Apache-2.0
"""Options that commands share: the selection of kernels, and --json."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar

import click

from ..kernels.spec import Arch, DType, KvLayout, Mask, Op, Score
from .selection import Selection

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _choice(flag: str, kind: type[Enum], text: str) -> Callable[[_Command], _Command]:
    words = [str(member.value) for member in kind]
    return click.option(flag, type=click.Choice(words), multiple=True, help=text)


def selectable(command: Callable[..., Any]) -> Callable[..., Any]:
    """The selection options, handed to the command as one ``Selection``."""

    def call(
        names: tuple[str, ...], op: Any, arch: Any, dtype: Any, head_dim: Any, mask: Any,
        score: Any, paged: bool | None, short: bool | None, **rest: Any,
    ) -> Any:  # fmt: skip
        chosen = Selection(
            names=names,
            op=tuple(map(Op, op)),
            arch=tuple(map(Arch, arch)),
            dtype=tuple(map(DType, dtype)),
            head_dim=head_dim,
            mask=tuple(map(Mask, mask)),
            score=tuple(map(Score, score)),
            kv=() if paged is None else (KvLayout.PAGED if paged else KvLayout.CONTIGUOUS,),
            short=() if short is None else (short,),
        )
        return command(chosen, **rest)

    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__click_params__ = list(getattr(command, "__click_params__", ()))  # type: ignore[attr-defined]
    for decorate in (
        click.option("--short/--no-short", default=None, help="Cut for short sequences, or not."),
        click.option("--paged/--no-paged", default=None, help="K and V in pages, or not."),
        _choice("--score", Score, "What happens to a score before the softmax."),
        _choice("--mask", Mask, "Mask family; band is full, causal and window."),
        click.option("--head-dim", multiple=True, metavar="D|DxV", help="128, or 192x128."),
        _choice("--dtype", DType, "Element type."),
        _choice("--arch", Arch, "GPU target."),
        _choice("--op", Op, "What the kernel does."),
        click.argument("names", nargs=-1, metavar="[NAME|GLOB]..."),
    ):
        call = decorate(call)
    return call


def json_flag(command: _Command) -> _Command:
    """The option ``--json``, handed to the command as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")(command)

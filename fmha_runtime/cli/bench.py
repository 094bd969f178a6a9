# SPDX-License-Identifier: Apache-2.0
"""``fmha bench``: this library next to others, on one GPU, or what a stored record says of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..errors import InputError
from ..kernels.spec import Arch, DType
from . import selection
from .output import say, show

if TYPE_CHECKING:
    from ..bench.record import BenchRecord

_MEASURING = ("grid", "against", "tile", "arch", "seconds", "json_path")
"""Options that say how to measure, or where the measurement goes: they mean nothing beside --from."""
_PEERS = {"standard": "sdpa", "length": "cudnn,flash,math,flex"}
"""Whom each grid is measured against where nobody is named."""


@click.command()
@click.option("--grid", default="standard", show_default=True, metavar="GRID", help="standard, hopper (every head dim "
              "in bf16, three in fp16), mma (standard on the mma.sync kernels), features, decode, quick, length (time "
              "and memory of one sequence up to 32k tokens).")  # fmt: skip
@click.option("--against", metavar="NAME,NAME,...", help="Peers: cudnn, flash, efficient, math (all four: sdpa), "
              "flex (torch's flex_attention; seconds a cell to compile), flash_attn, flash_attn_3, flash_attn_4, "
              "flashinfer, xformers; all is everyone who can be imported. Default: sdpa for the standard grid, "
              "cudnn,flash,math,flex for length, cudnn,flash for the others.")  # fmt: skip
@click.option("--tile", metavar="[TARGET] TILE", help="Force a target, a tile or both: sm90, '128x176', 'sm90 128x64'.")
@click.option("--arch", type=click.Choice([a.value for a in Arch]), help="Force a target; the same as --tile ARCH.")
@click.option("--dtype", multiple=True, type=click.Choice(["fp16", "bf16"]), help="Default: both.")
@click.option("--head-dim", multiple=True, metavar="D|DxV", help="Default: 64, 80, 128.")
@click.option("--seqlens", metavar="N,N,...", help="Default: 512,1024,...,16384.")
@click.option("--causal/--full", default=None, help="Only one of the two masks; default both.")
@click.option("--seconds", type=click.FloatRange(1), default=180.0, show_default=True)
@click.option("--from", "stored", type=click.Path(path_type=Path), metavar="RECORD.json",
              help="Print and draw a record that --json wrote; measures nothing and needs no GPU.")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the record.")
@click.option("--png", "png_path", type=click.Path(path_type=Path), help="Draw the record.")
@click.pass_context
def bench(
    context: click.Context, grid: str, against: str | None, tile: str | None, arch: str | None,
    dtype: tuple[str, ...], head_dim: tuple[str, ...], seqlens: str | None, causal: bool | None, seconds: float,
    stored: Path | None, json_path: Path | None, png_path: Path | None,
) -> None:  # fmt: skip
    """Measure this library next to torch's attention and others, interleaved, in one process.

    The axes (--dtype, --head-dim, --seqlens, --causal) make the standard grid, and leave cells out of the others and of
    a stored record.
    """
    axes: dict[str, Any] = {
        "head_dims": selection.head_dims(head_dim) if head_dim else None,
        "lengths": selection.lengths(seqlens) if seqlens else None,
    }
    if stored is not None:
        record = _stored(context, stored, dtypes=dtype or None, masks=_mask_words(causal), **axes)
    else:
        axes |= {"dtypes": tuple(map(DType, dtype)) or None, "masks": None if causal is None else (causal,)}
        target = arch or ("sm90" if grid == "mma" and tile is None else None)
        forced = " ".join(filter(None, [target, tile])) or None
        peers = against or _PEERS.get(grid, "cudnn,flash")
        record = _measured(grid, axes, peers.split(","), seconds, forced)
    show(record.lines())
    if json_path is not None:
        record.save(json_path)
        say(f"wrote {json_path}")
    if png_path is not None:
        from ..bench import plots

        plots.draw(record, png_path)
        say(f"wrote {png_path}")


def _measured(grid: str, axes: dict[str, Any], peers: list[str], seconds: float, tile: str | None) -> BenchRecord:
    from ..bench import cells as bench_cells
    from ..bench import run as bencher

    def on_cell(cell: Any, number: int, count: int) -> None:
        if number % max(1, count // 10) == 0:
            say(f"measuring {number}/{count}  {cell.key}")

    cells = bench_cells.select(grid, **axes)
    return bencher.run(cells, peers=peers, seconds=seconds, tile=tile, on_cell=on_cell)


def _stored(context: click.Context, path: Path, **axes: Any) -> BenchRecord:
    """A record from its file, with the cells that the axes leave."""
    from ..bench.record import BenchRecord

    given = [p for p in context.command.params if p.name in _MEASURING and _is_given(context, p.name)]
    if given:
        words = ", ".join(option.opts[0] for option in given)
        raise InputError(f"--from {path} measures nothing: leave out {words}, or leave out --from")
    record = BenchRecord.load(path)
    return record if not any(axes.values()) else record.only(**axes)


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not ParameterSource.DEFAULT


def _mask_words(causal: bool | None) -> tuple[str, ...] | None:
    return None if causal is None else ("causal",) if causal else ("full",)

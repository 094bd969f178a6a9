# SPDX-License-Identifier: Apache-2.0
"""``fmha bench``: this library next to others, on one GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..kernels.spec import Arch, DType
from . import selection
from .output import say, show


@click.command()
@click.option("--grid", default="standard", show_default=True, metavar="GRID", help="standard, hopper (every head "
              "dim in bf16, three in fp16), mma (standard on the mma.sync kernels), features, quick.")  # fmt: skip
@click.option("--against", metavar="NAME,NAME,...", help="Peers: cudnn, flash, efficient, math (all four: sdpa), "
              "flash_attn, flash_attn_3, flash_attn_4, flashinfer, xformers; all is everyone who can be imported. "
              "Default: sdpa for the standard grid, cudnn,flash for the others.")  # fmt: skip
@click.option("--tile", metavar="[TARGET] TILE", help="Force a target, a tile or both: sm90, '128x176', 'sm90 128x64'.")
@click.option("--arch", type=click.Choice([a.value for a in Arch]), help="Force a target; the same as --tile ARCH.")
@click.option("--dtype", multiple=True, type=click.Choice(["fp16", "bf16"]), help="Default: both.")
@click.option("--head-dim", multiple=True, metavar="D|DxV", help="Default: 64, 80, 128.")
@click.option("--seqlens", metavar="N,N,...", help="Default: 512,1024,...,16384.")
@click.option("--causal/--full", default=None, help="Only one of the two masks; default both.")
@click.option("--seconds", type=click.FloatRange(1), default=180.0, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the record.")
@click.option("--png", "png_path", type=click.Path(path_type=Path), help="Draw the record.")
def bench(
    grid: str, against: str | None, tile: str | None, arch: str | None, dtype: tuple[str, ...],
    head_dim: tuple[str, ...], seqlens: str | None, causal: bool | None, seconds: float, json_path: Path | None,
    png_path: Path | None,
) -> None:  # fmt: skip
    """Measure this library next to torch's attention and others, interleaved, in one process.

    The axes (--dtype, --head-dim, --seqlens, --causal) make the standard grid, and leave cells out of the others.
    """
    from ..bench import cells as bench_cells
    from ..bench import run as bencher

    cells = bench_cells.select(
        grid,
        dtypes=tuple(map(DType, dtype)) or None,
        head_dims=selection.head_dims(head_dim) if head_dim else None,
        lengths=selection.lengths(seqlens) if seqlens else None,
        masks=None if causal is None else (causal,),
    )
    target = arch or ("sm90" if grid == "mma" and tile is None else None)
    peers = against or ("sdpa" if grid == "standard" else "cudnn,flash")

    def on_cell(cell: Any, number: int, count: int) -> None:
        if number % max(1, count // 10) == 0:
            say(f"measuring {number}/{count}  {cell.key}")

    record = bencher.run(
        cells,
        peers=peers.split(","),
        seconds=seconds,
        tile=" ".join(filter(None, [target, tile])) or None,
        on_cell=on_cell,
    )
    show(record.lines())
    if json_path is not None:
        record.save(json_path)
        say(f"wrote {json_path}")
    if png_path is not None:
        from ..bench import plots

        plots.speed(record, png_path)
        say(f"wrote {png_path}")

# SPDX-License-Identifier: Apache-2.0
"""Pictures of benchmark records. matplotlib is imported at the first call; it draws to files."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InputError
from .record import OURS, BenchRecord

_KEY = re.compile(r"(?P<dtype>\w+?)_(?P<dims>d[\dx]+)_s(?P<seqlen>\d+)_(?P<mask>.+)")
_MASKS = {"c": "causal", "n": "full"}


def speed(record: BenchRecord, path: Path) -> None:
    """Draw TFLOP/s over sequence length: a column per head dim, a row per dtype and mask.

    Raises:
        InputError: the record has no cells, or matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'fmha-runtime[bench]', or leave out the plot") from error
    panels: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for case in record.cases:
        found = _KEY.fullmatch(case)
        if found is not None:
            row = f"{found['dtype']} {_MASKS.get(found['mask'], found['mask'])}"
            panels.setdefault((row, found["dims"]), []).append((int(found["seqlen"]), case))
    if not panels:
        raise InputError("the benchmark record has no cells to draw")
    rows = list(dict.fromkeys(row for row, _ in panels))
    columns = list(dict.fromkeys(dims for _, dims in panels))
    figure = Figure(figsize=(3.6 * len(columns) + 1, 2.6 * len(rows) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey="row")
    for (row, dims), points in panels.items():
        axis = axes[rows.index(row)][columns.index(dims)]
        axis.set_title(f"{row}, {dims}", fontsize=9)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        for number, provider in enumerate(record.providers):
            line = [(n, record.tflops(case, provider)) for n, case in sorted(points)]
            drawn = [(n, y) for n, y in line if y is not None]
            width = 2.2 if provider == OURS else 1.2
            x, y = [n for n, _ in drawn], [y for _, y in drawn]
            axis.plot(x, y, "o-", color=f"C{number}", linewidth=width, markersize=3, label=provider)
        axis.set_ylim(bottom=0)
    for axes_row in axes:
        axes_row[0].set_ylabel("TFLOP/s")
    for axis in axes[-1]:
        axis.set_xlabel("tokens per sequence")
    handles, labels = axes[0][0].get_legend_handles_labels()
    title = f"{record.meta.get('gpu')}, torch {record.meta.get('torch')}"
    style = {"title": title, "ncols": len(labels), "fontsize": 9}
    figure.legend(handles, labels, loc="outside upper center", **style)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a creation date the same record gives the same bytes.
    figure.savefig(path, dpi=110, metadata={"Software": None})

# SPDX-License-Identifier: Apache-2.0
"""Pictures of benchmark records. matplotlib is imported at the first call; it draws to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .record import OURS, BenchRecord, axes

DPI = 100
WIDTH = 12.0  # inches: 1200 pixels, which a page shows without shrinking
COLUMNS = 4  # of panels, at most
LABELS = {"cudnn": "cuDNN", "flash_attn": "FA2", "flash_attn_3": "FA3", "flash_attn_4": "FA4"}
_COLORS = {
    **{OURS: "#0072B2", "cudnn": "#D55E00", "flash": "#009E73", "flash_attn_3": "#CC79A7"},
    **{"flash_attn_4": "#B8860B", "efficient": "#56B4E9", "math": "#7F7F7F", "flex": "#7B3FA0"},
}
_MORE_COLORS = ("#000000", "#8C564B", "#9467BD", "#17BECF")
_LABEL_GAP = 0.075  # of a panel's height: what a line of text needs

Line = list[tuple[int, float]]


def draw(record: BenchRecord, path: Path) -> None:
    """Draw what a record is about: time and memory for the length grid, else speed.

    Raises:
        InputError: the record has no cells, or matplotlib is not installed.
    """
    (length if record.over_length else speed)(record, path)


def length(record: BenchRecord, path: Path) -> None:
    """Draw time and peak memory over length, both axes logarithmic: a row of panels each.

    Raises:
        InputError: the record has no cells, or matplotlib is not installed.
    """
    figure = _figure(record)
    rows = [(word, _panels(record, quantity)) for word, quantity in (("us", "median_us"), ("MiB", "peak_mib"))]
    found = [(f"{title}: {word}", lines) for word, panels in rows for title, lines in _grouped(panels)]
    if not found:
        raise InputError("the benchmark record has no cells to draw")
    _draw_panels(figure, found, min(COLUMNS, len(rows[0][1])), record, log=True)
    at = axes(record.cases[0])
    batch = at.batch.replace("_", ", ") if at else ""
    figure.suptitle(f"time and peak memory of a call over tokens, {batch}, {_where(record)}")
    _save(figure, path)


def speed(record: BenchRecord, path: Path) -> None:
    """Draw TFLOP/s: over sequence length, a panel for each dtype, head dim and mask.

    Cells with names of their own, such as those of the features, are a row of points each.

    Raises:
        InputError: the record has no cells, or matplotlib is not installed.
    """
    figure = _figure(record)
    panels = _panels(record, "tflops")
    named = [case for case in record.cases if axes(case) is None]
    if panels:
        _draw_panels(figure, _grouped(panels), min(COLUMNS, len(panels)), record)
    elif named:
        _draw_rows(figure, record, named)
    else:
        raise InputError("the benchmark record has no cells to draw")
    figure.suptitle(f"TFLOP/s over tokens per sequence, {_where(record)}" if panels else f"TFLOP/s, {_where(record)}")
    _save(figure, path)


def _figure(record: BenchRecord) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'fmha-runtime[bench]', or leave out the plot") from error
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _where(record: BenchRecord) -> str:
    return f"{record.meta.get('gpu')}, torch {record.meta.get('torch')}, {str(record.meta.get('date', ''))[:10]}"


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a creation date the same record gives the same bytes.
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _panels(record: BenchRecord, quantity: str) -> dict[str, dict[str, Line]]:
    """By panel title and provider, the points that were measured; nobody who has none."""
    found: dict[str, dict[str, Line]] = {}
    for case in record.cases:
        at = axes(case)
        if at is None:
            continue
        lines = found.setdefault(f"{at.dtype} {at.dims}, {at.mask}", {})
        for provider in record.providers:
            timing = record.timing(case, provider)
            value = getattr(timing, quantity) if timing is not None else None
            if value is not None:
                lines.setdefault(provider, []).append((at.seqlen, value))
    return {title: {name: sorted(line) for name, line in lines.items()} for title, lines in found.items() if lines}


def _draw_panels(
    figure: Any, panels: Sequence[tuple[str, dict[str, Line]]], columns: int, record: BenchRecord, log: bool = False
) -> None:
    """One panel after the other, each with its own scale."""
    rows = -(-len(panels) // columns)
    figure.set_size_inches(WIDTH, 2.5 * rows + 0.5)
    grid = figure.add_gridspec(rows, columns)
    for number, (title, lines) in enumerate(panels):
        axis = figure.add_subplot(grid[number // columns, number % columns])
        axis.set_title(title, fontsize=10)
        _draw_lines(axis, lines, record.providers, log)


def _grouped(panels: dict[str, dict[str, Line]]) -> list[tuple[str, dict[str, Line]]]:
    """The panels of one dtype and head dim side by side."""
    order = dict.fromkeys(title.rpartition(",")[0] for title in panels)
    return [(title, panels[title]) for group in order for title in panels if title.rpartition(",")[0] == group]


def _draw_lines(axis: Any, lines: dict[str, Line], providers: Sequence[str], log: bool) -> None:
    lengths = sorted({n for line in lines.values() for n, _ in line})
    values = [value for line in lines.values() for _, value in line]
    for name, line in lines.items():
        style = {"linewidth": 2.4, "zorder": 3} if name == OURS else {"linewidth": 1.4, "zorder": 2}
        axis.plot(*zip(*line, strict=True), "o-", color=_color(name, providers), markersize=3, **style)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [_tokens(n) for n in lengths], fontsize=8)
    axis.set_xlim(lengths[0] / 1.25, lengths[-1] * _room(lengths))
    if log:
        axis.set_yscale("log")
        axis.set_ylim(min(values) / 1.5, max(values) * 2)
    else:
        axis.set_ylim(0, 1.18 * max(values))
    axis.minorticks_off()
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    _label(axis, {name: line[-1] for name, line in lines.items()}, providers)


def _label(axis: Any, ends: dict[str, tuple[int, float]], providers: Sequence[str]) -> None:
    """Write each name beside the last point of its line."""
    place = axis.transData + axis.transAxes.inverted()
    heights = _spread({name: float(place.transform(end)[1]) for name, end in ends.items()})
    for name, (last, _) in ends.items():
        axis.annotate(
            LABELS.get(name, name),
            (last, heights[name]),
            (6, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color=_color(name, providers),
            fontsize=8.5,
            va="center",
            fontweight="bold" if name == OURS else "normal",
        )


def _room(lengths: Sequence[int]) -> float:
    """How far the axis goes beyond the last point: a third of the panel is for the labels."""
    return float(max(2.0, (lengths[-1] / lengths[0]) ** 0.4))


def _spread(heights: dict[str, float]) -> dict[str, float]:
    """The same heights, moved apart as far as lines of text need and no further: labels that would touch become a stack
    about the middle of where they would be."""
    names = sorted(heights, key=lambda name: -heights[name])
    stacks: list[tuple[float, int]] = []  # (height of the middle, labels)
    for name in names:
        stacks.append((heights[name], 1))
        while len(stacks) > 1 and stacks[-2][0] - stacks[-1][0] < _LABEL_GAP * (stacks[-2][1] + stacks[-1][1]) / 2:
            (low, few), (high, many) = stacks.pop(), stacks.pop()
            stacks.append(((high * many + low * few) / (many + few), many + few))
    placed: list[float] = []
    for middle, labels in stacks:
        placed += [middle + _LABEL_GAP * ((labels - 1) / 2 - i) for i in range(labels)]
    return dict(zip(names, placed, strict=True))


def _draw_rows(figure: Any, record: BenchRecord, cases: Sequence[str]) -> None:
    """A row a case, a point a provider."""
    figure.set_size_inches(WIDTH, 0.34 * len(cases) + 1.4)
    axis = figure.add_subplot()
    top = 0.0
    for row, case in enumerate(cases):
        points = [(p, x) for p in record.providers if (x := record.tflops(case, p)) is not None]
        axis.hlines(row, 0, max((x for _, x in points), default=0), color="#DDDDDD", linewidth=1, zorder=1)
        for provider, x in points:
            size = 60 if provider == OURS else 32
            axis.scatter(x, row, s=size, color=_color(provider, record.providers), zorder=3, label=provider)
            top = max(top, x)
    axis.set_yticks(range(len(cases)), cases, fontsize=9)
    axis.set_ylim(len(cases) - 0.5, -0.5)
    axis.set_xlim(0, 1.05 * top)
    axis.set_xlabel("TFLOP/s")
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right", "left"]].set_visible(False)
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    names = [LABELS.get(name, name) for name in handles]
    style = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": len(names), "fontsize": 9}
    axis.legend(handles.values(), names, frameon=False, **style)


def _color(provider: str, providers: Sequence[str]) -> str:
    """The same one for a provider in every picture, as far as there are colours."""
    others = [name for name in providers if name not in _COLORS]
    return _COLORS.get(provider) or _MORE_COLORS[others.index(provider) % len(_MORE_COLORS)]


def _tokens(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)

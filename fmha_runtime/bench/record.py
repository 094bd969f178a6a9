# SPDX-License-Identifier: Apache-2.0
"""What a benchmark measured: the JSON record, and the comparison with each peer read from it.

Needs neither torch nor a GPU: tables and plots are made from recorded files.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import records
from ..errors import InputError

SCHEMA = 1
OURS = "ours"
_KEY = re.compile(
    r"((?P<batch>b\d+_h\d+)_)?(?P<dtype>bf16|fp16)_d(?P<d>\d+)(x(?P<dv>\d+))?_s(?P<seqlen>\d+)_(?P<mask>.+)"
)
_MASKS = {"c": "causal", "n": "full"}


@dataclass(frozen=True)
class Axes:
    """What the name of a cell says.

    ``mask`` is full, causal or the name's own word for a window; ``batch`` is b1_h8 where batch and heads are the same
    at every length, else empty.
    """

    dtype: str
    head_dims: tuple[int, int]
    seqlen: int
    mask: str
    batch: str = ""

    @property
    def dims(self) -> str:
        """For example d64 or d192x128."""
        d, dv = self.head_dims
        return f"d{d}" if d == dv else f"d{d}x{dv}"


def axes(case: str) -> Axes | None:
    """The axes in the name of a cell; None for a cell with a name of its own, such as those of the features."""
    found = _KEY.fullmatch(case)
    if found is None:
        return None
    d, mask = int(found["d"]), found["mask"]
    dims, batch = (d, int(found["dv"] or d)), found["batch"] or ""
    return Axes(found["dtype"], dims, int(found["seqlen"]), _MASKS.get(mask, mask), batch)


@dataclass(frozen=True)
class Timing:
    """One provider on one cell. A provider that did not run has ``absent`` instead of numbers."""

    case: str
    provider: str
    median_us: float | None = None
    best_us: float | None = None
    tflops: float | None = None
    reps: int = 0
    peak_mib: float | None = None  # of device memory that a call allocates, its output included
    kernel: str | None = None  # of this library
    absent: str | None = None


@dataclass(frozen=True)
class HostTime:
    """Host time of one call that is not waited for, on the small case ``HOST_CASE`` of bench.py."""

    case: str
    provider: str
    host_us: float | None = None
    absent: str | None = None


@dataclass(frozen=True)
class BenchRecord:
    """Everything one ``fmha bench`` found."""

    meta: dict[str, Any]
    cells: tuple[Timing, ...]
    host: tuple[HostTime, ...] = ()

    @property
    def cases(self) -> tuple[str, ...]:
        """The cells, in the order they were run."""
        return tuple(dict.fromkeys(t.case for t in self.cells))

    @property
    def providers(self) -> tuple[str, ...]:
        """Everyone who was asked, this library first."""
        names = dict.fromkeys(t.provider for t in self.cells)
        return tuple(sorted(names, key=lambda name: name != OURS))

    @property
    def peers(self) -> tuple[str, ...]:
        """Everyone but this library."""
        return tuple(name for name in self.providers if name != OURS)

    def tflops(self, case: str, provider: str) -> float | None:
        """None where the provider did not run."""
        found = self.timing(case, provider)
        return found.tflops if found else None

    def ratios(self, peer: str) -> dict[str, float]:
        """This library's speed over the peer's, for the cells that both ran; below 1 it loses."""
        ratios = {}
        for case in self.cases:
            ours, theirs = self.tflops(case, OURS), self.tflops(case, peer)
            if ours and theirs:
                ratios[case] = ours / theirs
        return ratios

    def geometric_mean(self, peer: str) -> float | None:
        """Of ``ratios(peer)``; None when they share no cell."""
        ratios = self.ratios(peer)
        if not ratios:
            return None
        return statistics.geometric_mean(ratios.values())

    def only(
        self,
        dtypes: Collection[str] | None = None,
        head_dims: Collection[tuple[int, int]] | None = None,
        lengths: Collection[int] | None = None,
        masks: Collection[str] | None = None,
    ) -> BenchRecord:
        """The cells whose names have these axes; None is any. A cell with a name of its own has none.

        Raises:
            InputError: nothing is left.
        """

        def wanted(case: str) -> bool:
            found = axes(case)
            return found is not None and all(
                allowed is None or value in allowed
                for value, allowed in (
                    (found.dtype, dtypes),
                    (found.head_dims, head_dims),
                    (found.seqlen, lengths),
                    (found.mask, masks),
                )
            )

        cells = tuple(t for t in self.cells if wanted(t.case))
        if not cells:
            has = ", ".join(self.cases[:3])
            raise InputError(f"no cell of the record has these dtypes, head dims, lengths and masks; it has {has}, ...")
        return replace(self, cells=cells)

    def timing(self, case: str, provider: str) -> Timing | None:
        """None where nobody asked this provider."""
        return next((t for t in self.cells if (t.case, t.provider) == (case, provider)), None)

    def absences(self) -> dict[tuple[str, str], list[str]]:
        """The cells that were not run, by provider and reason."""
        found: dict[tuple[str, str], list[str]] = {}
        for t in self.cells:
            if t.absent is not None:
                found.setdefault((t.provider, t.absent), []).append(t.case)
        return found

    def save(self, path: Path) -> None:
        """Write the record as JSON, one cell per line."""
        cells, host = map(records.row, self.cells), map(records.row, self.host)
        records.save(path, SCHEMA, self.meta, cells=cells, host=host)

    @classmethod
    def load(cls, path: Path) -> BenchRecord:
        """The record in a file.

        Raises:
            ArtifactError: the file is missing or is no record of this schema.
        """
        return records.load(path, SCHEMA, cls._read, kind="benchmark record", command="fmha bench")

    @classmethod
    def _read(cls, data: dict[str, Any]) -> BenchRecord:
        cells = tuple(records.parsed(Timing, item) for item in data["cells"])
        return cls(dict(data["meta"]), cells, tuple(records.parsed(HostTime, item) for item in data["host"]))

    @property
    def over_length(self) -> bool:
        """Whether this is of the length grid, where time and memory are what counts."""
        return all((at := axes(case)) is not None and at.batch for case in self.cases) and bool(self.cells)

    def lines(self) -> list[str]:
        """The table of ``fmha bench``: TFLOP/s, ratio to each peer, losing cells marked."""
        peers = self.peers
        head = ["case", *self.providers, *(f"/{peer}" for peer in peers)]
        rows = []
        for case in self.cases:
            speeds = [records.speed(self.tflops(case, name)) for name in self.providers]
            ratios = [_ratio(self.ratios(peer).get(case)) for peer in peers]
            rows.append([case, *speeds, *ratios])
        lines = records.table([head, *rows], left=1)
        lines.append("TFLOP/s; /peer = ours over the peer's, < marks a cell that we lose")
        if self.over_length:
            lines += [*self._costs("median_us"), "microseconds", *self._costs("peak_mib")]
            lines.append("MiB of device memory that a call takes at its peak, its output included")
        if self.meta.get("bytes"):
            lines += [*self._costs("median_us", self._rate), "microseconds, GB/s: K, V, Q and O once, over the time"]
        for (provider, reason), cases in self.absences().items():
            lines.append(f"absent: {provider} in {len(cases)} cells: {reason}")
        for peer in peers:
            mean = self.geometric_mean(peer)
            if mean is not None:
                ratios_of = self.ratios(peer)
                lost = sum(r < 1 for r in ratios_of.values())
                lines.append(f"geometric mean vs {peer}: {mean:.3f} over {len(ratios_of)} cells, {lost} lost")
        for name in self.providers:
            peak = max((t for t in self.cells if t.provider == name and t.peak_mib), key=_peak, default=None)
            if peak is not None:
                lines.append(f"memory that a call takes at most, {name}: {_peak(peak):.0f} MiB ({peak.case})")
        for h in self.host:
            text = f"{h.host_us:.1f} us" if h.host_us is not None else f"absent: {h.absent}"
            lines.append(f"host time per call, {h.case}, {h.provider}: {text}")
        return lines

    def _rate(self, case: str) -> list[str]:
        """What this library reads and writes a second, in GB/s; nothing where bytes are not what counts."""
        size, took = self.meta["bytes"].get(case), (self.timing(case, OURS) or Timing(case, OURS)).median_us
        return [f"{size / took / 1e3:.0f}" if size and took else "-"]

    def _costs(self, quantity: str, more: Callable[[str], list[str]] | None = None) -> list[str]:
        """A table of what a call takes, a column a provider, and perhaps ``more`` columns."""
        rows = [["case", *self.providers, *(["ours, GB/s"] if more else [])]]
        for case in self.cases:
            timings = (self.timing(case, name) for name in self.providers)
            found = (getattr(timing, quantity) if timing else None for timing in timings)
            texts = ("-" if value is None else f"{value:.1f}" if more else f"{value:.0f}" for value in found)
            rows.append([case, *texts, *(more(case) if more else [])])
        return records.table(rows, left=1)


def _peak(timing: Timing) -> float:
    return timing.peak_mib or 0.0


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" + ("<" if value < 1 else " ")

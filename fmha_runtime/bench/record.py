# SPDX-License-Identifier: Apache-2.0
"""What a benchmark measured: the JSON record, and the comparison with each peer read from it.

Needs neither torch nor a GPU: tables and plots are made from recorded files.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import records

SCHEMA = 1
OURS = "ours"


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
        wanted = (case, provider)
        return next((t.tflops for t in self.cells if (t.case, t.provider) == wanted), None)

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


def _peak(timing: Timing) -> float:
    return timing.peak_mib or 0.0


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" + ("<" if value < 1 else " ")

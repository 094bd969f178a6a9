# SPDX-License-Identifier: Apache-2.0
"""What a tuning run found: which tiles a kernel can have, how fast each is, which one to take.

Needs neither torch nor a GPU: tables are made from recorded files.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import records

SCHEMA = 1
OK = "ok"
WORDS = (OK, "not built", "wrong", "hung", "fault", "not run")


@dataclass(frozen=True)
class Outcome:
    """One variant of a kernel.

    ``state`` is one of ``WORDS``; ``reason`` says why it is not "ok". Sizes are bytes; ``tflops`` is by cell, of the
    cells where it was timed.
    """

    variant: str
    state: str = OK
    reason: str = ""
    registers: int | None = None
    spill_bytes: int | None = None
    smem_bytes: int | None = None
    tflops: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        facts = f"{self.registers} registers, {self.spill_bytes} bytes of spills"
        return f"{self.variant}  {facts if self.state == OK else f'{self.state}: {_line(self.reason)}'}"


@dataclass(frozen=True)
class Tuned:
    """All variants of one kernel, measured in one process, taking turns.

    ``catalogue`` is the variant that the catalogue has; ``peers`` are TFLOP/s by peer and cell.
    """

    kernel: str
    code: str
    catalogue: str
    cells: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    peers: dict[str, dict[str, float]] = field(default_factory=dict)

    def norm(self) -> dict[str, float]:
        """What a cell's speeds are divided by: cuDNN's where it ran in all, else the catalogue's tile, else 1."""
        own = next((o.tflops for o in self.outcomes if o.variant == self.catalogue and o.state == OK), {})
        for speeds_of in (self.peers.get("cudnn", {}), own):
            if all(speeds_of.get(cell) for cell in self.cells):
                return speeds_of
        return dict.fromkeys(self.cells, 1.0)

    def score(self, outcome: Outcome) -> float | None:
        """Geometric mean of a variant's speeds over ``norm``; None unless it is right and was timed in every cell."""
        if outcome.state != OK or not self.cells or not all(outcome.tflops.get(cell) for cell in self.cells):
            return None
        norm = self.norm()
        return statistics.geometric_mean(outcome.tflops[c] / norm[c] for c in self.cells)

    @property
    def choice(self) -> Outcome | None:
        """The fastest of the right ones; the catalogue's among equals."""
        scored = [(s, o.variant == self.catalogue, o) for o in self.outcomes if (s := self.score(o)) is not None]
        return max(scored, key=lambda item: item[:2])[2] if scored else None

    def lines(self) -> list[str]:
        """The table of ``fmha tune``: the best first, then those that are out of the running."""
        scored = sorted(((self.score(o) or 0.0, o) for o in self.outcomes), key=lambda item: -item[0])
        rows = [["", "tile", *(_short(cell) for cell in self.cells), "score", "regs", "spills", "smem"]]
        for name, theirs in self.peers.items():
            rows.append(["", name, *(records.speed(theirs.get(cell)) for cell in self.cells), "", "", "", ""])
        chosen = self.choice
        for score, o in scored:
            if o.state != OK:
                continue
            mark = ("*" if o is chosen else " ") + ("c" if o.variant == self.catalogue else " ")
            speeds = [records.speed(o.tflops.get(cell)) for cell in self.cells]
            facts = ["" if x is None else str(x) for x in (o.registers, o.spill_bytes, o.smem_bytes)]
            rows.append([mark, o.variant, *speeds, f"{score:.3f}" if score else "-", *facts])
        lines = [self.kernel, *records.table(rows, left=2)]
        lines += [f"   {o.variant}: {o.state}: {_line(o.reason)}" for o in self.outcomes if o.state != OK]
        if chosen is not None:
            lines.append(f"choice    {chosen.variant}  (* in the table; c is the catalogue's, {self.catalogue})")
        return lines


@dataclass(frozen=True)
class TuneRecord:
    """Everything one ``fmha tune`` found."""

    meta: dict[str, Any]
    kernels: tuple[Tuned, ...]

    def save(self, path: Path) -> None:
        """Write the record as JSON, one variant per line."""
        parts = []
        for tuned in self.kernels:
            chosen = tuned.choice
            head = {
                "kernel": tuned.kernel,
                "code": tuned.code,
                "catalogue": tuned.catalogue,
                "choice": chosen.variant if chosen else None,
                "cells": list(tuned.cells),
                "peers": tuned.peers,
            }
            rows = ",\n".join(map(records.row, tuned.outcomes))
            parts.append(f'{json.dumps(head)[:-1]}, "outcomes": [\n{rows}\n ]}}')
        records.save(path, SCHEMA, self.meta, kernels=parts)

    @classmethod
    def load(cls, path: Path) -> TuneRecord:
        """The record in a file.

        Raises:
            ArtifactError: the file is missing or is no record of this schema.
        """
        return records.load(path, SCHEMA, cls._read, kind="tuning record", command="fmha tune --json")

    @classmethod
    def _read(cls, data: dict[str, Any]) -> TuneRecord:
        kernels = []
        for item in data["kernels"]:
            item.pop("choice")  # follows from the rest
            kernels.append(records.parsed(Tuned, item))
        return cls(dict(data["meta"]), tuple(kernels))

    def choices(self) -> dict[str, str]:
        """Kernel -> the variant to take, where something was right and timed."""
        return {t.kernel: t.choice.variant for t in self.kernels if t.choice is not None}


def _short(cell: str) -> str:
    """bf16_d64_s512_c -> 512 c: the kernel says the rest."""
    words = cell.split("_")
    return " ".join([words[2].removeprefix("s"), *words[3:]]) if len(words) > 3 else cell


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:200]}..."

# SPDX-License-Identifier: Apache-2.0
"""What records have in common: their origin, the file that they are written to, the table that they are printed as."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from . import config
from .errors import ArtifactError

_Record = TypeVar("_Record")


def now() -> str:
    """The present moment, ISO 8601, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit() -> str | None:
    """The checkout's current commit: FMHA_COMMIT, for a copy without ``.git``, else read there; None if neither is."""
    named = config.commit()
    if named:
        return named
    root = Path(__file__).resolve().parent.parent / ".git"
    try:
        if root.is_file():  # a worktree: the file names its folder
            root = Path(root.read_text().removeprefix("gitdir: ").strip())
        head = (root / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        ref = head[len("ref: ") :]
        common = root / "commondir"
        base = (root / common.read_text().strip()) if common.is_file() else root
        loose = base / ref
        if loose.is_file():
            return loose.read_text().strip()
        packed = (base / "packed-refs").read_text().splitlines()
        return next(line.split()[0] for line in packed if line.endswith(f" {ref}"))
    except (OSError, StopIteration):
        return None


def row(item: Any) -> str:
    """A dataclass as one line of a record's file, so that a diff of two files shows what differs."""
    return f"  {json.dumps(asdict(item))}"


def save(path: Path, schema: int, meta: dict[str, Any], **sections: Iterable[str]) -> None:
    """Write a record as JSON: schema, meta, then each section as a list of items that are JSON already."""
    parts = [f'"schema": {schema}', f'"meta": {json.dumps(meta, indent=1)}']
    for name, items in sections.items():
        lines = ",\n".join(items)
        parts.append(f'"{name}": [\n{lines}\n]')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


def load(path: Path, schema: int, read: Callable[[dict[str, Any]], _Record], *, kind: str, command: str) -> _Record:
    """The record in a file: what ``read`` makes of its JSON.

    Args:
        path: the file.
        schema: the only one that ``read`` understands.
        read: raises ValueError, KeyError or TypeError where the JSON is not what it expects.
        kind: what the file should be, for the message.
        command: what writes one, for the message.

    Raises:
        ArtifactError: the file is missing or is no record of this schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != schema:
            raise ValueError(f"schema {data['schema']!r}, expected {schema}")
        return read(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is not a {kind} ({error}); write one with {command}", path=path) from error


def table(rows: Sequence[Sequence[str]], left: int | None = None) -> list[str]:
    """Rows as lines with aligned columns; the last column is as long as it likes.

    The first ``left`` columns are aligned to the left, the others to the right; by default all to the left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if left is None or i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def speed(tflops: float | None) -> str:
    """TFLOP/s as tables show them; a dash where nothing was measured."""
    return "-" if tflops is None else f"{tflops:.0f}"

# SPDX-License-Identifier: Apache-2.0
"""What records have in common: their origin, their file, the types that it is read back by, the printed table."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from . import config
from .errors import ArtifactError

_Record = TypeVar("_Record")
_Kind = TypeVar("_Kind")

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a file that is no record may raise."""


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
    return f"  {json.dumps(dataclasses.asdict(item))}"


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
        read: raises one of UNREADABLE where the JSON is not what it expects.
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
    except UNREADABLE as error:
        raise ArtifactError(f"{path} is not a {kind} ({error}); write one with {command}", path=path) from error


def parsed(kind: type[_Kind], item: Any) -> _Kind:
    """The dataclass of a record from the JSON object that ``asdict`` gave.

    Raises:
        ValueError: it is no object, a field is missing, unknown or of another type, or a number is negative or not
            finite: nothing that is counted or measured is.
    """
    if not isinstance(item, dict):
        raise ValueError(f"a {kind.__name__} is {item!r}, not an object")
    wanted, required = _fields(kind)  # type: ignore[arg-type]
    if missing := sorted(required - set(item)):
        raise ValueError(f"a {kind.__name__} lacks {', '.join(missing)}")
    if unknown := sorted(set(item) - set(wanted)):
        raise ValueError(f"a {kind.__name__} has unknown fields: {', '.join(map(str, unknown))}")
    return kind(**{name: _value(wanted[name], value, name) for name, value in item.items()})


@cache
def _fields(kind: Any) -> tuple[dict[str, Any], set[str]]:
    """The types of a dataclass's fields, and which fields have no default."""
    required = {
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    return get_type_hints(kind), required


def _value(kind: Any, value: Any, name: str) -> Any:
    """A JSON value as a field's type has it."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _value(inner[0], value, name)
    if origin is dict and isinstance(value, dict):
        return {key: _value(inner[1], each, f"{name}[{key}]") for key, each in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(_value(inner[0], each, name) for each in value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return parsed(kind, value)
    if kind is str and isinstance(value, str):
        return value
    if kind in (int, float) and type(value) in (int, kind) and math.isfinite(value) and value >= 0:
        return value
    words = {int: "a count", float: "a number from 0", str: "text"}
    raise ValueError(f"{name} is {value!r}, not {words.get(kind, 'what belongs there')}")


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

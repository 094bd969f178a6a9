# SPDX-License-Identifier: Apache-2.0
"""The verification ledger ``verified.json``: which kernel was proven, from which source, where.

One record per kernel and way of running it, one record per line, written by
``fmha verify --record`` and by nothing else. A record speaks for the source hash and the tile that
it names; for any other it counts as none.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from . import catalog, config, sources
from .errors import ArtifactError
from .spec import KernelSpec

SCHEMA = 1
HOW = ("cubin", "ptx", "emulator")
"""How a kernel was run: cubin, PTX through the driver's JIT, or source on the CPU emulator."""


@dataclass(frozen=True)
class Record:
    """One line of the ledger."""

    name: str
    how: str  # one of HOW
    source_hash: str
    tile: str
    sha256: str | None  # of the cubin; None for ptx and emulator
    nvcc: str | None  # None for the emulator
    device: str
    capability: str | None  # "9.0"; None for the emulator
    driver: str | None
    cases: int  # that ran and passed
    skipped: int
    worst_rel_l2: float
    worst_ratio: float  # of the largest error to what the number rule allows
    date: str  # ISO 8601, UTC
    commit: str | None

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU ran it."""
        return self.how != "emulator"


@dataclass(frozen=True)
class Status:
    """What the ledger says about one kernel as its source is now.

    ``word`` speaks of GPU records only: "verified", "stale" (records exist, of another source or
    tile) or "unverified". ``emulated`` says whether a current emulator record exists besides.
    """

    word: str
    reason: str
    record: Record | None
    emulated: bool

    def __str__(self) -> str:
        return self.word


def path() -> Path:
    """Where the ledger of this installation lies; the file may not exist."""
    return config.package_root() / "verified.json"


def load(file: Path | None = None) -> tuple[Record, ...]:
    """The records, sorted by name and way; empty when there is no file.

    Raises:
        ArtifactError: the file is not a ledger of this schema.
    """
    file = file or path()
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    try:
        ledger = json.loads(text)
        if ledger["schema"] != SCHEMA:
            raise ValueError(f"schema {ledger['schema']!r}, expected {SCHEMA}")
        records = [_record(item) for item in ledger["records"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{file} is not a verification ledger ({error}); restore it from version control, or "
            "delete it and run fmha verify --record",
            path=file,
        ) from error
    return tuple(sorted(records, key=_key))


def record(new: Iterable[Record], file: Path | None = None) -> None:
    """Add records, each in place of the one of the same kernel and way, in one atomic step.

    Raises:
        ArtifactError: the present file is not a ledger; it is left as it is.
    """
    file = file or path()
    merged = {_key(r): r for r in (*load(file), *new)}
    lines = ",\n".join(f"  {json.dumps(asdict(merged[key]))}" for key in sorted(merged))
    text = f'{{"schema": {SCHEMA}, "records": [\n{lines}\n]}}\n'
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=file.parent, prefix=".verified-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(draft, 0o644)
        os.replace(draft, file)
    except BaseException:
        os.unlink(draft)
        raise


def status(spec: KernelSpec, records: Iterable[Record] | None = None) -> Status:
    """Whether a kernel, with the source and the tile it has now, was proven on a GPU.

    A record of its cubin is preferred to one of its PTX. ``records`` saves re-reading the file.
    """
    mine = [r for r in (load() if records is None else records) if r.name == spec.name]
    source_hash, tile = sources.source_hash(spec), str(catalog.tile(spec))
    current = [r for r in mine if (r.source_hash, r.tile) == (source_hash, tile)]
    emulated = any(not r.on_gpu for r in current)
    on_gpu = sorted((r for r in current if r.on_gpu), key=lambda r: HOW.index(r.how))
    if on_gpu:
        best = on_gpu[0]
        reason = f"{best.how} on {best.device}, {best.cases} cases, {best.date[:10]}"
        return Status("verified", reason, best, emulated)
    old = sorted((r for r in mine if r.on_gpu), key=lambda r: HOW.index(r.how))
    if not old:
        return Status("unverified", "no GPU has run it yet", None, emulated)
    last = old[0]
    if last.tile != tile:
        reason = f"the record is of tile {last.tile}, the catalogue now says {tile}"
    else:
        reason = f"the record is of source {last.source_hash[:12]}, the source is now {source_hash[:12]}"
    return Status("stale", reason, last, emulated)


def commit() -> str | None:
    """The checkout's current commit: FMHA_COMMIT, for a copy without ``.git``, else read there; None if neither is."""
    named = config.commit()
    if named:
        return named
    root = Path(__file__).resolve().parent.parent / ".git"
    try:
        head = (root / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        ref = head[len("ref: ") :]
        loose = root / ref
        if loose.is_file():
            return loose.read_text().strip()
        packed = (root / "packed-refs").read_text().splitlines()
        return next(line.split()[0] for line in packed if line.endswith(f" {ref}"))
    except (OSError, StopIteration):
        return None


def _key(r: Record) -> tuple[str, int]:
    return r.name, HOW.index(r.how)


def _record(item: dict[str, Any]) -> Record:
    wanted = {field.name for field in fields(Record)}
    if set(item) != wanted:
        raise ValueError(f"fields {sorted(set(item) ^ wanted)} are missing or unknown")
    if item["how"] not in HOW:
        raise ValueError(f"how={item['how']!r}, expected one of {HOW}")
    return Record(**item)

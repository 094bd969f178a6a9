# SPDX-License-Identifier: Apache-2.0
"""The verification ledger ``verified/OP_ARCH.json``: which bytes were proven, by which cases, where.

One record per kernel and way of running it, one record a line, written by ``fmha verify --record`` and by nothing
else. A record is bound to what ran, its ``evidence``: the SHA-256 of the cubin or of the PTX; for the CPU emulator
``sources.emulated_code``. "Verified" is said of those very bytes and of no others.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import config
from ..errors import ArtifactError
from ..records import UNREADABLE, parsed
from . import catalog, files, manifest, sources
from .manifest import KernelRow
from .spec import Arch, KernelSpec

SCHEMA = 2
FOLDER = "verified"
HOW = ("cubin", "ptx", "emulator")
"""How a kernel was run: cubin, PTX through the driver's JIT, or source on the CPU emulator."""
MIGRATED = "migrated"
"""In place of ``suite``: the record was made before suites were recorded."""
WORDS = ("verified", "same code", "other bytes", "stale", "unverified")
"""What a Status may say, best first."""

_SIBLINGS = (Arch.SM86, Arch.SM120)  # run what sm89 runs, where tile and code are the same


@dataclass(frozen=True)
class Record:
    """One line of the ledger."""

    name: str
    how: str  # one of HOW
    evidence: str  # of what ran; empty: not known, proves nothing
    code: str  # sources.code
    tile: str
    suite: str  # hash of the cases and limits, or MIGRATED
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
    """What the ledger says about one kernel and the bytes at hand.

    ``word`` is one of WORDS and speaks of GPU records only: "verified", these bytes passed; "same code", the sm89
    kernel of equal tile and code did; "other bytes", a build of this code did, by another compiler; "stale", records
    exist, of other code or another tile. ``emulated`` says whether a current emulator record exists besides.
    """

    word: str
    reason: str
    record: Record | None
    emulated: bool

    def __str__(self) -> str:
        return self.word


def folder() -> Path:
    """Where the ledger of this installation lies; it may not exist."""
    return config.package_root() / FOLDER


@dataclass(frozen=True)
class Ledger:
    """The records, by kernel; and the rows of the packaged manifest, for who has read them already (None: has not)."""

    records: dict[str, tuple[Record, ...]] = field(default_factory=dict)
    packaged: dict[KernelSpec, KernelRow] | None = None

    @cached_property
    def locked(self) -> dict[KernelSpec, KernelRow]:
        """The rows of the packaged manifest. They tie bytes to the present code: that of a record may be older, where
        an edit changed the code and not one byte.
        """
        if self.packaged is not None:
            return self.packaged
        return {row.spec: row for row in manifest.read(config.package_root())[0]}

    @classmethod
    def load(cls, root: Path | None = None, packaged: dict[KernelSpec, KernelRow] | None = None) -> Ledger:
        """Every record of a ledger's folder; empty when there is none.

        Raises:
            ArtifactError: a file is not a table of this schema.
        """
        found: dict[str, tuple[Record, ...]] = {}
        for path in sorted((root or folder()).glob("*.json")):
            for record in _read(path):
                found[record.name] = (*found.get(record.name, ()), record)
        return cls(found, packaged)

    def __iter__(self) -> Iterator[Record]:
        return (record for records in self.records.values() for record in records)

    def status(self, spec: KernelSpec, row: KernelRow | None) -> Status:
        """What was proven of a kernel's present code and of the bytes that ``row`` describes.

        Args:
            row: the cubin at hand, or the packaged manifest's row of one that is to be built; None: there is neither.
        """
        tile = catalog.tile(spec)
        code, cut = sources.code(spec, tile), str(tile)
        mine = self.records.get(spec.name, ())
        emulated = any(r.evidence == sources.emulated_code(spec, tile) for r in mine if not r.on_gpu)
        on_gpu = sorted((r for r in mine if r.on_gpu), key=lambda r: HOW.index(r.how))
        if row is not None and row.code == code:
            proven = {"cubin": row.sha256, "ptx": row.ptx_sha256}
            for record in on_gpu:
                if record.evidence == proven[record.how]:
                    return Status("verified", _facts(record), record, emulated)
        for record in on_gpu:
            if self._of_code(record, spec, code, cut):
                other = f"nvcc {row.nvcc}" if row is not None else "nothing is built"
                reason = f"same code, other bytes: not the verified {record.how} (nvcc {record.nvcc}; here {other})"
                return Status("other bytes", reason, record, emulated)
        if spec.arch in _SIBLINGS:
            sibling = replace(spec, arch=Arch.SM89)
            for record in self.records.get(sibling.name, ()):
                if record.on_gpu and self._of_code(record, sibling, code, cut):
                    reason = f"same tile and code as {sibling.name}: {_facts(record)}"
                    return Status("same code", reason, record, emulated)
        if not on_gpu:
            return Status("unverified", "no GPU has run it yet", None, emulated)
        last = on_gpu[0]
        if last.tile != cut:
            reason = f"the record is of tile {last.tile}, the catalogue now says {cut}"
        else:
            reason = f"the record is of code {last.code[:12]}, the code is now {code[:12]}"
        return Status("stale", reason, last, emulated)

    def _of_code(self, record: Record, spec: KernelSpec, code: str, tile: str) -> bool:
        """Whether a GPU record is of this code and tile: by itself, or because the manifest has its bytes for them."""
        if (record.code, record.tile) == (code, tile):
            return True
        lock = self.locked.get(spec)
        if lock is None or (lock.code, str(lock.tile)) != (code, tile):
            return False
        return record.evidence == {"cubin": lock.sha256, "ptx": lock.ptx_sha256}[record.how]


def record(new: Iterable[Record], root: Path | None = None) -> None:
    """Add records, each in place of the one of the same kernel and way; each table in one atomic step.

    Raises:
        ArtifactError: a present file is not a ledger; it is left as it is.
    """
    root = root or folder()
    tables: dict[Path, list[Record]] = {}
    for one in new:
        spec = KernelSpec.parse(one.name)
        tables.setdefault(root / f"{spec.op.value}_{spec.arch.value}.json", []).append(one)
    for path, records in tables.items():
        merged = {_key(r): r for r in (*_read(path), *records)}
        lines = ",\n".join(f"  {json.dumps(asdict(merged[key]))}" for key in sorted(merged))
        files.replace_file(path, f'{{"schema": {SCHEMA}, "records": [\n{lines}\n]}}\n'.encode())


def _facts(record: Record) -> str:
    suite = ", suite not recorded" if record.suite == MIGRATED else ""
    return f"{record.how} on {record.device}, {record.cases} cases{suite}, {record.date[:10]}"


def _read(path: Path) -> list[Record]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["schema"] != SCHEMA:
            raise ValueError(f"schema {table['schema']!r}, expected {SCHEMA}")
        return [_record(item) for item in table["records"]]
    except FileNotFoundError:
        return []
    except UNREADABLE as error:
        raise ArtifactError(
            f"{path} is not a verification ledger ({error}); restore it from version control, or "
            "delete it and run fmha verify --record",
            path=path,
        ) from error


def _key(r: Record) -> tuple[str, int]:
    return r.name, HOW.index(r.how)


def _record(item: Any) -> Record:
    found = parsed(Record, item)
    if found.how not in HOW:
        raise ValueError(f"how={found.how!r}, expected one of {HOW}")
    # What follows is true of every verification that passed; a record of anything else proves nothing.
    for name, value, other in (
        ("evidence", found.evidence, ""), ("code", found.code, None), ("suite", found.suite, MIGRATED),
    ):  # fmt: skip
        if value != other and not files.is_sha256(value):
            raise ValueError(f"{name}={value!r} of {found.name}, expected a SHA-256 in hex")
    if found.cases < 1 or not 0 <= found.worst_ratio <= 1 or not math.isfinite(found.worst_rel_l2):
        raise ValueError(
            f"{found.cases} cases, worst ratio {found.worst_ratio}, relative L2 {found.worst_rel_l2} of {found.name}: "
            "no such verification passes"
        )
    if found.on_gpu and not re.fullmatch(r"\d+\.\d", found.capability or ""):
        raise ValueError(f"capability={found.capability!r} of {found.name}, expected one like '9.0'")
    datetime.fromisoformat(found.date)
    return found

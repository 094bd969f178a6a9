# SPDX-License-Identifier: Apache-2.0
"""The metadata tables: what was built, from what, and how to recognise it.

Two layouts of a root. A *packaged* root has one table an op and arch, ``manifest/OP_ARCH.json`` (schema number, then
one row a line, sorted by name), and ``ARCH/NAME.cubin``; the committed tables work as lock files even where no cubin
lies beside them. A *cache* root has one folder per build, ``NAME-KEY/{NAME.cubin,row.json}``, so that processes never
share a file.

This file reads and writes rows; store.py searches roots and judges what is found.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, InputError
from . import files
from .spec import Arch, KernelSpec, Op
from .tile import Tile

SCHEMA = 2
FOLDER = "manifest"
ROW = "row.json"
PACKAGE = "package"
"""``root`` of the rows that this release has: what they say counts (store.contradicts)."""
ENTRY = re.compile(r"(fmha_\w+)-[0-9a-f]{12}")
"""The name of a build's folder in a cache: the kernel's, and the key of what was compiled."""
_OLD = "manifest.json"  # of schema 1: one table for everything

_NUMBERS = ("threads", "smem_bytes", "registers", "spill_bytes", "abi", "params_size", "size")
_HASHES = ("sha256", "ptx_sha256", "code")
_TEXTS = (*_HASHES, "nvcc", "flags")


@dataclass(frozen=True)
class KernelRow:
    """One cubin: the kernel, how it was cut and built, and how to recognise it.

    Sizes are bytes; ``spill_bytes`` is stores plus loads; ``nvcc`` its version; ``code`` says what was compiled
    (sources.code), ``sha256`` and ``ptx_sha256`` what came out: the cubin, and the PTX on the way to it. ``path`` is
    None when the row's cubin is not there; ``root`` says which of FMHA_CUBIN_DIR, cache and package the row is from.
    ``text`` (sources.text) is kept in cache entries only: where it is that of the present sources, to the letter, their
    code need not be worked out.
    """

    spec: KernelSpec
    tile: Tile
    threads: int
    smem_bytes: int
    registers: int
    spill_bytes: int
    abi: int
    params_size: int
    size: int
    sha256: str
    ptx_sha256: str
    code: str
    nvcc: str
    flags: str
    path: Path | None = None
    root: str = ""
    text: str = ""

    def to_json(self) -> dict[str, Any]:
        """The row as it is stored: everything but where it lies and ``text``."""
        facts = {name: getattr(self, name) for name in (*_NUMBERS, *_TEXTS)}
        return {"name": self.spec.name, "tile": str(self.tile), **facts}

    @classmethod
    def from_json(cls, data: Any, source: Path) -> KernelRow:
        """The row that ``to_json`` wrote into ``source``.

        Raises:
            ArtifactError: a field is missing, has another type or an impossible value.
        """
        try:
            if not isinstance(data, dict):
                raise ValueError("a row is not an object")
            for name in _NUMBERS:
                if type(data[name]) is not int or data[name] < 0:
                    raise ValueError(f"{name} is {data[name]!r}, not a count")
            data = {"text": "", **data}
            for name in ("name", "tile", "text", *_TEXTS):
                if not isinstance(data[name], str):
                    raise ValueError(f"{name} is {data[name]!r}, not text")
            for name in _HASHES:
                if not files.is_sha256(data[name]):
                    raise ValueError(f"{name} is {data[name]!r}, not a SHA-256 in hex")
            facts = {name: data[name] for name in (*_NUMBERS, *_TEXTS)}
            return cls(KernelSpec.parse(data["name"]), Tile.parse(data["tile"]), **facts, text=data["text"])
        except KeyError as error:
            raise _broken(source, f"a row lacks the field {error}") from None
        except (ValueError, InputError) as error:
            raise _broken(source, str(error)) from None


def table(root: Path, op: Op, arch: Arch) -> Path:
    """The file of a packaged root that holds the rows of one op and arch."""
    return root / FOLDER / f"{op.value}_{arch.value}.json"


def read(root: Path, label: str = "") -> tuple[list[KernelRow], list[ArtifactError]]:
    """The rows of every table of a packaged root, none where it has no table; and one error per unusable table."""
    found: list[KernelRow] = []
    broken: list[ArtifactError] = []
    if not (root / FOLDER).is_dir() and (error := _outdated(root)):
        broken.append(error)
    for path in sorted((root / FOLDER).glob("*.json")):
        try:
            found += read_table(path, label)
        except ArtifactError as error:
            broken.append(error)
    return found, broken


def read_table(path: Path, label: str = "") -> list[KernelRow]:
    """The rows of one table; empty when the file does not exist.

    Raises:
        ArtifactError: it is not JSON, of another schema, or holds a row that is impossible or of another table.
    """
    data = _read_json(path)
    if data is None:
        return []
    items = data.get("rows")
    if not isinstance(items, list):
        raise _broken(path, "it has no list of rows")
    result = [KernelRow.from_json(item, path) for item in items]
    if len({row.spec for row in result}) != len(result):
        raise _broken(path, "a kernel has two rows")
    root = path.parent.parent
    for row in result:
        if f"{row.spec.op.value}_{row.spec.arch.value}" != path.stem:
            raise _broken(path, f"{row.spec.name} belongs to another table")
    return [_placed(row, label, f"{root}/{row.spec.arch.value}/{row.spec.name}.cubin") for row in result]


def read_row(root: Path, spec: KernelSpec, label: str = "") -> KernelRow | None:
    """The row of one kernel in a packaged root; None when there is none. Parses one line of one file.

    Raises:
        ArtifactError: the table is of another schema, or the row is not usable.
    """
    path = table(root, spec.op, spec.arch)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        if error := _outdated(root):
            raise error from None
        return None
    except OSError as error:
        raise _broken(path, f"it cannot be read ({error.strerror})") from None
    if not text.startswith(_head().encode() + b"\n"):
        return next((row for row in read_table(path, label) if row.spec == spec), None)
    begin = text.find(f'\n{{"name": "{spec.name}", '.encode())
    if begin < 0:
        return None
    line = text[begin + 1 :].partition(b"\n")[0].rstrip(b",")
    try:
        row = KernelRow.from_json(json.loads(line), path)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"the row of {spec.name} is not JSON ({error})") from None
    return _placed(row, label, f"{root}/{spec.arch.value}/{spec.name}.cubin")


def write(root: Path, rows: Iterable[KernelRow]) -> dict[Path, str]:
    """The text of every table that these rows fill, by path. Nothing is written: see publish.packaged."""
    tables: dict[Path, list[KernelRow]] = {}
    for row in rows:
        tables.setdefault(table(root, row.spec.op, row.spec.arch), []).append(row)
    return {path: table_text(rows) for path, rows in tables.items()}


def table_text(rows: Iterable[KernelRow]) -> str:
    """A table: one row a line, sorted by name, so that a diff after re-tuning reads as a table."""
    lines = [json.dumps(row.to_json()) for row in sorted(rows, key=lambda row: row.spec.name)]
    return f"{_head()}\n" + ",\n".join(lines) + "\n]}\n"


def row_text(row: KernelRow) -> str:
    """``row.json`` of a cache entry."""
    return json.dumps({"schema": SCHEMA, **row.to_json(), "text": row.text}, indent=1) + "\n"


def read_entry(folder: Path, label: str = "cache") -> KernelRow:
    """The row of one cache entry.

    Raises:
        ArtifactError: the entry has no readable row.
    """
    data = _read_json(folder / ROW)
    if data is None:
        raise _broken(folder / ROW, "the file is missing")
    row = KernelRow.from_json(data, folder / ROW)
    if row.spec.name != entry_name(folder / ROW):
        raise _broken(folder / ROW, f"it describes {row.spec.name}")
    return _placed(row, label, f"{folder}/{row.spec.name}.cubin")


def entry_name(path: Path | None) -> str:
    """The kernel that a cache entry's row.json belongs to; empty for a table."""
    return "" if path is None or path.name != ROW else path.parent.name.rpartition("-")[0]


def load_image(row: KernelRow) -> bytes:
    """The cubin of a row, its SHA-256 checked.

    Raises:
        ArtifactError: the file is missing, unreadable, not the one that was built, or for others to write to.
    """
    remedy = f"run `fmha build --force {row.spec.name}`"
    if row.path is None:
        raise ArtifactError(f"the cubin of {row.spec.name} is not there; run `fmha build {row.spec.name}`")
    if row.root != PACKAGE:  # who can write to the package can write to this file, too
        files.check_file(row.path)
    try:
        image = row.path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {row.path} ({error.strerror}); {remedy}", path=row.path) from None
    found = hashlib.sha256(image).hexdigest()
    if found != row.sha256:
        raise ArtifactError(
            f"{row.path} is not the cubin that was built: SHA-256 is {found} "
            f"({len(image)} bytes), the manifest says {row.sha256} "
            f"({row.size} bytes); {remedy}",
            path=row.path,
            expected=row.sha256,
            found=found,
        )
    return image


def _head() -> str:
    return f'{{"schema": {SCHEMA}, "rows": ['


def _outdated(root: Path) -> ArtifactError | None:
    old = root / _OLD
    if not old.is_file():
        return None
    return ArtifactError(
        f"{old} is the one table of an earlier version (schema 1), this one reads {root / FOLDER}/OP_ARCH.json; "
        f"remove the file and run `fmha build --into {root}`",
        path=old,
        expected=SCHEMA,
        found=1,
    )


def _broken(path: Path, what: str) -> ArtifactError:
    remedy = "restore it from the release" if path.name != ROW else f"remove {path.parent} and build again"
    return ArtifactError(f"{path} is not usable: {what}; {remedy}", path=path)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _broken(path, f"it cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"it is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise _broken(path, "it is not a JSON object")
    if data.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{path} has schema {data.get('schema')!r}, "
            f"this version of fmha-runtime reads schema {SCHEMA}; "
            "use the version that wrote it, or remove the file and build again",
            path=path,
            expected=SCHEMA,
            found=data.get("schema"),
        )
    return data


def _placed(row: KernelRow, label: str, cubin: str) -> KernelRow:
    return replace(row, root=label, path=Path(cubin) if os.path.isfile(cubin) else None)

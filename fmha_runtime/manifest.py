# SPDX-License-Identifier: Apache-2.0
"""The metadata table: what was built, from what, and whether it may still be used.

Two layouts of a root. A *packaged* root has one ``manifest.json`` (schema number, one row per line,
sorted by name) and ``ARCH/NAME.cubin``; the committed ``cubins/manifest.json`` works as a lock file
even where no cubin lies beside it. A *cache* root has one folder per build,
``NAME-KEY/{NAME.cubin,row.json}``, so that processes never share a file.

Nothing here runs a compiler or opens a GPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import catalog, config, sources
from .catalog import Tile
from .errors import ArtifactError, InputError
from .spec import KernelSpec

SCHEMA = 1
MANIFEST = "manifest.json"
ROW = "row.json"

_NUMBERS = ("threads", "smem_bytes", "registers", "spill_bytes", "abi", "params_size", "size")
_TEXTS = ("sha256", "source_hash", "nvcc", "flags")


@dataclass(frozen=True)
class KernelRow:
    """One cubin: the kernel, how it was cut and built, and how to recognise it.

    Sizes are bytes; ``spill_bytes`` is stores plus loads; ``nvcc`` its version. ``path`` is None
    when the row's cubin is not there; ``root`` says which of FMHA_CUBIN_DIR, cache and package the
    row is from.
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
    source_hash: str
    nvcc: str
    flags: str
    path: Path | None = None
    root: str = ""

    def to_json(self) -> dict[str, Any]:
        """The row as it is stored: everything but where it lies."""
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
            for name in ("name", "tile", *_TEXTS):
                if not isinstance(data[name], str):
                    raise ValueError(f"{name} is {data[name]!r}, not text")
            facts = {name: data[name] for name in (*_NUMBERS, *_TEXTS)}
            return cls(KernelSpec.parse(data["name"]), Tile.parse(data["tile"]), **facts)
        except KeyError as error:
            raise _broken(source, f"a row lacks the field {error}") from None
        except (ValueError, InputError) as error:
            raise _broken(source, str(error)) from None


@dataclass(frozen=True)
class State:
    """What a kernel's cubin is: ``ready``, ``stale``, ``not built`` or ``broken``, why, and the row
    if there is one.
    """

    word: str
    reason: str
    row: KernelRow | None = None


def roots() -> tuple[tuple[str, Path], ...]:
    """The (label, folder) pairs that are searched, in order."""
    extra = config.cubin_dir()
    first = (("FMHA_CUBIN_DIR", extra),) if extra else ()
    return (*first, ("cache", config.cache_dir()), ("package", config.package_root()))


def rows() -> tuple[list[KernelRow], list[ArtifactError]]:
    """Every row of every root in search order, whatever its state, and what was unreadable."""
    found: list[KernelRow] = []
    broken: list[ArtifactError] = []
    for label, root in roots():
        _collect(_scan(label, root), found, broken)
    return found, broken


def find_tile(spec: KernelSpec, tile: Tile) -> KernelRow | None:
    """The first row of this tile that is current but for the tile and whose cubin is there; None when there is none."""
    present = _Present.of(spec)
    for label, root in roots():
        for row in _scan(label, root, spec):
            if isinstance(row, KernelRow) and row.tile == tile and row.path and not present.objection(row, tile):
                return row
    return None


def find(spec: KernelSpec) -> KernelRow | None:
    """The first row of the search order that is current and whose cubin is there; None when nothing
    was built.

    Raises:
        ArtifactError: no row serves, and one that might have is broken.
    """
    state_ = state(spec)
    if state_.word == "broken":
        raise ArtifactError(state_.reason, path=state_.row.path if state_.row else None)
    return state_.row if state_.word == "ready" else None


def state(spec: KernelSpec) -> State:
    """What the cubin of one kernel is. Looks only at this kernel's entries; reads no cubin (see
    load_image).
    """
    found: list[KernelRow] = []
    broken: list[ArtifactError] = []
    for label, root in roots():
        _collect(_scan(label, root, spec), found, broken)
    return _judge(spec, found, broken, _Present.of(spec))


def states(specs: Sequence[KernelSpec]) -> list[State]:
    """The state of many kernels, each root and each header read once."""
    found, broken = rows()
    present: dict[str, str] = {}
    abi = sources.abi()
    result = []
    for spec in specs:
        header = sources.header(spec)
        if header not in present:
            present[header] = sources.source_hash(spec)
        mine = [row for row in found if row.spec == spec]
        concerns = [e for e in broken if not _entry_name(e.path) or _entry_name(e.path) == spec.name]
        result.append(_judge(spec, mine, concerns, _Present(abi, present[header])))
    return result


def locked(spec: KernelSpec) -> KernelRow | None:
    """The packaged manifest's row of this kernel, whether or not its cubin is there."""
    root = config.package_root()
    return next((row for row in read_manifest(root, "package") if row.spec == spec), None)


def why_stale(row: KernelRow) -> str:
    """What makes a row unusable with the present catalogue and sources; empty when it is
    current.
    """
    return _Present.of(row.spec).objection(row)


def load_image(row: KernelRow) -> bytes:
    """The cubin of a row, its SHA-256 checked.

    Raises:
        ArtifactError: the file is missing, unreadable or not the one that was built.
    """
    if row.path is None:
        raise ArtifactError(f"the cubin of {row.spec.name} is not there; {_remedy(row.spec)}")
    try:
        image = row.path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {row.path} ({error.strerror}); {_remedy(row.spec)}", path=row.path) from None
    found = hashlib.sha256(image).hexdigest()
    if found != row.sha256:
        raise ArtifactError(
            f"{row.path} is not the cubin that was built: SHA-256 is {found} "
            f"({len(image)} bytes), the manifest says {row.sha256} "
            f"({row.size} bytes); {_remedy(row.spec)}",
            path=row.path,
            expected=row.sha256,
            found=found,
        )
    return image


def read_manifest(root: Path, label: str = "") -> list[KernelRow]:
    """The rows of a packaged root; empty when it has no manifest.

    Raises:
        ArtifactError: the manifest is not JSON, of another schema, or holds an impossible row.
    """
    path = root / MANIFEST
    data = _read_json(path)
    if data is None:
        return []
    items = data.get("rows")
    if not isinstance(items, list):
        raise _broken(path, "it has no list of rows")
    result = [KernelRow.from_json(item, path) for item in items]
    if len({row.spec for row in result}) != len(result):
        raise _broken(path, "a kernel has two rows")
    return [_placed(row, label, root / row.spec.arch.value / f"{row.spec.name}.cubin") for row in result]


def manifest_text(rows: Iterable[KernelRow]) -> str:
    """``manifest.json``: one row per line, sorted by name, so that a diff after re-tuning reads as
    a table.
    """
    lines = [json.dumps(row.to_json()) for row in sorted(rows, key=lambda row: row.spec.name)]
    return f'{{"schema": {SCHEMA}, "rows": [\n' + ",\n".join(lines) + "\n]}\n"


def row_text(row: KernelRow) -> str:
    """``row.json`` of a cache entry."""
    return json.dumps({"schema": SCHEMA, **row.to_json()}, indent=1) + "\n"


def read_entry(folder: Path, label: str = "cache") -> KernelRow:
    """The row of one cache entry.

    Raises:
        ArtifactError: the entry has no readable row.
    """
    data = _read_json(folder / ROW)
    if data is None:
        raise _broken(folder / ROW, "the file is missing")
    row = KernelRow.from_json(data, folder / ROW)
    if row.spec.name != _entry_name(folder / ROW):
        raise _broken(folder / ROW, f"it describes {row.spec.name}")
    return _placed(row, label, folder / f"{row.spec.name}.cubin")


@dataclass(frozen=True)
class _Present:
    """What a row must agree with to be current."""

    abi: int
    source_hash: str

    @classmethod
    def of(cls, spec: KernelSpec) -> _Present:
        return cls(sources.abi(), sources.source_hash(spec))

    def objection(self, row: KernelRow, forced: Tile | None = None) -> str:
        if not catalog.exists(row.spec):
            return "the catalogue no longer has this kernel"
        tile = forced or catalog.tile(row.spec)
        if row.abi != self.abi:
            return f"built for ABI {row.abi}, this runtime speaks {self.abi}"
        if row.tile != tile:
            return f"built with tile {row.tile}, the catalogue says {tile}"
        if row.source_hash != self.source_hash:
            was, now = row.source_hash[:12], self.source_hash[:12]
            return f"built from sources {was}, present ones are {now}"
        if row.flags != " ".join(sources.flags(row.spec.arch)):
            return "built with other compiler flags"
        allowed = catalog.allowed_spill_bytes(row.spec)
        if forced is None and row.spill_bytes > allowed:  # built as an experiment
            return f"built with {row.spill_bytes} bytes of spills, the catalogue allows {allowed}"
        return ""


def _judge(spec: KernelSpec, found: list[KernelRow], broken: list[ArtifactError], present: _Present) -> State:
    poor: list[State] = []
    for row in found:
        objection = present.objection(row)
        if row.path is None:
            # A lock entry, perhaps an outdated one; nothing stale could be loaded.
            reason = f"locked by the {row.root} manifest, cubin absent; {_remedy(spec)}"
            poor.append(State("not built", reason, row))
        elif objection:
            poor.append(State("stale", f"{objection}; {_remedy(spec)}", row))
        elif (size := row.path.stat().st_size) != row.size:
            reason = f"{row.path} has {size} bytes, its row says {row.size}; {_remedy(spec)}"
            poor.append(State("broken", reason, row))
        else:
            return State("ready", f"from {row.root}", row)
    poor += [State("broken", str(error)) for error in broken]
    poor.append(State("not built", _remedy(spec)))
    # What needs attention first: a damaged file must not hide behind a row that is merely old.
    return min(poor, key=lambda state: ("broken", "stale", "not built").index(state.word))


def _remedy(spec: KernelSpec) -> str:
    return f"run `fmha build {spec.name}`"


def _broken(path: Path, what: str) -> ArtifactError:
    remedy = "restore it from the release" if path.name == MANIFEST else f"remove {path.parent} and build again"
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


def _placed(row: KernelRow, label: str, cubin: Path) -> KernelRow:
    return replace(row, root=label, path=cubin if cubin.is_file() else None)


def _entry_name(path: Path) -> str:
    """The kernel that a cache entry's row.json belongs to; empty for a manifest."""
    return "" if path.name != ROW else path.parent.name.rpartition("-")[0]


def _scan(label: str, root: Path, spec: KernelSpec | None = None) -> Iterator[KernelRow | ArtifactError]:
    """Rows of one root, of one kernel or of all; a root may have both layouts. Errors are handed
    out, not raised.
    """
    if label == "FMHA_CUBIN_DIR" and not root.is_dir():
        yield ArtifactError(f"FMHA_CUBIN_DIR={root} is not a folder; correct or unset it", path=root)
        return
    try:
        yield from (row for row in read_manifest(root, label) if spec in (None, row.spec))
    except ArtifactError as error:
        yield error
    # Newest compiler first where several built one kernel.
    entries: list[KernelRow] = []
    for folder in sorted(root.glob(f"{spec.name if spec else 'fmha_*'}-*/")):
        try:
            entries.append(read_entry(folder, label))
        except ArtifactError as error:
            yield error
    yield from sorted(entries, key=lambda row: _version(row.nvcc), reverse=True)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _collect(items: Iterable[KernelRow | ArtifactError], rows: list[KernelRow], errors: list[ArtifactError]) -> None:
    for item in items:
        if isinstance(item, ArtifactError):
            errors.append(item)
        else:
            rows.append(item)

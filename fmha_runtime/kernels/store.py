# SPDX-License-Identifier: Apache-2.0
"""The search for a kernel's cubin: FMHA_CUBIN_DIR, the cache, the package; and whether it may still be used.

Nothing here runs a compiler or opens a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .. import config
from ..errors import ArtifactError
from . import catalog, files, manifest, sources
from .manifest import KernelRow
from .spec import Arch, KernelSpec
from .tile import Tile

EXTRA, CACHE = "FMHA_CUBIN_DIR", "cache"
"""``root`` of rows from elsewhere, and of those that were built on this machine."""
_VARIABLES = {EXTRA: "FMHA_CUBIN_DIR", CACHE: "FMHA_CACHE_DIR"}


@dataclass(frozen=True)
class State:
    """What a kernel's cubin is: ``ready``, ``stale``, ``not built`` or ``broken``, why, and the row if there is one.

    ``command`` helps where something is broken and a shell can mend it.
    """

    word: str
    reason: str
    row: KernelRow | None = None
    command: str = ""


def roots() -> tuple[tuple[str, Path], ...]:
    """The (label, folder) pairs that are searched, in order."""
    extra = config.cubin_dir()
    first = ((EXTRA, extra),) if extra else ()
    return (*first, (CACHE, config.cache_dir()), (manifest.PACKAGE, config.package_root()))


def rows() -> tuple[list[KernelRow], list[ArtifactError]]:
    """Every row of every root in search order, whatever its state, and what was unreadable."""
    found: list[KernelRow] = []
    broken: list[ArtifactError] = []
    for label, root in roots():
        _collect(_scan(label, root), found, broken)
    return found, broken


def find_tile(spec: KernelSpec, tile: Tile) -> KernelRow | None:
    """The first row of this tile that is current but for the tile and whose cubin is there; None when there is none."""
    for label, root in roots():
        for row in _scan(label, root, spec):
            if isinstance(row, KernelRow) and row.tile == tile and row.path and not why_stale(row, tile):
                lock = None if row.root == CACHE else locked(spec)
                if not contradicts(row, lock):
                    return row
    return None


def find(spec: KernelSpec) -> KernelRow | None:
    """The first row of the search order that is current and whose cubin is there; None when nothing was built.

    Raises:
        ArtifactError: no row serves, and one that might have is broken.
    """
    state_ = state(spec)
    if state_.word == "broken":
        raise ArtifactError(state_.reason, path=state_.row.path if state_.row else None, command=state_.command)
    return state_.row if state_.word == "ready" else None


def state(spec: KernelSpec) -> State:
    """What the cubin of one kernel is. Only this kernel's entries are looked at, and no cubin is read."""
    found: list[KernelRow] = []
    broken: list[ArtifactError] = []
    for label, root in roots():
        _collect(_scan(label, root, spec), found, broken)
    return _judge(spec, found, broken)


@dataclass(frozen=True)
class Inventory:
    """The states of many kernels, every root read once, what was unreadable in them, and the rows of the package."""

    states: dict[KernelSpec, State]
    broken: tuple[ArtifactError, ...]
    packaged: dict[KernelSpec, KernelRow]

    @classmethod
    def of(cls, specs: Sequence[KernelSpec]) -> Inventory:
        found, broken = rows()
        mine: dict[KernelSpec, list[KernelRow]] = {}
        for row in found:
            mine.setdefault(row.spec, []).append(row)
        errors: dict[str, list[ArtifactError]] = {}
        for error in broken:
            errors.setdefault(_concern(error.path), []).append(error)
        states = {}
        with sources.unchanged():
            for spec in specs:
                concerns = [*errors.get("", ()), *errors.get(spec.name, ()), *errors.get(_table_name(spec), ())]
                states[spec] = _judge(spec, mine.get(spec, []), concerns)
        return cls(states, tuple(broken), {row.spec: row for row in found if row.root == manifest.PACKAGE})


def locked(spec: KernelSpec) -> KernelRow | None:
    """The packaged manifest's row of this kernel, whether or not its cubin is there.

    Raises:
        ArtifactError: the table or the row is not usable.
    """
    return manifest.read_row(config.package_root(), spec, manifest.PACKAGE)


def contradicts(row: KernelRow, lock: KernelRow | None) -> str:
    """What a row from elsewhere claims against the packaged manifest; empty when it claims nothing of the kind.

    One version of nvcc makes of one code one PTX and one cubin. The manifest says which, whatever a folder says of
    itself. What was built on this machine need not be believed: `fmha build` compared it and said so.
    """
    if lock is None or row.root in (CACHE, lock.root):
        return ""
    if (row.code, row.flags, row.tile) != (lock.code, lock.flags, lock.tile) or row.sha256 == lock.sha256:
        return ""
    if lock.nvcc != row.nvcc and lock.ptx_sha256 != row.ptx_sha256:
        return ""
    claim = f"nvcc {row.nvcc}" if lock.nvcc == row.nvcc else f"nvcc {lock.nvcc}'s PTX"
    return (
        f"its row claims to be the build of {claim}, and the packaged manifest has other bytes for that "
        f"(SHA-256 {lock.sha256[:12]}, here {row.sha256[:12]})"
    )


def why_stale(row: KernelRow, forced: Tile | None = None) -> str:
    """What makes a row unusable with the present catalogue and sources; empty when it is current.

    ``forced`` is the tile it was built with as an experiment, when it is not the catalogue's that is wanted.
    """
    if not catalog.exists(row.spec):
        return "the catalogue no longer has this kernel"
    tile = forced or catalog.tile(row.spec)
    if row.abi != (abi := sources.abi()):
        return f"built for ABI {row.abi}, this runtime speaks {abi}"
    if row.tile != tile:
        return f"built with tile {row.tile}, the catalogue says {tile}"
    launch = (tile.threads, catalog.smem_bytes(row.spec, tile))
    if (row.threads, row.smem_bytes) != launch:
        return (
            f"its row says {row.threads} threads and {row.smem_bytes} bytes of shared memory, the catalogue "
            f"{launch[0]} and {launch[1]}"
        )
    same_text = row.text != "" and row.text == sources.text(row.spec, tile)
    if not same_text and row.code != (code := sources.code(row.spec, tile)):
        return f"built from code {row.code[:12]}, the present sources have {code[:12]}"
    if row.flags != " ".join(sources.flags(row.spec.arch)):
        return "built with other compiler flags"
    objection = catalog.spill_objection(row.spec, row.spill_bytes)
    if forced is None and objection and row.nvcc == catalog.PROVEN_NVCC:
        return f"built as an experiment, with {objection}"
    return ""


def _judge(spec: KernelSpec, found: list[KernelRow], broken: list[ArtifactError]) -> State:
    poor: list[State] = []
    remedy = f"run `fmha build {spec.name}`"
    lock = next((row for row in found if row.root == manifest.PACKAGE), None)
    for row in found:
        if lock is not None and row.root == EXTRA and row.sha256 == lock.sha256:
            row = replace(row, nvcc=lock.nvcc)  # the same bytes, so the same compiler, whatever the row says
        if row.path is None:
            # A lock entry, perhaps an outdated one; nothing stale could be loaded.
            poor.append(State("not built", f"locked by the {row.root} manifest, cubin absent; {remedy}", row))
        elif objection := why_stale(row):
            poor.append(State("stale", f"{objection}; {remedy}", row))
        elif claim := contradicts(row, lock):
            poor.append(State("broken", f"{row.path} is not to be trusted: {claim}; {remedy}", row))
        elif (size := _size(row.path)) != row.size:
            reason = f"{row.path} has {size} bytes, its row says {row.size}; {remedy}"
            poor.append(State("broken", reason, row))
        else:
            return State("ready", f"from {row.root}", row)
    poor += [State("broken", str(error), command=error.command) for error in broken]
    poor.append(State("not built", remedy))
    # What needs attention first: a damaged file must not hide behind a row that is merely old.
    return min(poor, key=lambda state: ("broken", "stale", "not built").index(state.word))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it was there a moment ago
        return 0


def _concern(path: Path | None) -> str:
    """Whom an unreadable file concerns: a kernel, a table's kernels, or everybody (the empty word)."""
    if path is not None and path.parent.name == manifest.FOLDER:
        return path.stem
    return manifest.entry_name(path)


def _table_name(spec: KernelSpec) -> str:
    return f"{spec.op.value}_{spec.arch.value}"


def _scan(label: str, root: Path, spec: KernelSpec | None = None) -> Iterator[KernelRow | ArtifactError]:
    """Rows of one root, of one kernel or of all; a root may have both layouts. Errors are handed out, not raised."""
    if label != manifest.PACKAGE:
        try:
            _check_root(label, root, spec)
        except ArtifactError as error:
            yield error
            return
    if spec is None:
        found, broken = manifest.read(root, label)
        yield from found
        yield from broken
    else:
        try:
            row = manifest.read_row(root, spec, label)
            if row is not None:
                yield row
        except ArtifactError as error:
            yield error
    # Newest compiler first where several built one kernel.
    entries: list[KernelRow] = []
    for folder in _entries(root, spec):
        try:
            if label != manifest.PACKAGE:
                files.check_folder(folder, _VARIABLES[label])
            entries.append(manifest.read_entry(folder, label))
        except ArtifactError as error:
            error.path = folder / manifest.ROW  # whom it concerns
            if error.expected != manifest.SCHEMA:  # another version's entry is none of ours; prune removes it
                yield error
    yield from sorted(entries, key=lambda row: _version(row.nvcc), reverse=True)


def _check_root(label: str, root: Path, spec: KernelSpec | None) -> None:
    """Refuse a root that is no folder, or that somebody else could put code into."""
    if not root.is_dir() and (label == EXTRA or root.exists()):
        raise ArtifactError(
            f"{_VARIABLES[label]}={root} is not a folder; correct or unset it",
            path=root,
            command=f"unset {_VARIABLES[label]}",
        )
    archs = [each.value for each in Arch] if spec is None else [spec.arch.value]
    for folder in (root, root / manifest.FOLDER, *(root / arch for arch in archs)):
        files.check_folder(folder, _VARIABLES[label])


def _entries(root: Path, spec: KernelSpec | None) -> list[Path]:
    """The folders of builds in a root, of one kernel or of all. What else lies there is nobody's business."""
    try:
        names = os.listdir(root)
    except OSError:
        return []
    begin = "fmha_" if spec is None else f"{spec.name}-"
    mine = sorted(name for name in names if name.startswith(begin) and manifest.ENTRY.fullmatch(name))
    return [root / name for name in mine if os.path.isfile(root / name / manifest.ROW)]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _collect(items: Iterable[KernelRow | ArtifactError], rows: list[KernelRow], errors: list[ArtifactError]) -> None:
    for item in items:
        if isinstance(item, ArtifactError):
            errors.append(item)
        else:
            rows.append(item)

# SPDX-License-Identifier: Apache-2.0
"""The cache as a folder: its marker, what in it is ours, and what of that may go.

A folder is a cache when it carries MARKER, which is written with the first kernel. Nothing is removed from a folder
without it, and nothing that is not ours from one with it. Ours is what has the name and the content that this library
gives: a build's folder with its row.json, files of ``ptx/`` and ``emulator/`` by their names, unfinished work.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..errors import ArtifactError, BuildError, InputError
from . import files, manifest, store

MARKER = ".fmha_cache"
PTX, EMULATOR = "ptx", "emulator"

_TEXT = """This folder is the cache of fmha_runtime: kernels that were built on this machine.
`fmha cache prune` removes what is outdated or damaged, `fmha cache clean` every kernel. Other files are left alone.
"""
_BUSY_SECONDS = 3600  # no single build takes that long
_FILES = {PTX: re.compile(r"fmha_\w+-[0-9a-f]{12}\.ptx"), EMULATOR: re.compile(r"\w+-[0-9a-f]{20}\.(so|o)")}
_SCRATCH = re.compile(re.escape(files.SCRATCH) + r"\w{8}")
_OLD_SCRATCH = re.compile(r"\.?tmp-\w{8}")  # of earlier versions: told by what is in it, too
_OLD_CONTENT = re.compile(r"fmha_\w+.*|\w+\.cpp|\w+-[0-9a-f]{20}\.(so|o)")


@dataclass(frozen=True)
class Item:
    """Something in a cache: ``kind`` is "build", "file", "scratch" or, where it is not ours, "other"."""

    path: Path
    kind: str
    reason: str = ""
    size: int = 0


@dataclass(frozen=True)
class Sweep:
    """What ``sweep`` removed or, asked for a dry run, would have: and what it left, and why."""

    root: Path
    removed: tuple[Item, ...]
    left: tuple[Item, ...]
    failed: tuple[Item, ...] = ()
    kept: int = 0  # of ours, in use
    adopted: bool = False

    @property
    def size(self) -> int:
        """Bytes of what was removed."""
        return sum(item.size for item in self.removed)


def create(root: Path) -> Path:
    """The cache, ready to be written to: there, marked, and safe.

    Raises:
        BuildError: it cannot be written to.
        InputError: it is no folder.
        ArtifactError: somebody else can write to it.
    """
    _folder(root)
    try:
        files.make_folder(root)
        files.check_folder(root, "FMHA_CACHE_DIR")
        _mark(root)
    except OSError as error:
        raise unwritable(root, error) from None
    return root


def unwritable(root: Path, error: OSError) -> BuildError:
    """What to raise when the kernels of a root cannot be written."""
    return BuildError(
        f"cannot write built kernels to {root} ({error.strerror}); set FMHA_CACHE_DIR to a folder that can be written"
    )


def trusted(root: Path, part: str) -> Path:
    """A folder of the cache, which need not exist, to load code from.

    Raises:
        ArtifactError: somebody else can write to it.
    """
    for folder in (root, root / part):
        files.check_folder(folder, "FMHA_CACHE_DIR")
    return root / part


def sweep(root: Path, *, everything: bool = False, dry_run: bool = False) -> Sweep:
    """Remove what a cache no longer needs: damaged and outdated builds, damaged libraries, abandoned work.

    A folder without the marker is taken for a cache of an earlier version when all in it is ours.

    Args:
        everything: remove what is intact too.
        dry_run: remove and mark nothing.

    Raises:
        InputError: this is no cache.
    """
    _folder(root)
    try:
        found = [item for item in _items(root) if item.path.name != MARKER]
    except OSError as error:
        raise InputError(f"cannot look into the cache {root} ({error.strerror}); make it readable") from None
    others = [item for item in found if item.kind == "other"]
    unmarked = bool(found) and not (root / MARKER).is_file()
    if unmarked and others:
        raise InputError(
            f"nothing was removed: {root} is no cache of fmha_runtime, because it has no {MARKER} and there are other "
            f"things in it ({_names(others)}); correct FMHA_CACHE_DIR, or remove by hand what you want removed"
        )
    if unmarked and not dry_run:
        _mark(root)
    removed: list[Item] = []
    failed: list[Item] = []
    left, kept = list(others), 0
    for item in found:
        if item.kind == "other":
            continue
        goes, reason = _verdict(item, everything)
        item = replace(item, reason=reason)
        if not goes:
            kept += not reason
            left += [item] if reason else []
        elif dry_run:
            removed.append(item)
        else:
            trouble = _remove(item)
            (failed if trouble else removed).append(replace(item, reason=trouble or reason))
    return Sweep(root, tuple(removed), tuple(left), tuple(failed), kept, unmarked)


def _folder(root: Path) -> None:
    there = next((path for path in (root, *root.parents) if path.exists()), root)
    if there.exists() and not there.is_dir():
        what = "" if there == root else f", because {there} is none"
        raise InputError(f"the cache {root} is not a folder{what}; set FMHA_CACHE_DIR to one")


def _mark(root: Path) -> None:
    if not (root / MARKER).exists():
        files.replace_file(root / MARKER, _TEXT.encode())


def _names(items: list[Item]) -> str:
    names = [item.path.name for item in items]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _items(root: Path) -> Iterator[Item]:
    """Everything in a cache, the contents of its two folders one by one."""
    for path in _listing(root):
        if path.name in _FILES and path.is_dir() and not path.is_symlink():
            for inside in _listing(path):
                yield _read(partial(_file_item, pattern=_FILES[path.name]), inside)
        else:
            yield _read(_item, path)


def _read(look: Callable[[Path], Item], path: Path) -> Item:
    try:
        return look(path)
    except OSError as error:
        return Item(path, "other", f"it cannot be read ({error.strerror})")


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _item(path: Path) -> Item:
    if path.is_symlink():
        return Item(path, "other", "a link")
    if not path.is_dir():
        return _file_item(path, _SCRATCH)
    entry = manifest.ENTRY.fullmatch(path.name)
    if entry and (path / manifest.ROW).is_file():
        strangers = [each.name for each in path.iterdir() if not _of_build(each, entry[1])]
        if strangers:
            return Item(path, "other", f"{', '.join(sorted(strangers))} in it is not ours")
        return Item(path, "build", size=_size(path))
    if entry:
        return Item(path, "other", f"it has no {manifest.ROW}")
    return _scratch_item(path)


def _file_item(path: Path, pattern: re.Pattern[str]) -> Item:
    if path.is_dir() and not path.is_symlink():
        return _scratch_item(path)
    ours = (pattern.fullmatch(path.name) or _SCRATCH.fullmatch(path.name)) and not path.is_symlink()
    if not ours:
        return Item(path, "other", "not made by fmha_runtime")
    return Item(path, "scratch" if _SCRATCH.fullmatch(path.name) else "file", size=path.lstat().st_size)


def _scratch_item(path: Path) -> Item:
    old = _OLD_SCRATCH.fullmatch(path.name) and all(_OLD_CONTENT.fullmatch(each.name) for each in path.iterdir())
    if _SCRATCH.fullmatch(path.name) or old:
        return Item(path, "scratch", size=_size(path))
    return Item(path, "other", "not made by fmha_runtime")


def _of_build(path: Path, name: str) -> bool:
    return (path.name == manifest.ROW or path.name.startswith(f"{name}.")) and not path.is_dir()


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _verdict(item: Item, everything: bool) -> tuple[bool, str]:
    """Whether something of ours goes, and why; no reason to stay means that it is in use."""
    if item.kind == "scratch":
        abandoned = time.time() - item.path.lstat().st_mtime > _BUSY_SECONDS
        if everything or abandoned:
            return True, "unfinished"
        return False, "younger than an hour: a build may be at work in it"
    if everything:
        return True, ""
    reason = _why_build_goes(item.path) if item.kind == "build" else _why_file_goes(item.path)
    return bool(reason), reason


def _why_build_goes(folder: Path) -> str:
    try:
        row = manifest.read_entry(folder)
        manifest.load_image(row)
    except ArtifactError as error:
        return "of another version" if error.expected == manifest.SCHEMA else str(error)
    return store.why_stale(row)


def _why_file_goes(path: Path) -> str:
    if path.suffix == ".ptx":
        return ""
    try:
        return "" if files.is_sealed(path) else "damaged, or made by an earlier version"
    except OSError as error:
        return f"damaged: {error.strerror}"


def _remove(item: Item) -> str:
    """What kept it from being removed; empty when it is gone, whoever removed it."""
    try:
        if item.kind == "file" or not item.path.is_dir():
            item.path.unlink(missing_ok=True)
        elif item.kind == "scratch":
            shutil.rmtree(item.path)
        else:
            # The row goes last: a build that is half removed is one whose cubin is not there.
            inside = sorted(item.path.iterdir(), key=lambda path: path.name == manifest.ROW)
            for path in inside:
                path.unlink(missing_ok=True)
            item.path.rmdir()
    except FileNotFoundError:
        return ""
    except OSError as error:
        return error.strerror or str(error)
    return ""

# SPDX-License-Identifier: Apache-2.0
"""Putting built kernels where others find them: whole or not at all, whoever else builds or dies.

There are no locks. Work happens in a scratch folder inside the root (same file system), is flushed,
and appears under its final name by one rename. Who comes second finds the name taken and uses what
is there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from ..errors import ArtifactError, BuildError
from ..kernels import catalog, manifest, store
from ..kernels.manifest import KernelRow

_SCRATCH = ".tmp-"
_ABANDONED_SECONDS = 3600  # no single build takes that long


def scratch(root: Path) -> Path:
    """A new private folder inside ``root``, which is created when it does not exist.

    Raises:
        BuildError: the root cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=root))
    except OSError as error:
        raise BuildError(
            f"cannot write built kernels to {root} ({error.strerror}); "
            "set FMHA_CACHE_DIR to a folder that can be written"
        ) from None


def flush(folder: Path) -> None:
    """Have the files of a folder, and then their names, on disk."""
    for path in [*sorted(folder.iterdir()), folder]:
        _sync(path)


def entry(folder: Path, final: Path, *, force: bool = False) -> KernelRow:
    """Give a finished cache entry its final name and return the row that serves from now on.

    An entry that is already there wins when it is intact, unless ``force``; a damaged one is
    replaced.
    """
    flush(folder)
    while True:
        try:
            os.rename(folder, final)  # fails on a folder that is not empty: entries never are
        except OSError:
            if not final.exists():
                raise
            if not force and (row := intact(final)):
                return row
            aside = scratch(final.parent)
            with contextlib.suppress(FileNotFoundError):  # another builder may have moved it first
                os.rename(final, aside / final.name)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            _sync(final.parent)
            return manifest.read_entry(final)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def intact(folder: Path) -> KernelRow | None:
    """The row of a cache entry whose cubin has the recorded SHA-256, else None."""
    try:
        row = manifest.read_entry(folder)
        manifest.load_image(row)
    except ArtifactError:
        return None
    return row


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file in one step; its folder is created when it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=_SCRATCH, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's files are private
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync(path.parent)


def packaged(root: Path, built: Iterable[tuple[KernelRow, Path]]) -> list[KernelRow]:
    """Add finished builds, as (row, folder), to a packaged root: files first, then the manifest.

    One writer at a time. Rows of kernels that the catalogue dropped leave the manifest.

    Raises:
        ArtifactError: a present table is not usable; nothing was written.
    """
    present, broken = manifest.read(root)
    if broken:
        raise broken[0]
    rows = {row.spec: row for row in present if catalog.exists(row.spec)}
    for row, folder in built:
        for path in folder.iterdir():
            if path.name != manifest.ROW:
                replace_file(root / row.spec.arch.value / path.name, path.read_bytes())
        rows[row.spec] = row
    tables(root, rows.values())
    return manifest.read(root, str(root))[0]


def tables(root: Path, rows: Iterable[KernelRow]) -> None:
    """Write the tables of a packaged root, so that they hold just these rows."""
    texts = manifest.write(root, rows)
    for path, text in texts.items():
        replace_file(path, text.encode())
    for path in (root / manifest.FOLDER).glob("*.json"):
        if path not in texts:
            path.unlink()


def clean(root: Path, *, everything: bool = False) -> tuple[int, int]:
    """Remove what a cache root no longer needs: damaged and outdated entries and abandoned builds.

    ``everything`` removes the intact entries, the PTX and the emulator libraries too.

    Returns:
        how many folders went, and how many bytes they held.
    """
    folders = [path for path in root.glob("fmha_*-*/") if everything or _useless(path)]
    folders += [path for path in root.glob(f"{_SCRATCH}*/") if everything or _abandoned(path)]
    if everything:
        folders += [path for path in (root / "ptx", root / "emulator") if path.is_dir()]
    size = 0
    for folder in folders:
        size += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shutil.rmtree(folder, ignore_errors=True)
    return len(folders), size


def _useless(folder: Path) -> bool:
    row = intact(folder)
    return row is None or bool(store.why_stale(row))


def _abandoned(folder: Path) -> bool:
    return time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS

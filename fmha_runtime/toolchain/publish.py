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
from collections.abc import Iterable, Iterator
from pathlib import Path

from .. import config
from ..errors import ArtifactError
from ..kernels import cache, catalog, files, manifest
from ..kernels.manifest import KernelRow


def scratch(root: Path) -> Path:
    """A new private folder inside ``root``, which is created when it does not exist.

    Raises:
        BuildError: the root cannot be written.
    """
    try:
        files.make_folder(root)
        return Path(tempfile.mkdtemp(prefix=files.SCRATCH, dir=root))
    except OSError as error:
        raise cache.unwritable(root, error) from None


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A scratch folder in the cache, which goes again. Raises what ``cache.create`` and ``scratch`` do."""
    folder = scratch(cache.create(config.cache_dir()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def flush(folder: Path) -> None:
    """Have the files of a folder, and then their names, on disk; from now on only the user may write to them."""
    for path in [*sorted(folder.iterdir()), folder]:
        files.protect(path)
        files.sync(path)


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
            files.sync(final.parent)
            return manifest.read_entry(final)


def intact(folder: Path) -> KernelRow | None:
    """The row of a cache entry whose cubin has the recorded SHA-256, else None."""
    try:
        row = manifest.read_entry(folder)
        manifest.load_image(row)
    except ArtifactError:
        return None
    return row


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
                files.replace_file(root / row.spec.arch.value / path.name, path.read_bytes())
        rows[row.spec] = row
    tables(root, rows.values())
    return manifest.read(root, str(root))[0]


def tables(root: Path, rows: Iterable[KernelRow]) -> None:
    """Write the tables of a packaged root, so that they hold just these rows."""
    texts = manifest.write(root, rows)
    for path, text in texts.items():
        files.replace_file(path, text.encode())
    for path in (root / manifest.FOLDER).glob("*.json"):
        if path not in texts:
            path.unlink()

# SPDX-License-Identifier: Apache-2.0
"""Do the present sources still give the cubins of the packaged manifest? Needs no GPU; see ``fmha build --check``.

A row of equal ``code`` (and flags and tile) gives equal bytes, because nvcc is deterministic: nothing is compiled for
it, unless the caller asks. The others are compiled and their SHA-256 compared.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from .. import config
from ..kernels import catalog, manifest, sources, store
from ..kernels.manifest import KernelRow
from ..kernels.spec import KernelSpec
from . import build, publish
from .process import Leash

BY_CODE, BY_BYTES, CHANGED, FAILED, MISSING = (
    "identical by code",
    "identical by bytes",
    "changed",
    "does not build",
    "not in the manifest",
)
WORDS = (BY_CODE, BY_BYTES, CHANGED, FAILED, MISSING)


@dataclass(frozen=True)
class Checked:
    """What became of one row: one of WORDS, and the row that would replace the manifest's."""

    spec: KernelSpec
    word: str
    reason: str = ""
    row: KernelRow | None = None

    @property
    def ok(self) -> bool:
        """Whether the bytes are those of the manifest."""
        return self.word in (BY_CODE, BY_BYTES)


def check(
    specs: Sequence[KernelSpec],
    *,
    compile_all: bool = False,
    jobs: int | None = None,
    on_done: Callable[[int, int], None] | None = None,
) -> list[Checked]:
    """Compare kernels with the packaged manifest, in the order of ``specs``.

    Args:
        compile_all: also compile where the code is equal, which proves that it means equal bytes.
        jobs: compilers at once; None means ``config.build_jobs()``.
        on_done: called with the number of compiled kernels and of those to compile.

    Raises:
        ToolchainError: there is something to compile and nothing to compile it with.
        BuildError: this nvcc is not the one of the manifest: its bytes cannot be compared.
        ArtifactError: a table of the manifest is not usable.
    """
    found: dict[KernelSpec, Checked] = {}
    locked: dict[KernelSpec, KernelRow] = {}
    rows, broken = manifest.read(config.package_root(), manifest.PACKAGE)
    if broken:
        raise broken[0]
    by_spec = {row.spec: row for row in rows}
    with sources.unchanged():
        for spec in specs:
            row = by_spec.get(spec)
            if row is None:
                found[spec] = Checked(spec, MISSING)
            elif compile_all or store.why_stale(row):
                locked[spec] = row
            else:
                found[spec] = Checked(spec, BY_CODE, row=row)
    if locked:
        found.update(_compile(locked, jobs, on_done or (lambda done, total: None)))
    return [found[spec] for spec in specs]


def update(checked: Sequence[Checked]) -> list[KernelSpec]:
    """Write the new ``code`` of the rows that are identical by bytes into the packaged manifest; of no others.

    Returns:
        the kernels whose row was written.
    """
    root = config.package_root()
    rows = {row.spec: row for row in manifest.read(root)[0]}
    new = [one for one in checked if one.word == BY_BYTES and one.row is not None and rows[one.spec] != one.row]
    for one in new:
        assert one.row is not None
        rows[one.spec] = one.row
    if new:
        publish.tables(root, rows.values())
    return [one.spec for one in new]


def _compile(
    locked: dict[KernelSpec, KernelRow], jobs: int | None, on_done: Callable[[int, int], None]
) -> dict[KernelSpec, Checked]:
    compiler, cxx = build.nvcc_for(locked.values())
    found: dict[KernelSpec, Checked] = {}
    scratch = Path(tempfile.mkdtemp(prefix="fmha-check-"))
    try:
        with Leash() as leash, ThreadPoolExecutor(jobs or config.build_jobs()) as pool, leash.cut_on_error():
            work = [build.Job.of(spec, catalog.tile(spec), compiler, cxx, scratch, leash, False) for spec in locked]
            for done, (job, result) in enumerate(zip(work, pool.map(build.Job.run, work), strict=True), 1):
                found[job.spec] = _compare(locked[job.spec], result)
                shutil.rmtree(job.folder, ignore_errors=True)
                on_done(done, len(work))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found


def _compare(row: KernelRow, result: build.BuildResult) -> Checked:
    if result.row is None:
        return Checked(row.spec, FAILED, str(result.error).splitlines()[0])
    new = replace(result.row, path=None, root="")
    if new.sha256 != row.sha256:
        facts = ("tile", "registers", "spill_bytes", "size")
        moved = [f"{fact} {getattr(row, fact)} -> {getattr(new, fact)}" for fact in facts]
        moved = [text for text, fact in zip(moved, facts, strict=True) if getattr(row, fact) != getattr(new, fact)]
        return Checked(row.spec, CHANGED, ", ".join(moved) or "as large as before", new)
    ptx = "" if new.ptx_sha256 == row.ptx_sha256 else "the same cubin from other PTX"
    return Checked(row.spec, BY_BYTES, ptx, new)

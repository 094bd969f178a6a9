# SPDX-License-Identifier: Apache-2.0
"""Builds kernels: nvcc in a pool, what ptxas reports judged, the result published.

The identity of a build is its content (see ``_entry``), never an mtime.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import config
from ..errors import ArtifactError, BuildError
from ..kernels import cache, catalog, manifest, sources, store
from ..kernels.manifest import KernelRow
from ..kernels.spec import KernelSpec
from ..kernels.tile import Tile
from . import publish
from .nvcc import Nvcc, command_line, failure, find_host_cxx, try_nvcc
from .process import Leash

_SLOW_PATHS = re.compile(r"wgmma\.mma_async instructions are serialized|setmaxnreg.*ignored")
"""What ptxas says when a Hopper kernel compiles but loses its asynchrony: a 1.5 to 2.5 times slower kernel."""
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class BuildResult:
    """What became of one kernel.

    ``status`` is ``built``, ``up to date`` or ``failed`` (then ``error`` says why). ``lock`` tells
    whether the bytes are those of the packaged manifest: ``same``, ``differs``, or empty when the
    manifest locks no build of this code with this compiler. ``warning`` names spills that this
    version of nvcc added to those that the catalogue allows. Sizes are bytes.
    """

    spec: KernelSpec
    tile: Tile
    status: str
    row: KernelRow | None = None
    error: BuildError | None = None
    seconds: float = 0.0
    stack_bytes: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    lock: str = ""
    warning: str = ""
    command: str = ""
    log: str = field(default="", repr=False)


@dataclass(frozen=True)
class Event:
    """Progress: ``plan`` once, then ``done`` per kernel.

    The plan has the kernels to compile in ``specs``, and in ``workers`` how many compilers run at once.
    """

    kind: str
    done: int
    total: int
    result: BuildResult | None = None
    specs: tuple[KernelSpec, ...] = ()
    workers: int = 1


def build(
    specs: Sequence[KernelSpec],
    *,
    jobs: int | None = None,
    force: bool = False,
    keep: bool = False,
    into: Path | None = None,
    tile: Tile | None = None,
    spills: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> list[BuildResult]:
    """Build the kernels that are not up to date.

    Args:
        specs: the kernels; a repeated one is built once.
        jobs: compilers at once; None means ``config.build_jobs()``.
        force: build even what is up to date.
        keep: leave the translation unit and the command line beside the cubin.
        into: a packaged root (``ARCH/NAME.cubin`` and ``manifest/OP_ARCH.json``) instead of the cache. A
            cache shows each kernel as soon as it is finished; a packaged root is written at the
            end, by one writer at a time.
        tile: another tile than the catalogue's, for experiments; dispatch never picks such a cubin.
        spills: accept register spills whatever the catalogue allows, for experiments.
        on_event: called in this thread after each kernel.

    Returns:
        one result per kernel in the order of ``specs``; a kernel that failed does not stop the
        others.

    Raises:
        ToolchainError: there is something to compile and nothing to compile it with.
        BuildError: the root cannot be written.
        InputError: ``tile`` does not fit the shared memory of one of the kernels.
    """
    tiles = {spec: tile or catalog.tile(spec) for spec in specs}
    for spec, chosen in tiles.items():
        catalog.smem_bytes(spec, chosen)
    nvcc, complaint = try_nvcc()
    results: dict[KernelSpec, BuildResult] = {}
    if not force:
        for spec in tiles:
            row = _up_to_date(spec, tiles[spec], nvcc, into)
            if row is not None:
                results[spec] = BuildResult(spec, tiles[spec], "up to date", row, lock=_lock(row))
    todo = [spec for spec in tiles if spec not in results]
    notify = on_event or (lambda event: None)
    workers = jobs or config.build_jobs()
    notify(Event("plan", 0, len(todo), specs=tuple(todo), workers=min(workers, len(todo))))
    if not todo:
        return [results[spec] for spec in tiles]
    if nvcc is None:
        raise complaint
    cxx = find_host_cxx()
    root = into or cache.create(config.cache_dir())
    scratch = publish.scratch(root)
    finished: list[tuple[KernelRow, Path]] = []
    pool, leash = ThreadPoolExecutor(workers), Leash()
    try:
        jobs_ = [Job.of(spec, tiles[spec], nvcc, cxx, scratch, leash, spills) for spec in todo]
        futures = {pool.submit(job.run): job for job in jobs_}
        for done, future in enumerate(as_completed(futures), 1):
            job, result = futures[future], future.result()
            row = result.row
            if row is not None:
                if not keep:
                    job.forget_sources()
                if into is None:
                    row = publish.entry(job.folder, root / job.entry, force=force)
                    result = replace(result, row=row, lock=_lock(row))
                else:
                    finished.append((row, job.folder))
            results[job.spec] = result
            notify(Event("done", done, len(todo), result))
    finally:
        # Interrupted or not: what runs ends, what is finished is kept, the rest never existed.
        leash.cut()
        pool.shutdown(cancel_futures=True)
        leash.close()
        if into is not None and finished:
            for row in publish.packaged(into, finished):
                if row.spec in results:
                    results[row.spec] = replace(results[row.spec], row=row, lock=_lock(row))
        shutil.rmtree(scratch, ignore_errors=True)
    return [results[spec] for spec in tiles]


@dataclass(frozen=True)
class Job:
    """One kernel to compile in a folder of its own."""

    spec: KernelSpec
    tile: Tile
    nvcc: Nvcc
    cxx: Path
    folder: Path
    leash: Leash
    text: str
    code: str
    entry: str  # its folder in a cache
    spills: bool  # any number of them is accepted

    @classmethod
    def of(cls, spec: KernelSpec, tile: Tile, nvcc: Nvcc, cxx: Path, scratch: Path, leash: Leash, spills: bool) -> Job:
        entry, text = _entry(spec, tile, nvcc), sources.text(spec, tile)
        return cls(spec, tile, nvcc, cxx, scratch / spec.name, leash, text, sources.code(spec, tile), entry, spills)

    def run(self) -> BuildResult:
        """Compile, judge, and leave cubin and row in the folder."""
        result = BuildResult(self.spec, self.tile, "failed")
        start = time.perf_counter()
        name, flags = self.spec.name, sources.flags(self.spec.arch)
        # --keep leaves the PTX that the cubin was made from; it is the text that `nvcc -ptx` writes.
        command = command_line(self.nvcc, self.cxx, (*flags, "-cubin", "--keep"), self.spec, "cubin")
        self.folder.mkdir()
        (self.folder / f"{name}.cu").write_text(sources.render(self.spec, self.tile))
        (self.folder / f"{name}.sh").write_text(shlex.join(command) + "\n")
        done = self.leash.run(command, self.folder)
        seconds = time.perf_counter() - start
        result = replace(result, seconds=seconds, command=shlex.join(command), log=done.stdout)
        spills, registers = _SPILLS.search(done.stdout), _REGISTERS.search(done.stdout)
        if done.returncode or not all((self.folder / f"{name}.{kind}").is_file() for kind in ("cubin", "ptx")):
            what = f"nvcc exited with {done.returncode}"
            return replace(result, error=failure(self.spec, what, command, done.stdout))
        if spills is None or registers is None:
            what = "ptxas did not report registers and spills"
            return replace(result, error=failure(self.spec, what, command, done.stdout))
        if sources.code(self.spec, self.tile) != self.code:
            what = "its sources changed while it was compiled; build again"
            return replace(result, error=failure(self.spec, what, command, ""))
        slow = _SLOW_PATHS.search(done.stdout)
        if slow is not None:
            what = f"ptxas reports: {slow[0]}"
            return replace(result, error=failure(self.spec, what, command, done.stdout))
        stack, stores, loads = map(int, spills.groups())
        row = self._row(int(registers[1]), stores + loads)
        result = replace(result, stack_bytes=stack, spill_stores=stores, spill_loads=loads)
        if not self.spills and (objection := catalog.spill_objection(self.spec, row.spill_bytes)):
            if self.nvcc.version == catalog.PROVEN_NVCC:
                what = f"{objection}, at {row.registers} registers"
                return replace(result, error=failure(self.spec, what, command, done.stdout))
            result = replace(result, warning=_added_spills(self.spec, objection, self.nvcc.version))
        self._tidy()
        (self.folder / manifest.ROW).write_text(manifest.row_text(row))
        return replace(result, status="built", row=row)

    def _row(self, registers: int, spill_bytes: int) -> KernelRow:
        image = (self.folder / f"{self.spec.name}.cubin").read_bytes()
        return KernelRow(
            spec=self.spec,
            tile=self.tile,
            threads=self.tile.threads,
            smem_bytes=catalog.smem_bytes(self.spec, self.tile),
            registers=registers,
            spill_bytes=spill_bytes,
            abi=sources.abi(),
            params_size=ctypes.sizeof(catalog.block(self.spec)),
            size=len(image),
            sha256=hashlib.sha256(image).hexdigest(),
            ptx_sha256=hashlib.sha256(ptx_text(self.folder / f"{self.spec.name}.ptx")).hexdigest(),
            code=self.code,
            text=self.text if sources.text(self.spec, self.tile) == self.text else "",
            nvcc=self.nvcc.version,
            flags=" ".join(sources.flags(self.spec.arch)),
        )

    def _tidy(self) -> None:
        """Remove the compiler's intermediate files."""
        kept = {f"{self.spec.name}.{suffix}" for suffix in ("cubin", "cu", "sh")}
        for path in self.folder.iterdir():
            if path.name not in kept:
                path.unlink()

    def forget_sources(self) -> None:
        """Leave only what the runtime reads."""
        for suffix in ("cu", "sh"):
            (self.folder / f"{self.spec.name}.{suffix}").unlink()


def _added_spills(spec: KernelSpec, objection: str, version: str) -> str:
    return (
        f"{spec.name}: nvcc {version} leaves {objection}: it computes the same and may be slower than what was "
        f"measured; nvcc {catalog.PROVEN_NVCC} (pip install 'fmha-runtime[build]') is what the catalogue was tuned with"
    )


def nvcc_for(rows: Iterable[KernelRow]) -> tuple[Nvcc, Path]:
    """The compilers that rebuild these rows, to compare bytes with.

    Raises:
        ToolchainError: there is none.
        BuildError: it is of another version than the one that built them.
    """
    compiler, complaint = try_nvcc()
    if compiler is None:
        raise complaint
    wanted = sorted({row.nvcc for row in rows})
    if wanted != [compiler.version]:
        raise BuildError(
            f"the manifest's cubins are of nvcc {', '.join(wanted)} and this is {compiler.version} ({compiler.path}): "
            "their bytes cannot be compared; set FMHA_NVCC to that version"
        )
    return compiler, find_host_cxx()


def ptx_text(path: Path) -> bytes:
    """The PTX that nvcc wrote, without a NUL at its end."""
    return path.read_bytes().rstrip(b"\0")


def digest(spec: KernelSpec, tile: Tile, flags: Sequence[str], *more: str) -> str:
    """SHA-256 (hex) of what is compiled and how: the key of a cache."""
    parts = (spec.name, str(tile), *flags, sources.code(spec, tile))
    return hashlib.sha256("\0".join((*parts, *more)).encode()).hexdigest()


def _entry(spec: KernelSpec, tile: Tile, nvcc: Nvcc) -> str:
    """A build's folder in a cache, named by its identity: what is compiled, how, by what."""
    key = digest(spec, tile, sources.flags(spec.arch), nvcc.version, str(manifest.SCHEMA))
    return f"{spec.name}-{key[:12]}"


def _up_to_date(spec: KernelSpec, tile: Tile, nvcc: Nvcc | None, into: Path | None) -> KernelRow | None:
    """An intact row of just this build; without an nvcc to compare with, of any compiler."""
    try:
        if into is not None:
            row = manifest.read_row(into, spec)
        elif tile == catalog.tile(spec):
            row = store.find(spec)
        elif nvcc is not None:
            return publish.intact(config.cache_dir() / _entry(spec, tile, nvcc))
        else:
            return None
        if row is None or store.why_stale(row) or (nvcc and row.nvcc != nvcc.version):
            return None
        manifest.load_image(row)
    except ArtifactError:
        return None  # damaged: building again is the remedy
    return row


def _lock(row: KernelRow) -> str:
    """Compare a build with the packaged manifest, which locks the bytes of one code, compiler version and flag set."""
    try:
        lock = store.locked(row.spec)
    except ArtifactError:
        return ""
    if lock is None or (lock.code, lock.nvcc, lock.flags) != (row.code, row.nvcc, row.flags):
        return ""
    return "same" if (lock.sha256, lock.ptx_sha256) == (row.sha256, row.ptx_sha256) else "differs"

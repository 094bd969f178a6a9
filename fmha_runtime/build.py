# SPDX-License-Identifier: Apache-2.0
"""Compilers: find nvcc, build kernels in a pool, judge what ptxas reports; PTX and disassembly.

Besides emulator.py the only file that starts processes. Identity is content (see ``_entry``), never
an mtime.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import catalog, config, manifest, params, publish, sources
from .catalog import Tile
from .errors import ArtifactError, BuildError, ToolchainError
from .manifest import KernelRow
from .spec import KernelSpec

_RELEASE = re.compile(r"release (\d+\.\d+), V([\d.]+)")
_SLOW_PATHS = re.compile(r"wgmma\.mma_async instructions are serialized|setmaxnreg.*ignored")
"""What ptxas says when a Hopper kernel compiles but loses its asynchrony: a 1.5 to 2.5 times slower kernel."""
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
# The parts of a toolkit from the package index; each is a wheel, so nothing but pip keeps them at
# one version.
_PARTS = ("cuda_nvcc", "nvvm", "cuda_crt", "cuda_runtime", "cuda_cccl")
_LINES = 20  # of a compiler's log, in an error
_USUAL = Path("/usr/local/cuda/bin/nvcc")
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", re.MULTILINE)
_PTX = re.compile(r"^\s+(?:@!?%p\d+\s+)?([a-z][a-z0-9]*)\b[^\n]*;", re.MULTILINE)


@dataclass(frozen=True)
class Nvcc:
    """The CUDA compiler that builds use: where it is, its version (``13.0.88``), and how it was
    found.
    """

    path: Path
    version: str
    origin: str


@dataclass(frozen=True)
class BuildResult:
    """What became of one kernel.

    ``status`` is ``built``, ``up to date`` or ``failed`` (then ``error`` says why). ``lock`` tells
    whether the bytes are those of the packaged manifest: ``same``, ``differs``, or empty when the
    manifest locks no build of these sources with this compiler. Sizes are bytes.
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
    command: str = ""
    log: str = field(default="", repr=False)


@dataclass(frozen=True)
class Event:
    """Progress: ``plan`` once, with the number of kernels to compile, then ``done`` per kernel."""

    kind: str
    done: int
    total: int
    result: BuildResult | None = None


def find_nvcc() -> Nvcc:
    """The nvcc to use: FMHA_NVCC, then the Python packages (cuda-pathfinder), PATH,
    /usr/local/cuda.

    Raises:
        ToolchainError: there is none, it does not run, or its toolkit is a mix of versions.
    """
    path, origin = _locate_nvcc()
    found = _RELEASE.search(_tool_output([str(path), "--version"]))
    if found is None:
        raise ToolchainError(
            f"{path} (from {origin}) does not answer --version like an nvcc; set FMHA_NVCC to one that works"
        )
    release, version = found.groups()
    _check_toolkit(path, release)
    return Nvcc(path, version, origin)


def find_host_cxx() -> Path:
    """The host C++ compiler, which nvcc needs as a preprocessor even for a cubin.

    Raises:
        ToolchainError: there is none.
    """
    name = config.host_cxx()
    found = config.which(name)
    if found is None:
        raise ToolchainError(
            f"no host C++ compiler {name!r}; nvcc and the emulator need one: install g++ "
            "(for example `apt-get install g++`) or set FMHA_HOST_CXX"
        )
    return found


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
        into: a packaged root (``ARCH/NAME.cubin`` and ``manifest.json``) instead of the cache. A
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
    nvcc, complaint = _try_nvcc()
    results: dict[KernelSpec, BuildResult] = {}
    if not force:
        for spec in tiles:
            row = _up_to_date(spec, tiles[spec], nvcc, into)
            if row is not None:
                results[spec] = BuildResult(spec, tiles[spec], "up to date", row, lock=_lock(row))
    todo = [spec for spec in tiles if spec not in results]
    notify = on_event or (lambda event: None)
    notify(Event("plan", 0, len(todo)))
    if not todo:
        return [results[spec] for spec in tiles]
    if nvcc is None:
        raise complaint
    cxx = find_host_cxx()
    root = into or config.cache_dir()
    scratch = publish.scratch(root)
    finished: list[tuple[KernelRow, Path]] = []
    pool = ThreadPoolExecutor(jobs or config.build_jobs())
    try:
        jobs_ = [_Job.of(spec, tiles[spec], nvcc, cxx, scratch, spills) for spec in todo]
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
        pool.shutdown(cancel_futures=True)
        if into is not None and finished:
            for row in publish.packaged(into, finished):
                if row.spec in results:
                    results[row.spec] = replace(results[row.spec], row=row, lock=_lock(row))
        shutil.rmtree(scratch, ignore_errors=True)
    return [results[spec] for spec in tiles]


def compile_ptx(spec: KernelSpec, tile: Tile | None = None) -> bytes:
    """The kernel's PTX text for the base virtual architecture (compute_80 for sm80), without a NUL.

    A copy is kept in the cache, so that a machine without nvcc can use what another one compiled.

    Raises:
        ToolchainError: it is not in the cache and there is no nvcc.
        BuildError: nvcc refused.
    """
    tile = tile or catalog.tile(spec)
    flags = sources.ptx_flags(spec.arch)
    path = config.cache_dir() / "ptx" / f"{spec.name}-{_digest(spec, tile, flags)[:12]}.ptx"
    if path.is_file():
        return path.read_bytes()
    nvcc, cxx = find_nvcc(), find_host_cxx()
    folder = publish.scratch(config.cache_dir())
    try:
        (folder / f"{spec.name}.cu").write_text(sources.render(spec, tile))
        command = command_line(nvcc, cxx, (*flags, "-ptx"), spec, "ptx")
        done = _run(command, folder)
        if done.returncode:
            raise _failure(spec, "nvcc -ptx failed", command, done.stdout)
        text = (folder / f"{spec.name}.ptx").read_bytes().rstrip(b"\0")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    publish.replace_file(path, text)
    return text


def disassemble(image: bytes) -> str:
    """The SASS of a cubin, from nvdisasm or cuobjdump.

    Raises:
        ToolchainError: neither tool is installed, or it failed.
    """
    nvcc, _ = _try_nvcc()
    for program, options in (("nvdisasm", ["-c"]), ("cuobjdump", ["-sass"])):
        beside = nvcc.path.resolve().parent / program if nvcc else None
        found = beside if beside and beside.is_file() else config.which(program)
        if found:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(image)
                file.flush()
                return _tool_output([str(found), *options, file.name])
    raise ToolchainError(
        "no disassembler: nvdisasm and cuobjdump are neither beside nvcc nor on PATH; install a full CUDA toolkit"
    )


def instruction_mix(listing: str) -> Counter[str]:
    """How often each instruction occurs in SASS or PTX text, by the first word of its name."""
    return Counter(_SASS.findall(listing) or _PTX.findall(listing))


@dataclass(frozen=True)
class _Job:
    """One kernel to compile in a folder of its own."""

    spec: KernelSpec
    tile: Tile
    nvcc: Nvcc
    cxx: Path
    folder: Path
    source_hash: str
    entry: str  # its folder in a cache
    spills: bool  # any number of them is accepted

    @classmethod
    def of(cls, spec: KernelSpec, tile: Tile, nvcc: Nvcc, cxx: Path, scratch: Path, spills: bool) -> _Job:
        entry = _entry(spec, tile, nvcc)
        return cls(spec, tile, nvcc, cxx, scratch / spec.name, sources.source_hash(spec), entry, spills)

    def run(self) -> BuildResult:
        """Compile, judge, and leave cubin and row in the folder."""
        result = BuildResult(self.spec, self.tile, "failed")
        start = time.perf_counter()
        name, flags = self.spec.name, sources.flags(self.spec.arch)
        command = command_line(self.nvcc, self.cxx, (*flags, "-cubin"), self.spec, "cubin")
        self.folder.mkdir()
        (self.folder / f"{name}.cu").write_text(sources.render(self.spec, self.tile))
        (self.folder / f"{name}.sh").write_text(shlex.join(command) + "\n")
        done = _run(command, self.folder)
        seconds = time.perf_counter() - start
        result = replace(result, seconds=seconds, command=shlex.join(command), log=done.stdout)
        spills, registers = _SPILLS.search(done.stdout), _REGISTERS.search(done.stdout)
        if done.returncode or not (self.folder / f"{name}.cubin").is_file():
            what = f"nvcc exited with {done.returncode}"
            return replace(result, error=_failure(self.spec, what, command, done.stdout))
        if spills is None or registers is None:
            what = "ptxas did not report registers and spills"
            return replace(result, error=_failure(self.spec, what, command, done.stdout))
        if sources.source_hash(self.spec) != self.source_hash:
            what = "its sources changed while it was compiled; build again"
            return replace(result, error=_failure(self.spec, what, command, ""))
        slow = _SLOW_PATHS.search(done.stdout)
        if slow is not None:
            what = f"ptxas reports: {slow[0]}"
            return replace(result, error=_failure(self.spec, what, command, done.stdout))
        stack, stores, loads = map(int, spills.groups())
        row = self._row(int(registers[1]), stores + loads)
        result = replace(result, stack_bytes=stack, spill_stores=stores, spill_loads=loads)
        allowed = catalog.allowed_spill_bytes(self.spec)
        if row.spill_bytes > allowed and not self.spills:
            what = f"{row.spill_bytes} bytes of spills at {row.registers} registers, {allowed} allowed"
            return replace(result, error=_failure(self.spec, what, command, done.stdout))
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
            params_size=ctypes.sizeof(params.block_type(self.spec)),
            size=len(image),
            sha256=hashlib.sha256(image).hexdigest(),
            source_hash=self.source_hash,
            nvcc=self.nvcc.version,
            flags=" ".join(sources.flags(self.spec.arch)),
        )

    def forget_sources(self) -> None:
        """Leave only what the runtime reads."""
        for suffix in ("cu", "sh"):
            (self.folder / f"{self.spec.name}.{suffix}").unlink()


def command_line(nvcc: Nvcc, cxx: Path, flags: Sequence[str], spec: KernelSpec, suffix: str) -> list[str]:
    """What is run for one kernel, in a folder that holds ``NAME.cu``; writes ``NAME.suffix``."""
    # Input and output are named relative to the working folder: no path of this machine is
    # compiled.
    include = config.kernel_src() / "fmha"
    files = ["-o", f"{spec.name}.{suffix}", f"{spec.name}.cu"]
    return [str(nvcc.path), *flags, "-ccbin", str(cxx), "-I", str(include), *files]


def _run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env=config.tool_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def _failure(spec: KernelSpec, what: str, command: Sequence[str], log: str) -> BuildError:
    lines = log.splitlines()
    # The first error of the compiler explains the others; without one the end of the log does.
    first = next((number for number, line in enumerate(lines) if ": error" in line), -_LINES)
    shown = "\n".join(lines[first:][:_LINES])
    text = f"{spec.name}: {what}\n{shown}".rstrip()
    return BuildError(text, command=shlex.join(command), log=log)


def _digest(spec: KernelSpec, tile: Tile, flags: Sequence[str], *more: str) -> str:
    parts = (spec.name, str(tile), *flags, sources.render(spec, tile), sources.source_hash(spec))
    return hashlib.sha256("\0".join((*parts, *more)).encode()).hexdigest()


def _entry(spec: KernelSpec, tile: Tile, nvcc: Nvcc) -> str:
    """A build's folder in a cache, named by its identity: what is compiled, how, by what."""
    key = _digest(spec, tile, sources.flags(spec.arch), nvcc.version, str(manifest.SCHEMA))
    return f"{spec.name}-{key[:12]}"


def _up_to_date(spec: KernelSpec, tile: Tile, nvcc: Nvcc | None, into: Path | None) -> KernelRow | None:
    """An intact row of just this build; without an nvcc to compare with, of any compiler."""
    try:
        if into is not None:
            row = next((row for row in manifest.read_manifest(into) if row.spec == spec), None)
        elif tile == catalog.tile(spec):
            row = manifest.find(spec)
        elif nvcc is not None:
            return publish.intact(config.cache_dir() / _entry(spec, tile, nvcc))
        else:
            return None
        if row is None or manifest.why_stale(row) or (nvcc and row.nvcc != nvcc.version):
            return None
        manifest.load_image(row)
    except ArtifactError:
        return None  # damaged: building again is the remedy
    return row


def _lock(row: KernelRow) -> str:
    """Compare a build with the packaged manifest, which locks the bytes of one compiler version."""
    try:
        lock = manifest.locked(row.spec)
    except ArtifactError:
        return ""
    if lock is None or replace(lock, path=None, root="", sha256="", size=0) != replace(
        row, path=None, root="", sha256="", size=0
    ):
        return ""
    return "same" if lock.sha256 == row.sha256 else "differs"


def _try_nvcc() -> tuple[Nvcc | None, ToolchainError]:
    try:
        return find_nvcc(), ToolchainError()
    except ToolchainError as error:
        return None, error


def _locate_nvcc() -> tuple[Path, str]:
    chosen = config.nvcc_override()
    if chosen:
        found = config.which(chosen)
        if found is None:
            raise ToolchainError(f"FMHA_NVCC={chosen} is not an executable; correct it, or unset it to search")
        return found, "FMHA_NVCC"
    try:
        from cuda.pathfinder import find_nvidia_binary_utility
    except ImportError:
        pass
    else:
        packaged = find_nvidia_binary_utility("nvcc")
        if packaged:
            return Path(packaged), "cuda-pathfinder"
    on_path = config.which("nvcc")
    if on_path:
        return on_path, "PATH"
    if _USUAL.is_file():
        return _USUAL, str(_USUAL.parent)
    raise ToolchainError(
        "no nvcc: looked at FMHA_NVCC, the Python packages (cuda-pathfinder), PATH and "
        "/usr/local/cuda/bin; run `pip install 'fmha-runtime[build]'`"
    )


def _tool_output(command: list[str]) -> str:
    try:
        done = _run(command, Path.cwd())
    except OSError as error:
        raise ToolchainError(f"cannot run {command[0]}: {error.strerror}") from None
    if done.returncode:
        raise ToolchainError(f"`{shlex.join(command)}` exited with {done.returncode}:\n{done.stdout.strip()}")
    return done.stdout


def _check_toolkit(nvcc: Path, release: str) -> None:
    """Refuse a toolkit whose parts come from different releases: it fails later, and obscurely."""
    versions = {"nvcc": release}
    ptxas = nvcc.parent / "ptxas"
    if ptxas.is_file():
        found = _RELEASE.search(_tool_output([str(ptxas), "--version"]))
        versions["ptxas"] = found[1] if found else "unknown"
    # .../site-packages/nvidia/cu13/bin/nvcc: the parts' versions are in the names of their records.
    site = nvcc.parents[3] if nvcc.match("nvidia/*/bin/nvcc") else None
    for part in _PARTS if site else ():
        assert site is not None
        records = list(site.glob(f"nvidia_{part}-*.dist-info"))
        version = records[0].name.split("-")[1] if records else "missing"
        if part != "cuda_cccl" or not records:  # CCCL counts its own releases
            versions[part] = ".".join(version.split(".")[:2])
    if len(set(versions.values())) > 1:
        listing = ", ".join(f"{part} {version}" for part, version in versions.items())
        raise ToolchainError(
            f"the toolkit of {nvcc} is a mix of releases ({listing}); run `pip install "
            f"--force-reinstall 'cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]=={release}.*'`"
        )

# SPDX-License-Identifier: Apache-2.0
"""What this machine has and what is wrong with it. Standard library only; every probe is guarded.

A probe that fails says so in its own line and never stops the others: the report is wanted most
where things are broken. Nothing is built, written or loaded onto a GPU.
"""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__, records
from ..errors import ArtifactError, FmhaError
from ..kernels.spec import Arch
from . import report
from .exits import ARTIFACT, ENVIRONMENT

_LIBRARIES = ("libcuda.so", "libcudart", "libnvrtc", "libnvJitLink", "libcudnn.so")
_PACKAGES = ("cuda-bindings", "numpy", "torch", "transformers", "matplotlib", "triton")
_REINSTALL = "pip install --force-reinstall fmha-runtime  (in a checkout: git checkout cubins)"
_TOOLKIT = re.compile(r"nvidia-(cuda-|nvvm|nvjitlink)|cuda-(toolkit|pathfinder)", re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """Something that keeps a kernel from being built or run, and the one command that helps."""

    text: str
    command: str
    code: int = ENVIRONMENT


@dataclass
class Diagnosis:
    """(section, label, value) lines in order, and the problems."""

    lines: list[tuple[str, str, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    arch: Arch | None = None  # of the first GPU, where kernels for it exist
    gpus: int = 0
    driver: int | None = None  # CUDA major version that the driver is for
    nvcc: str | None = None
    cxx: bool = False

    @property
    def exit_code(self) -> int:
        """0 usable, 3 the environment has a problem, 4 an artefact has."""
        return max((problem.code for problem in self.problems), default=0)

    def text(self) -> list[str]:
        """The report as printed."""
        found: list[str] = []
        for section in dict.fromkeys(section for section, _, _ in self.lines):
            rows = [(label, value) for part, label, value in self.lines if part == section]
            found += [section, *(f"  {line}" for line in records.table(rows)), ""]
        found.append(f"problems: {len(self.problems)}")
        for problem in self.problems:
            found += [f"  {problem.text}", f"    {problem.command}"]
        return found

    def json(self) -> str:
        """The report for machines."""
        items = [{"section": s, "label": label, "value": v} for s, label, v in self.lines]
        problems = [vars(problem) for problem in self.problems]
        return report.envelope(items, problems=problems)


def examine() -> Diagnosis:
    """Run every probe."""
    found = Diagnosis()
    for section, probe in _PROBES:
        try:
            for label, value in probe(found):
                found.lines.append((section, label, value))
        except Exception as error:
            found.lines.append((section, "failed", f"{type(error).__name__}: {error}"))
            if isinstance(error, FmhaError):
                damaged = isinstance(error, ArtifactError)
                command = getattr(error, "command", None) or (_REINSTALL if damaged else "fmha doctor")
                found.problems.append(Problem(str(error), command, ARTIFACT if damaged else ENVIRONMENT))
    _conclude(found)
    return found


Lines = Iterator[tuple[str, str]]


def _package(found: Diagnosis) -> Lines:
    from .. import config
    from ..kernels import catalog, sources

    yield "fmha_runtime", f"{__version__} at {Path(__file__).parent.parent}"
    yield "kernel source", f"{config.kernel_src()}, ABI {sources.abi()}"
    specs = catalog.enumerate_specs()
    yield "catalogue", f"{len(specs)} kernels"
    for spec in {sources.header(spec): spec for spec in specs}.values():
        sources.code(spec, catalog.tile(spec))  # raises where a header is missing or cannot be followed


def _python(found: Diagnosis) -> Lines:
    yield "python", f"{platform.python_version()} at {sys.executable}"
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    libc, version = platform.libc_ver()
    yield "libc", f"{libc} {version}".strip() or "unknown"


def _driver(found: Diagnosis) -> Lines:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        yield "libcuda", f"none ({error}); kernels run on the CPU emulator only"
        return
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    found.driver = version.value // 1000
    yield "libcuda", f"for CUDA {found.driver}.{version.value % 1000 // 10}"
    module = Path("/sys/module/nvidia/version")
    yield "kernel module", module.read_text().strip() if module.is_file() else "not loaded"
    status = cuda.cuInit(0)
    if status == 100:  # CUDA_ERROR_NO_DEVICE
        yield "GPUs", "none; kernels run on the CPU emulator only"
        return
    if status != 0:
        yield "GPUs", f"cuInit failed with CUresult {status}"
        found.problems.append(Problem(f"the CUDA driver does not start (CUresult {status})", "nvidia-smi"))
        return
    yield from _gpus(cuda, found)


def _gpus(cuda: ctypes.CDLL, found: Diagnosis) -> Lines:
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    found.gpus = count.value
    for index in range(count.value):
        device, text = ctypes.c_int(), ctypes.create_string_buffer(256)
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(text, len(text), device)
        number = ctypes.c_int()
        capability = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
            capability.append(number.value)
        arch = Arch.for_capability(*capability)
        found.arch = found.arch or arch
        targets = ", ".join(target.value for target in arch.targets) if arch else ""
        kernels = f"kernels: {targets}" if arch else "no kernels for it in this release"
        name = text.value.decode(errors="replace")
        yield (
            f"GPU {index}",
            f"{name}, compute capability {capability[0]}.{capability[1]}, {kernels}",
        )


def _toolchain(found: Diagnosis) -> Lines:
    from ..toolchain import nvcc

    for label, find in (("nvcc", nvcc.find_nvcc), ("host compiler", nvcc.find_host_cxx)):
        try:
            tool: Any = find()
        except FmhaError as error:
            yield label, f"none: {error}"
            # A compiler that is missing hinders only who needs one; one that is broken is a fault.
            if label == "nvcc" and _has_nvcc():
                install = "pip install --upgrade 'fmha-runtime[build]'"
                found.problems.append(Problem(str(error), install))
            continue
        if label == "nvcc":
            found.nvcc = tool.version
            yield label, f"{tool.version} at {tool.path} (from {tool.origin}), parts agree"
        else:
            found.cxx = True
            yield label, str(tool)


def _has_nvcc() -> bool:
    from .. import config

    return bool(config.nvcc_override() or config.which("nvcc") or _versions(_TOOLKIT.match))


def _cubins(found: Diagnosis) -> Lines:
    from .. import config
    from ..kernels import catalog, manifest, store

    for label, root in store.roots():
        yield label, f"{root}" + ("" if root.is_dir() else " (does not exist)")
    inventory = store.Inventory.of(catalog.enumerate_specs())
    words = Counter(state.word for state in inventory.states.values())
    yield "kernels", ", ".join(f"{n} {word}" for word, n in sorted(words.items()))
    for error in inventory.broken:
        yield "broken", str(error)
        packaged = error.path is not None and error.path.is_relative_to(config.package_root())
        command = error.command or (_REINSTALL if packaged else "fmha cache prune")
        found.problems.append(Problem(str(error), command, ARTIFACT))
    folder = config.package_root() / manifest.FOLDER
    tables = {manifest.table(config.package_root(), spec.op, spec.arch) for spec in inventory.states}
    missing = sorted(path.name for path in tables if not path.is_file())
    if missing:
        names = ", ".join(missing) if folder.is_dir() else "all of it"
        text = f"the packaged manifest {folder} is missing: {names}"
        found.problems.append(Problem(text, _REINSTALL, ARTIFACT))
    ready = []
    for spec, state in inventory.states.items():
        reason = state.reason if state.word == "broken" and state.row is not None else ""
        if state.word == "ready" and state.row is not None:
            try:
                manifest.load_image(state.row)  # each is read: a flipped bit is found here, not in front of a GPU
                ready.append(spec)
            except ArtifactError as error:
                reason = str(error)
        if reason:
            yield "broken", f"{spec.name}: {reason}"
            text = f"{spec.name} is broken: {reason}"
            found.problems.append(Problem(text, f"fmha build --force {spec.name}", ARTIFACT))
    if found.arch and not any(spec.arch in found.arch.targets for spec in ready):
        targets = [target.value for target in found.arch.targets]
        text = f"no kernel is built for this GPU ({', '.join(targets)})"
        found.problems.append(Problem(text, "fmha build " + " ".join(f"--arch {target}" for target in targets)))


def _ledger(found: Diagnosis) -> Lines:
    from ..kernels import ledger

    if not list(ledger.folder().glob("*.json")):
        text = f"the verification ledger {ledger.folder()} is missing: nothing counts as verified"
        found.problems.append(Problem(text, _REINSTALL, ARTIFACT))
    ways = Counter(record.how for record in ledger.Ledger.load())
    yield "ledger", ", ".join(f"{n} by {how}" for how, n in sorted(ways.items())) or "empty"


def _variables(found: Diagnosis) -> Lines:
    from .. import config

    for variable in config.VARIABLES:
        if variable.value is not None:
            yield variable.name, variable.value if variable.value.isprintable() else repr(variable.value)
    # Reading each once tells a value that cannot be used from one that can.
    for read in (
        config.build_jobs,
        config.emulator_threads,
        config.debug,
        config.build_on_demand,
        config.cache_dir,
        config.cubin_dir,
        config.commit,
    ):
        try:
            read()
        except FmhaError as error:
            name = str(error).partition("=")[0]
            command = f"unset {name}" if name.isidentifier() else "export FMHA_CACHE_DIR=/a/folder/of/yours"
            found.problems.append(Problem(str(error), command))


def _versions(wanted: Callable[[str], object]) -> dict[str, str]:
    """Installed packages whose name passes, from their metadata; nothing is imported."""
    named = ((d.metadata["Name"] or "", d.version) for d in metadata.distributions())
    return {name: version for name, version in sorted(named) if wanted(name)}


def _required() -> dict[str, str]:
    """The packages that every use needs, with their version ranges, as the installed metadata has them."""
    try:
        lines = metadata.requires("fmha-runtime") or []
    except metadata.PackageNotFoundError:  # a checkout on sys.path
        lines = ["cuda-bindings>=12.8,<14", "numpy", "click>=8.1", "rich>=13"]
    parts = [re.match(r"([\w.-]+)\s*([^;]*)", line) for line in lines if "extra ==" not in line]
    return {part[1]: part[2].strip() for part in parts if part}


def _installed(found: Diagnosis) -> Lines:
    versions = _versions(lambda name: name.lower() in _PACKAGES)
    for name in _PACKAGES:
        yield name, versions.get(name, "not installed")
    for name, wanted in _required().items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            text = f"{name} is not installed and fmha_runtime needs it"
            found.problems.append(Problem(text, f"pip install '{name}{wanted}'"))
        else:
            if name not in _PACKAGES:
                yield name, version
    for name, version in _versions(_TOOLKIT.match).items():
        yield name, version


def _loaded(found: Diagnosis) -> Lines:
    maps = Path("/proc/self/maps").read_text().split("\n")
    paths = {line.split(None, 5)[5] for line in maps if len(line.split(None, 5)) == 6}
    libraries = sorted(p for p in paths if any(name in p for name in _LIBRARIES))
    for path in libraries:
        yield Path(path).name.partition(".so")[0], path
    if not libraries:
        yield "none", "no CUDA library is loaded in this process"


def _conclude(found: Diagnosis) -> None:
    """What only the whole picture shows."""
    # A variable that cannot be used stops several probes; the last one has the command that helps.
    found.problems = list({problem.text: problem for problem in found.problems}.values())
    if not found.gpus and not found.cxx:
        text = "no GPU, and no C++ compiler for the emulator: no kernel can run here"
        found.problems.append(Problem(text, "apt-get install g++"))
    major = int(found.nvcc.split(".")[0]) if found.nvcc else 0
    if found.gpus and found.driver and major > found.driver:
        text = f"nvcc {found.nvcc} is ahead of the driver (CUDA {found.driver}): upgrade the driver"
        found.problems.append(Problem(text, "nvidia-smi"))
    if found.arch and not found.nvcc:
        unbuilt = any(p.command.startswith("fmha build") for p in found.problems)
        if unbuilt:
            text = "kernels have to be built and there is no nvcc"
            found.problems.insert(0, Problem(text, "pip install 'fmha-runtime[build]'"))


_PROBES: tuple[tuple[str, Callable[[Diagnosis], Lines]], ...] = (
    ("package", _package),
    ("python", _python),
    ("driver", _driver),
    ("toolchain", _toolchain),
    ("cubins", _cubins),
    ("proof", _ledger),
    ("variables", _variables),
    ("installed", _installed),
    ("loaded", _loaded),
)

# SPDX-License-Identifier: Apache-2.0
"""Is this kernel right? Runs it on its cases and holds it to the number rule.

The rule: the error against an fp64 reference is at most twice that of an honest low-precision
implementation, the relative L2 error is that of a good kernel, LSE is within 1e-3, rows that see no
key are exactly 0 and -inf, nothing outside the output is written, nothing outside the sequences
matters, a second run gives the same bits. ops/forward/check.py applies it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import records
from ..errors import InputError, ToolchainError
from ..kernels import ledger, sources
from ..kernels.spec import KernelSpec, Op
from ..ops.append import cases as append_cases
from ..ops.append.cases import AppendCase
from ..ops.forward import cases as verify_cases
from ..ops.forward import check as verify_check
from ..ops.forward.cases import EMULATOR_BUDGET, Case
from ..ops.forward.check import CaseResult, Runner
from ..ops.pack import cases as pack_cases
from ..ops.pack.cases import PackCase

if TYPE_CHECKING:
    from torch import Tensor

    from ..device.loader import Image

SANITIZERS = ("memcheck", "racecheck", "synccheck")


@dataclass(frozen=True)
class Report:
    """What all cases of one kernel showed."""

    spec: KernelSpec
    device: str
    via: str
    complete: bool  # every case was considered: neither --quick nor --case
    results: tuple[CaseResult, ...]
    image: Image | None = None  # what ran; None: a runner of the caller's

    @property
    def how(self) -> str:
        """The ledger's word for the way it was run."""
        return "emulator" if _on_emulator(self.device) else self.via

    @property
    def passed(self) -> tuple[CaseResult, ...]:
        return tuple(r for r in self.results if r.word == "ok")

    @property
    def failed(self) -> tuple[CaseResult, ...]:
        return tuple(r for r in self.results if r.word == "FAIL")

    @property
    def skipped(self) -> tuple[CaseResult, ...]:
        return tuple(r for r in self.results if r.word == "skipped")

    @property
    def ok(self) -> bool:
        """Something ran, and nothing failed."""
        return bool(self.passed) and not self.failed

    @property
    def worst(self) -> CaseResult | None:
        """The passing or failing case with the largest error for what is allowed."""
        ran = self.passed + self.failed
        return max(ran, key=lambda r: r.ratio, default=None)

    @property
    def worst_rel_l2(self) -> float:
        """Over the cases with standard normal inputs."""
        return max((r.rel_l2 for r in self.passed + self.failed if r.case.normal), default=0.0)

    def lines(self) -> Iterator[str]:
        """The text of ``fmha verify``: the kernel's line, its failing cases, what was skipped."""
        word = "ok  " if self.ok else "FAIL"
        text = f"{word}  {self.spec.name}  {len(self.passed)} of {len(self.results)} cases"
        text += f" ({len(self.skipped)} skipped)" if self.skipped else ""
        if self.spec.op in _EXACT:
            text += f"  {sum(r.max_error for r in self.failed):.0f} wrong {_EXACT[self.spec.op]}"
        elif self.worst is not None:
            text += f"  max err {self.worst.max_error:.1e} (allowed {self.worst.allowed:.1e})"
            text += f"  rel L2 {self.worst_rel_l2:.2e}"
        yield f"{text}  {sum(r.seconds for r in self.results):.1f} s"
        for result in self.failed:
            yield f"      case {result.case.id}: {result.case}"
            yield from (f"        {failure}" for failure in result.failures)
            options = f"--device {self.device}" + ("" if self.how != "ptx" else " --via ptx")
            yield f"        replay: fmha verify --case {self.spec.name}/{result.case.id} {options}"
        for reason in sorted({r.reason for r in self.skipped}):
            ids = [str(r.case.id) for r in self.skipped if r.reason == reason]
            yield f"      skipped {len(ids)}: {reason} (cases {' '.join(ids)})"


_EXACT = {Op.PACK: "words", Op.APPEND: "elements"}
"""Ops whose results are right or wrong, and what is counted."""


def cases(spec: KernelSpec) -> tuple[Case, ...] | tuple[PackCase, ...] | tuple[AppendCase, ...]:
    """Every case of a kernel, ``cases(spec)[i].id == i``.

    Raises:
        InputError: none are written for this kind of kernel.
    """
    if spec.op is Op.PACK:
        return pack_cases.cases()
    return append_cases.cases() if spec.op is Op.APPEND else verify_cases.cases(spec)


def suite(spec: KernelSpec) -> str:
    """What a kernel is held to, as SHA-256 (hex): its cases and the limits of the checks. Part of a record, so that
    another case or a looser limit is seen. EDITION of forward/check.py says what a change of the checks means.
    """
    if spec.op is Op.PACK:
        limits: dict[str, Any] = pack_cases.limits()
    else:
        limits = append_cases.limits() if spec.op is Op.APPEND else verify_check.limits(spec.dtype)
    text = json.dumps([limits, [asdict(case) for case in cases(spec)]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_case(
    spec: KernelSpec,
    case: Case | PackCase | AppendCase,
    device: str,
    runner: Runner,
    reference_device: str | None = None,
) -> CaseResult:
    """Run one case with tensors on a torch device and apply every check.

    The reference of attention is computed on ``reference_device``; None: on ``device``. That of a packed mask is
    computed on the CPU wherever the mask is.
    """
    if isinstance(case, PackCase):
        return pack_cases.check_case(spec, case, device, runner)
    if isinstance(case, AppendCase):
        return append_cases.check_case(spec, case, device, runner)
    return verify_check.check_case(spec, case, device, runner, reference_device)


def parse_case(text: str) -> tuple[KernelSpec, int]:
    """The kernel and the case id of ``NAME/ID``, the argument of ``--case``.

    Raises:
        InputError: the text has another form, or the kernel has no such case.
    """
    name, slash, number = text.partition("/")
    if not slash or not number.isdecimal():
        raise InputError(f"{text!r} is not NAME/ID, for example fmha_fwd_sm90_bf16_d128/7")
    spec = KernelSpec.parse(name)
    count = len(cases(spec))
    if int(number) >= count:
        raise InputError(f"{name} has cases 0 to {count - 1}; there is no case {number}")
    return spec, int(number)


def verify_kernel(
    spec: KernelSpec,
    *,
    device: str = "cuda:0",
    via: str = "cubin",
    quick: bool = False,
    case: int | None = None,
    reference_device: str | None = None,
    runner: Runner | None = None,
    on_case: Callable[[CaseResult], None] | None = None,
) -> Report:
    """Run a kernel on its cases.

    Args:
        device: "cuda:N", or "emulator".
        via: "cubin", or "ptx" to have the driver compile the kernel's PTX; ignored by the emulator.
        quick: about a quarter of the cases, and the smaller ones.
        case: only this case id.
        reference_device: where the reference is computed, "cpu" or "cuda:N"; None: where the kernel runs.
        runner: what to call instead of loading and launching the kernel (tests do).
        on_case: called after each case.

    Raises:
        KernelNotBuilt, ArtifactError, DriverError: the kernel cannot be loaded. What goes wrong
            while a case runs is that case's failure.
    """
    image = None
    if runner is None:
        from ..ops import obtain

        image = obtain.image(spec, via="emulator" if _on_emulator(device) else via)
        runner = _launcher(image, device)
    wanted = [c for c in cases(spec) if (c.quick or not quick) and case in (None, c.id)]
    budget = EMULATOR_BUDGET["quick" if quick else "full"] if _on_emulator(device) else None
    results = []
    lost = ""
    for one in wanted:
        if lost:
            result = CaseResult(one, "skipped", lost)
        elif budget is not None and case is None and one.products(spec) > budget:
            result = CaseResult(one, "skipped", "too large for the emulator, runs on a GPU")
        else:
            result = check_case(spec, one, _torch_device(device), runner, reference_device)
        # After an error of the driver the context is unusable: what follows would mean nothing.
        if any(f.check == "fault" for f in result.failures) and not _on_emulator(device):
            lost = f"the device was lost in case {one.id}"
        results.append(result)
        if on_case is not None:
            on_case(result)
    return Report(spec, device, via, not quick and case is None, tuple(results), image)


def to_record(report: Report) -> ledger.Record:
    """The ledger's record of a report.

    Raises:
        InputError: the report is not of all cases, or something in it failed.
    """
    if not report.complete or not report.ok:
        why = "some cases failed" if report.failed else "not every case was run"
        raise InputError(
            f"{report.spec.name} cannot be recorded as verified: {why}; only a passing run of all "
            "cases counts, so leave out --quick and --case"
        )
    image = report.image
    if image is None:
        raise InputError(f"{report.spec.name} cannot be recorded as verified: it is not known what the runner ran")
    capability = driver_version = None
    name = "CPU emulator"
    if report.how != "emulator":
        from ..device import driver

        info = driver.device_info(int(report.device.partition(":")[2] or 0))
        name, driver_version = info.name, info.driver_version
        capability = ".".join(map(str, info.capability))
    assert report.worst is not None  # something passed
    return ledger.Record(
        name=report.spec.name,
        how=report.how,
        evidence=image.evidence,
        code=sources.code(report.spec, image.tile),
        tile=str(image.tile),
        suite=suite(report.spec),
        nvcc=image.nvcc,
        device=name,
        capability=capability,
        driver=driver_version,
        cases=len(report.passed),
        skipped=len(report.skipped),
        worst_rel_l2=float(f"{report.worst_rel_l2:.3e}"),
        worst_ratio=float(f"{report.worst.ratio:.3f}"),
        date=records.now(),
        commit=records.commit(),
    )


def sanitizer_options(tool: str, error_exitcode: int) -> list[str]:
    """compute-sanitizer's options for a tool. Only kernels whose name begins with ``fmha_`` are instrumented: others
    take hours under racecheck."""
    options = ["--tool", tool, "--kernel-name", "kns=fmha_", "--error-exitcode", str(error_exitcode)]
    if tool == "racecheck":  # each hazard, and not a guess at a missing barrier, which knows no mbarriers
        options += ["--racecheck-report", "all"]
    return options


def sanitizer_argv(tool: str, arguments: Sequence[str]) -> list[str]:
    """The command line that runs ``fmha ARGUMENTS`` under compute-sanitizer, for os.execv. The reference is computed on
    the CPU: beside its kernels racecheck ends with an internal error.

    Raises:
        InputError: ``tool`` is not one of SANITIZERS.
        ToolchainError: compute-sanitizer is not on PATH.
    """
    if tool not in SANITIZERS:
        raise InputError(f"{tool!r} is not a sanitizer tool; choose one of {', '.join(SANITIZERS)}")
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise ToolchainError(
            "compute-sanitizer is not on PATH; it comes with the CUDA toolkit (not with the nvcc "
            "packages of PyPI): install the toolkit, or add its bin folder to PATH"
        )
    words = [*arguments, "--reference-device", "cpu"]
    return [program, *sanitizer_options(tool, 1), sys.executable, "-m", "fmha_runtime", *words]


def _on_emulator(device: str) -> bool:
    return device.partition(":")[0] == "emulator"


def _torch_device(device: str) -> str:
    return "cpu" if _on_emulator(device) else device


def _launcher(image: Image, device: str) -> Runner:
    from ..device import loader
    from ..ops.forward import direct

    kernel = loader.load(image, 0 if _on_emulator(device) else int(device.partition(":")[2] or 0))
    if image.spec.op is Op.PACK:
        from ..ops.pack import packer

        return partial(packer.run, kernel)
    if image.spec.op is Op.APPEND:
        from ..ops.append import appender

        return partial(appender.run, kernel)

    def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return direct.run(kernel, image.spec, q, k, v, **options)

    return run

# SPDX-License-Identifier: Apache-2.0
"""Runs a few kernels under compute-sanitizer: memcheck, racecheck, synccheck; needs a GPU, nvcc and the CUDA toolkit.

Each (tool, kernel) is a process of its own, bounded in time, on a handful of small cases of ``fmha verify``; only
kernels named fmha_* are instrumented, and the reference runs on the CPU. Before a tool's word counts it must find a
fault that was put into a copy of the kernel: a write behind the log-sum-exp, a barrier left out, a barrier that half of
a warp skips. One line per run on stdout.

Exit codes: 0 everything is clean, 1 a finding, a wrong result, or a run that says nothing (out of time, no summary),
2 usage, 3 there is no compute-sanitizer or no GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fmha_runtime import config  # noqa: E402
from fmha_runtime.device import driver  # noqa: E402
from fmha_runtime.errors import FmhaError  # noqa: E402
from fmha_runtime.kernels import catalog  # noqa: E402
from fmha_runtime.kernels.spec import KernelSpec, Op  # noqa: E402
from fmha_runtime.ops import obtain  # noqa: E402
from fmha_runtime.ops.append import appender  # noqa: E402
from fmha_runtime.ops.forward import direct  # noqa: E402
from fmha_runtime.ops.pack import packer  # noqa: E402
from fmha_runtime.verify import run as verifier  # noqa: E402

KERNELS = (
    "fmha_fwd_sm90_bf16_d64_packed_paged",
    "fmha_fwd_sm90_bf16_d128_alibi",
    "fmha_fwd_sm90a_bf16_d64",
    "fmha_fwd_sm90a_bf16_d64_packed",
    "fmha_fwd_sm90a_fp16_d128",
    "fmha_pack_sm90_u8",
    "fmha_decode_sm90_bf16_d64_paged_short",
    "fmha_decode_sm90_bf16_d128",
    "fmha_append_sm90_u8",
)
CASES = (47, 90, 107, 118, 128, 136)
"""Ids: several tiles each way, a window, varlen with empty sequences, keyless rows, large inputs, sinks, chunks."""
PACK_CASES = (36, 37, 38, 39, 90, 93)
"""Of the mask packer: rows that begin anywhere, one allocation without a byte behind it, strides, varlen."""
APPEND_CASES = (0, 5, 10, 15, 17)
"""Of the kernel that fills caches: one of each way to say where."""
FOUND = 97  # exit code that the sanitizer gives when it has findings; no worker ends with it
MUTANT_SPEC = "fmha_fwd_sm90_bf16_d64"

_LOOP_TOP = r"(while \(n_block >= range\.begin\) \{\s*cp_async_wait<Traits::kStages - 2>\(\);\s*)sync_cta\(\);"
MUTANTS = {
    "memcheck": ("blocks/epilogue.cuh", r" && row < q_len\b", ""),
    "racecheck": ("forward/mma.cuh", _LOOP_TOP, r"\1"),
    "synccheck": ("forward/mma.cuh", _LOOP_TOP, r"\1if (thread_idx() % 32 < 16) sync_cta();"),
}
"""Tool -> (file, pattern, replacement) of the fault that it must find."""

_SUMMARY = re.compile(r"^=+ (?:RACECHECK|ERROR) SUMMARY: (\d+)\D.*$", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """What one run under the sanitizer said: "clean", "found", "wrong" or "nothing", and why."""

    word: str
    text: str


def judge(code: int | None, output: str) -> Outcome:
    """The meaning of a run's exit code (None: out of time) and output."""
    summaries = [(int(found[1]), found[0].strip("= ")) for found in _SUMMARY.finditer(output)]
    findings = [text for count, text in summaries if count]
    if findings:
        return Outcome("found", findings[-1])
    if code is None:
        return Outcome("nothing", "out of time")
    if code == FOUND:
        return Outcome("found", "the sanitizer's exit code says so")
    if code:
        return Outcome("wrong", f"exit code {code}: {(output.strip().splitlines() or ['no output'])[-1]}")
    if not summaries:
        return Outcome("nothing", "the sanitizer wrote no summary")
    done = re.search(r"^worker: (\d+) launches$", output, re.MULTILINE)
    if done is None or done[1] == "0":
        return Outcome("nothing", "no kernel was launched")
    return Outcome("clean", f"{summaries[-1][1]}, {done[1]} launches")


def run(program: str, tool: str, words: Sequence[str], seconds: float) -> tuple[Outcome, str]:
    """This file as a worker under the sanitizer."""
    command = [program, *verifier.sanitizer_options(tool, FOUND), sys.executable, str(Path(__file__).resolve()), *words]
    # Without torch's cache every tensor is an allocation of its own, and the byte behind it is nobody's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "FMHA_BUILD_ON_DEMAND": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the group that start_new_session made
            process.wait()
            code = None
        log.seek(0)
        output = log.read()
    return judge(code, output), output


# --- the worker: what runs under the sanitizer


def work(spec: KernelSpec, tool: str, mutant: bool, quick: bool) -> int:
    """Launches a kernel on its cases, or a faulty copy of it once; returns the exit code."""
    runner = Counting(load_mutant(tool) if mutant else obtain.kernel(spec, device="cuda:0"), spec)
    wrong = False
    if mutant:
        import torch

        q, k = (torch.randn(1, rows, 1, spec.head_dim, device="cuda").bfloat16() for rows in (113, 203))
        runner(q, k, k, return_lse=True)
        driver.synchronize(0)
    else:
        wanted = {Op.PACK: PACK_CASES, Op.APPEND: APPEND_CASES}.get(spec.op, CASES)
        for case in verifier.cases(spec):
            if case.id in (wanted[:2] if quick else wanted):
                # The reference on the CPU: beside its fp64 kernels on the same GPU racecheck (2025.3.1, case 90) ends
                # in "Internal Sanitizer Error: failed to handle a hardware exception", though it is to see fmha_* only.
                result = verifier.check_case(spec, case, "cuda:0", runner, reference_device="cpu")
                wrong = wrong or result.word != "ok"
                for failure in result.failures:
                    print(f"worker: case {case.id}: {failure}")
    print(f"worker: {runner.launches} launches", flush=True)
    return 1 if wrong else 0


class Counting:
    """A runner for verification whose q, k and v have nothing behind them, and that counts. Masks stay as they are."""

    def __init__(self, kernel: Any, spec: KernelSpec) -> None:
        self.kernel, self.spec, self.launches = kernel, spec, 0

    def __call__(self, q: Any, k: Any, v: Any = None, *more: Any, **options: Any) -> Any:
        import torch

        self.launches += 1
        if self.spec.op is Op.APPEND:
            return appender.run(self.kernel, q, k, v, *more)
        if self.spec.op is Op.PACK:
            return packer.run(self.kernel, q, k, **options)
        exact = (x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
        return direct.run(self.kernel, self.spec, *exact, **options)


def mutate(tool: str, folder: Path) -> None:
    """A copy of the kernel sources, ``folder/fmha``, with the fault that the tool must find."""
    shutil.copytree(config.kernel_src() / "fmha", folder / "fmha")
    name, pattern, replacement = MUTANTS[tool]
    text, count = re.subn(pattern, replacement, (folder / "fmha" / name).read_text())
    if count != 1:
        raise SystemExit(f"{pattern!r} matches {count} times in {name}, not once: the mutant must follow the kernel")
    (folder / "fmha" / name).write_text(text)


def load_mutant(tool: str) -> Any:
    """The faulty kernel, compiled to PTX and finished by the driver."""
    spec = KernelSpec.parse(MUTANT_SPEC)
    with tempfile.TemporaryDirectory() as folder:
        mutate(tool, Path(folder))
        config.kernel_src = lambda: Path(folder)  # type: ignore[assignment]
        return obtain.kernel(spec, device="cuda:0", via="ptx", tile=catalog.tile(spec))


# --- the command


@click.command(help=__doc__)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--tool", "tools", multiple=True, type=click.Choice(verifier.SANITIZERS), help="Default: all three.")
@click.option("--seconds", default=120.0, show_default=True, help="Limit of one run.")
@click.option("--quick", is_flag=True, help="Two cases instead of six.")
@click.option("--no-mutants", is_flag=True, help="Do not first check that the tool finds a known fault.")
@click.option("--logs", type=click.Path(path_type=Path), help="Folder for the whole output of each run.")
@click.option("--worker", hidden=True, help="Internal: be the process that is watched.")
@click.option("--mutant", is_flag=True, hidden=True)
def main(
    names: tuple[str, ...], tools: tuple[str, ...], seconds: float, quick: bool, no_mutants: bool,
    logs: Path | None, worker: str | None, mutant: bool,
) -> None:  # fmt: skip
    try:
        specs = [KernelSpec.parse(name) for name in (MUTANT_SPEC,) * mutant or names or KERNELS]
        if worker is not None:
            raise SystemExit(work(specs[0], worker, mutant, quick))
        for spec in specs:
            catalog.tile(spec)  # says at once when there is no such kernel
    except FmhaError as error:
        raise click.UsageError(str(error)) from None
    program = shutil.which("compute-sanitizer")
    if program is None or not driver.available():
        click.echo("compute-sanitizer and a GPU are needed; the former comes with the CUDA toolkit", err=True)
        raise SystemExit(3)
    bad = 0
    for tool in tools or verifier.SANITIZERS:
        jobs = [] if no_mutants else [("faulty copy", ["--worker", tool, "--mutant"], "found")]
        more = ["--quick"] if quick else []
        jobs += [(spec.name, ["--worker", tool, spec.name, *more], "clean") for spec in specs]
        for label, words, wanted in jobs:
            begin = time.monotonic()
            outcome, output = run(program, tool, words, seconds)
            good = outcome.word == wanted
            bad += not good
            took = time.monotonic() - begin
            click.echo(f"{'ok  ' if good else 'FAIL'}  {tool:9}  {label}  {outcome.word}: {outcome.text}  {took:.0f} s")
            if logs is not None:
                logs.mkdir(parents=True, exist_ok=True)
                (logs / f"{tool}_{label.replace(' ', '_')}.txt").write_text(output)
            if not good:
                click.echo("\n".join(f"      {line}" for line in output.splitlines()[:30]))
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()

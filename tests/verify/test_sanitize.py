# SPDX-License-Identifier: Apache-2.0
"""tools/sanitize.py: what it makes of a sanitizer's output, and that its planted faults are faults."""

from __future__ import annotations

import importlib.util
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers import ROOT

from fmha_runtime.device import driver
from fmha_runtime.errors import EmulatorFault
from fmha_runtime.kernels import catalog, sources
from fmha_runtime.kernels.spec import KernelSpec, Op
from fmha_runtime.ops import obtain
from fmha_runtime.ops.forward import direct
from fmha_runtime.ops.forward.cases import cases
from fmha_runtime.ops.forward.check import CaseResult, Failure
from fmha_runtime.ops.pack import cases as verify_pack

TOOL = ROOT / "tools" / "sanitize.py"
pytestmark = pytest.mark.skipif(not TOOL.exists(), reason="needs the checkout")


@pytest.fixture(scope="module")
def tool() -> Any:
    found = importlib.util.spec_from_file_location("sanitize", TOOL)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["sanitize"] = module
    found.loader.exec_module(module)
    return module


CLEAN = "========= COMPUTE-SANITIZER\nworker: 18 launches\n========= ERROR SUMMARY: 0 errors\n"
RACE = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"


@pytest.mark.parametrize(
    ("code", "output", "word"),
    [
        (0, CLEAN, "clean"),
        (0, CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed"), "clean"),
        (97, CLEAN.replace("0 errors", "3 errors"), "found"),
        (0, CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 1 hazard displayed"), "found"),
        (97, "", "found"),
        (None, RACE, "found"),
        (None, CLEAN, "nothing"),
        (1, CLEAN, "wrong"),
        (0, "worker: 18 launches\n", "nothing"),
        (0, CLEAN.replace("18", "0"), "nothing"),
        (0, "========= ERROR SUMMARY: 0 errors\n", "nothing"),
    ],
)
def test_what_a_run_means(tool: Any, code: int | None, output: str, word: str) -> None:
    assert tool.judge(code, output).word == word


@pytest.mark.emulator
@pytest.mark.parametrize("name", ["memcheck", "racecheck", "synccheck"])
def test_planted_faults_are_faults(tool: Any, name: str, tmp_path: Path) -> None:
    """A pattern that the kernel has left behind fails here, before the GPU sees it."""
    tool.mutate(name, tmp_path)
    spec = KernelSpec.parse(tool.MUTANT_SPEC)
    kernel = obtain.from_source(sources.render(spec, catalog.tile(spec)), spec.name, [tmp_path / "fmha"])
    q, k = (torch.randn(1, rows, 1, spec.head_dim).bfloat16() for rows in (113, 203))
    with pytest.raises(EmulatorFault):
        direct.run(kernel, spec, q, k, k, return_lse=True)


def test_the_cases_are_small_and_of_every_kind(tool: Any) -> None:
    packed = [c for c in verify_pack.cases() if c.id in tool.PACK_CASES]
    assert {bool(c.lens) for c in packed} == {True, False} and max(c.rows * c.cols for c in packed) < 30_000
    assert packed[0].layout == "contiguous" and packed[0].cols % 16 and len({c.layout for c in packed}) == 4
    for name in tool.KERNELS:
        spec = KernelSpec.parse(name)
        if spec.op is Op.PACK:
            continue
        chosen = [c for c in cases(spec) if c.id in tool.CASES]
        assert len(chosen) == len(tool.CASES) and all(c.products(spec) <= 60_000 for c in chosen)
        assert {c.varlen for c in chosen} == {c.causal for c in chosen} == {True, False}
        for of in (lambda c: c.window, lambda c: c.sinks, lambda c: c.chunk, lambda c: 0 in c.lens_k):
            assert any(map(of, chosen))
        assert max(c.lens_k[0] for c in chosen) > 128 and max(c.lens_q[0] for c in chosen) >= 128


SCRIPT = """\
#!{python}
import sys
tool, words = sys.argv[2], sys.argv[5:]
assert sys.argv[3:5] == ["--kernel-name", "kns=fmha_"], sys.argv
assert (["--racecheck-report", "all"] == sys.argv[7:9]) == (tool == "racecheck"), sys.argv
mutant, quiet = "--mutant" in words, tool == "{blind}"
if "{hangs}" in words:
    import time; time.sleep(60)
found = mutant and not quiet or "{racy}" in words
print("worker: 3 launches")
print(f"========= ERROR SUMMARY: {{int(found)}} errors")
sys.exit(97 if found else 0)
"""


@pytest.mark.parametrize("wrong", [False, True])
def test_kernels_run_on_the_gpu_and_references_on_the_cpu(
    tool: Any, monkeypatch: Any, capsys: Any, wrong: bool
) -> None:
    asked = []

    def check_case(spec: KernelSpec, case: Any, device: str, runner: Any, reference_device: str | None = None) -> Any:
        asked.append((case.id, device, reference_device))
        runner.launches += 1
        failures = (Failure("output", "off"),) if wrong else ()
        return CaseResult(case, "FAIL" if wrong else "ok", failures=failures)

    monkeypatch.setattr(tool.obtain, "kernel", lambda spec, device: None)
    monkeypatch.setattr(tool.verifier, "check_case", check_case)
    code = tool.work(KernelSpec.parse("fmha_fwd_sm90a_bf16_d64_packed"), "racecheck", False, False)
    assert asked == [(i, "cuda:0", "cpu") for i in tool.CASES]
    output = capsys.readouterr().out + CLEAN.splitlines()[-1] + "\n"
    assert (code, tool.judge(code, output).word) == ((1, "wrong") if wrong else (0, "clean"))
    assert ("worker: case 90: output: off" in output) == wrong


def fake(folder: Path, monkeypatch: Any, blind: str = "-", racy: str = "-", hangs: str = "-") -> None:
    """A compute-sanitizer that runs nothing and says what the test wants."""
    path = folder / "compute-sanitizer"
    path.write_text(textwrap.dedent(SCRIPT).format(python=sys.executable, blind=blind, racy=racy, hangs=hangs))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(driver, "available", lambda: True)


def test_a_clean_run(tool: Any, tmp_path: Path, monkeypatch: Any) -> None:
    fake(tmp_path, monkeypatch)
    result = CliRunner().invoke(tool.main, ["--logs", str(tmp_path / "logs")])
    assert result.exit_code == 0, result.output
    assert len(result.output.splitlines()) == 3 * (1 + len(tool.KERNELS))
    assert len(list((tmp_path / "logs").iterdir())) == 3 * (1 + len(tool.KERNELS))


def test_a_finding_fails(tool: Any, tmp_path: Path, monkeypatch: Any) -> None:
    fake(tmp_path, monkeypatch, racy="fmha_fwd_sm90a_bf16_d64")
    result = CliRunner().invoke(tool.main, ["--tool", "racecheck"])
    assert result.exit_code == 1
    assert "FAIL  racecheck  fmha_fwd_sm90a_bf16_d64  found" in result.output
    assert result.output.count("FAIL") == 1


def test_a_tool_that_finds_no_planted_fault_is_not_believed(tool: Any, tmp_path: Path, monkeypatch: Any) -> None:
    fake(tmp_path, monkeypatch, blind="synccheck")
    result = CliRunner().invoke(tool.main, [])
    assert result.exit_code == 1 and "FAIL  synccheck  faulty copy  clean" in result.output


def test_a_run_ends_in_time(tool: Any, tmp_path: Path, monkeypatch: Any) -> None:
    fake(tmp_path, monkeypatch, hangs=tool.KERNELS[0])
    result = CliRunner().invoke(tool.main, [tool.KERNELS[0], "--tool", "memcheck", "--no-mutants", "--seconds", "1"])
    assert result.exit_code == 1 and "out of time" in result.output


def test_usage_and_environment(tool: Any, tmp_path: Path, monkeypatch: Any) -> None:
    assert CliRunner().invoke(tool.main, ["fmha_fwd_sm90_bf16_d7"]).exit_code == 2
    monkeypatch.setenv("PATH", str(tmp_path))
    assert CliRunner().invoke(tool.main, []).exit_code == 3

# SPDX-License-Identifier: Apache-2.0
"""The program ``fmha``: exit codes, clean stdout, errors of one sentence that say what to do next."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.program import fmha

import fmha_runtime
from fmha_runtime.errors import (
    ArtifactError,
    BuildError,
    DriverError,
    InputError,
    KernelNotBuilt,
    ToolchainError,
    UnsupportedProblem,
)
from fmha_runtime.kernels import store


def test_list_needs_neither_torch_nor_a_gpu(tmp_path):
    blocked = tmp_path / "torch.py"
    blocked.write_text("raise ImportError('blocked')\n")
    (tmp_path / "cuda.py").write_text("raise ImportError('blocked')\n")
    path = os.pathsep.join([str(tmp_path), str(Path(fmha_runtime.__file__).parents[1])])
    for words in (["list"], ["doctor"], ["explain", "d=64", "dtype=bf16", "--arch", "sm80"]):
        done = subprocess.run(
            [sys.executable, "-m", "fmha_runtime", *words],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        # What the doctor finds depends on the machine; that it reports does not.
        assert done.returncode in ({0, 3, 4} if words == ["doctor"] else {0}), done.stderr
        assert done.stdout
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_no_gpu_is_exit_3(command, no_gpu):
    pytest.importorskip("torch", reason="torch is not installed")
    result = fmha(command)
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "no CUDA driver" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("bad; do this"), 2),
        (UnsupportedProblem("no; do this"), 2),
        (BuildError("failed; do this"), 1),
        (KernelNotBuilt("missing; do this", name="x", command="fmha build x"), 1),
        (DriverError("no driver; do this"), 3),
        (ToolchainError("no nvcc; do this"), 3),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 3),
        (ArtifactError("corrupt; do this"), 4),
        (ZeroDivisionError("oops"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(monkeypatch, error, code):
    def fail():
        raise error

    monkeypatch.setattr(store, "rows", fail)
    monkeypatch.delenv("FMHA_DEBUG", raising=False)
    result = fmha("list")
    assert result.exit_code == code
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr
    if isinstance(error, ModuleNotFoundError):
        assert "pip install torch" in result.stderr
    if isinstance(error, ZeroDivisionError):
        assert "FMHA_DEBUG=1" in result.stderr


def test_debug_shows_the_traceback(monkeypatch):
    def fail():
        raise InputError("bad")

    monkeypatch.setattr(store, "rows", fail)
    monkeypatch.setenv("FMHA_DEBUG", "1")
    assert isinstance(fmha("list").exception, InputError)


def test_bad_option_is_exit_2():
    assert fmha("list", "--arch", "sm70").exit_code == 2
    assert fmha("lst").exit_code == 2


def test_version_and_help():
    assert fmha_runtime.__version__ in fmha("--version").stdout
    text = fmha("--help").stdout
    for command in ("list", "explain", "build", "verify", "bench", "tune", "inspect", "doctor", "cache"):
        assert re.search(rf"^  {command} ", text, re.MULTILINE)
        assert fmha(command, "--help").exit_code == 0

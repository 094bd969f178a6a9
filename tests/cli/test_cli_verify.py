# SPDX-License-Identifier: Apache-2.0
"""``fmha verify``: emulator, GPU and one case; what it says of a failure."""

from __future__ import annotations

import json
import os
import sys

import pytest
from helpers.program import PLAIN, SMALL, fmha, names

from fmha_runtime.errors import KernelNotBuilt
from fmha_runtime.kernels.spec import Arch


@pytest.mark.emulator
def test_verify_on_the_emulator():
    pytest.importorskip("torch", reason="torch is not installed")
    result = fmha("verify", SMALL, "--device", "emulator", "--quick", "--json")
    assert result.exit_code == 0, result.stderr
    (item,) = json.loads(result.stdout)["items"]
    assert item["ok"]
    assert item["how"] == "emulator"
    assert item["passed"] > 5
    assert "1 of 1 kernels ok on emulator" in result.stderr


@pytest.mark.emulator
def test_verify_replays_one_case():
    pytest.importorskip("torch", reason="torch is not installed")
    result = fmha("verify", "--case", f"{SMALL}/3", "--device", "emulator")
    assert result.exit_code == 0, result.stderr
    assert "1 of 1 cases" in result.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["--record", "--quick"],
        ["--record", "--case", f"{SMALL}/3"],
        ["--device", "tpu"],
        ["--case", "fmha_fwd_sm80_bf16_d32", "--device", "emulator"],
        ["--sanitizer", "valgrind"],
    ],
)
def test_verify_usage(words):
    result = fmha("verify", *words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


def test_the_default_arch_is_the_gpus(hopper, monkeypatch):
    from fmha_runtime.verify import run as verifier

    asked = []

    def run(spec, **options):
        asked.append((spec, options["device"], options["via"]))
        raise KernelNotBuilt("not built; run `fmha build`", name=spec.name, command="fmha build")

    monkeypatch.setattr(verifier, "verify_kernel", run)
    result = fmha("verify", "--head-dim", "64", *PLAIN)
    assert result.exit_code == 1
    wanted = {f"fmha_fwd_{target}_{dtype}_d64" for target in ("sm90", "sm90a") for dtype in ("bf16", "fp16")}
    wanted |= {f"fmha_decode_sm90_{dtype}_d64" for dtype in ("bf16", "fp16")}
    assert sorted((spec.name, device, via) for spec, device, via in asked) == [
        (name, "cuda:0", "cubin") for name in sorted(wanted)
    ]
    assert names(result) == ["FAIL"] * 6
    asked.clear()
    fmha("verify", "--arch", "sm80", "--head-dim", "64", "--via", "ptx", "--device", "cuda:1")
    assert {(spec.arch, device, via) for spec, device, via in asked} == {(Arch.SM80, "cuda:1", "ptx")}
    assert "fmha_fwd_sm90_bf16_d64" in fmha("explain", "d=64", "dtype=bf16").stdout


@pytest.mark.emulator
def test_verify_reports_failure(monkeypatch):
    pytest.importorskip("torch", reason="torch is not installed")
    from fmha_runtime.ops.forward import direct

    run = direct.run
    monkeypatch.setattr(direct, "run", lambda *args, **options: run(*args, **{**options, "causal": False}))
    result = fmha("verify", SMALL, "--device", "emulator", "--quick")
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert f"fmha verify --case {SMALL}/" in result.stdout


def test_sanitizer_replaces_the_process(monkeypatch):
    from fmha_runtime.verify import run as verifier

    called = []
    monkeypatch.setattr(verifier.shutil, "which", lambda name: f"/opt/{name}")
    monkeypatch.setattr(os, "execvp", lambda file, argv: called.append(argv) or sys.exit(0))
    words = ["verify", SMALL, "--sanitizer", "memcheck", "--quick"]
    monkeypatch.setattr(sys, "argv", ["fmha", *words])
    assert fmha(*words).exit_code == 0
    (argv,) = called
    assert argv[0] == "/opt/compute-sanitizer"
    assert "memcheck" in argv
    assert argv[-5:] == ["verify", SMALL, "--quick", "--reference-device", "cpu"]

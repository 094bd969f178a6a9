# SPDX-License-Identifier: Apache-2.0
"""``fmha doctor`` always reports, names what is broken and the command that repairs it."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from fmha_runtime import cli, config, doctor, manifest
from fmha_runtime.spec import KernelSpec

SMALL = "fmha_fwd_sm80_bf16_d32"


@pytest.fixture
def own_cache(own_cache, tmp_path, monkeypatch):
    """As in conftest.py, and without the package's cubins, which a developer may have built."""
    monkeypatch.setattr(config, "package_root", lambda: tmp_path / "package")
    return own_cache


def values(found, section):
    return {label: value for part, label, value in found.lines if part == section}


def test_report(own_cache):
    found = doctor.examine()
    sections = list(dict.fromkeys(section for section, _, _ in found.lines))
    assert sections[:5] == ["package", "python", "driver", "toolchain", "cubins"]
    assert str(own_cache) in values(found, "cubins")["cache"]
    assert found.text()[-1 - 2 * len(found.problems)] == f"problems: {len(found.problems)}"
    assert not own_cache.exists(), "looking must not create the cache"


def test_json_and_exit_code(own_cache):
    result = CliRunner().invoke(cli.main, ["doctor", "--json"])
    body = json.loads(result.stdout)
    assert {"schema", "version", "items", "problems"} <= body.keys()
    assert all({"section", "label", "value"} <= item.keys() for item in body["items"])
    assert result.exit_code == max((one["code"] for one in body["problems"]), default=0)


def test_installed_is_not_loaded(own_cache):
    """Versions come from metadata: asking does not import torch."""
    import subprocess
    import sys

    code = (
        "import sys; from fmha_runtime import doctor; found = doctor.examine();"
        "assert 'torch' not in sys.modules; assert any(label == 'torch' for _, label, _ in "
        "found.lines)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_broken_cubin_is_exit_4(own_cache, fake_nvcc):
    CliRunner().invoke(cli.main, ["build", SMALL])
    path = manifest.find(KernelSpec.parse(SMALL)).path
    path.write_bytes(path.read_bytes()[:-1])
    found = doctor.examine()
    assert found.exit_code == 4
    (problem,) = [problem for problem in found.problems if problem.code == 4]
    assert SMALL in problem.text
    assert problem.command == f"fmha build --force {SMALL}"


def test_an_unreadable_row_is_exit_4(own_cache, fake_nvcc):
    CliRunner().invoke(cli.main, ["build", SMALL])
    path = manifest.find(KernelSpec.parse(SMALL)).path
    (path.parent / manifest.ROW).write_text("{")
    found = doctor.examine()
    assert found.exit_code == 4
    assert "fmha cache prune" in [problem.command for problem in found.problems]


def test_an_nvcc_that_does_not_run_is_a_problem(own_cache, monkeypatch):
    monkeypatch.setenv("FMHA_NVCC", "/nowhere/nvcc")
    found = doctor.examine()
    assert found.exit_code == 3
    assert values(found, "variables")["FMHA_NVCC"] == "/nowhere/nvcc"
    assert any("FMHA_NVCC" in problem.text for problem in found.problems)


def test_a_bad_variable_is_a_problem(own_cache, monkeypatch):
    monkeypatch.setenv("FMHA_BUILD_JOBS", "lots")
    found = doctor.examine()
    assert "unset FMHA_BUILD_JOBS" in [problem.command for problem in found.problems]


def test_a_crashing_probe_does_not_stop_the_others(own_cache, monkeypatch):
    def crash(found):
        yield "before", "this line stays"
        raise RuntimeError("probe fell over")

    probes = (("broken", crash), *doctor._PROBES)
    monkeypatch.setattr(doctor, "_PROBES", probes)
    found = doctor.examine()
    assert values(found, "broken") == {
        "before": "this line stays",
        "failed": "RuntimeError: probe fell over",
    }
    assert values(found, "python")


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"arch": "sm90", "gpus": 1, "driver": 13, "nvcc": None}, "there is no nvcc"),
        ({"arch": "sm90", "gpus": 1, "driver": 12, "nvcc": "13.0.88"}, "ahead of the driver"),
        ({"gpus": 0, "cxx": False}, "no kernel can run here"),
    ],
)
def test_the_whole_picture(state, text):
    found = doctor.Diagnosis(**{"cxx": True, **state})
    found.problems.append(doctor.Problem("nothing built", "fmha build --arch sm90", 4))
    doctor._conclude(found)
    assert any(text in problem.text and problem.command for problem in found.problems)


def test_a_gpu_without_kernels_is_a_problem(own_cache):
    found = doctor.Diagnosis(arch="sm90", gpus=1)
    list(doctor._cubins(found))
    assert [problem.command for problem in found.problems] == ["fmha build --arch sm90"]

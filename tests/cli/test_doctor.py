# SPDX-License-Identifier: Apache-2.0
"""``fmha doctor`` always reports, names what is broken and the command that repairs it."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner

from fmha_runtime import config
from fmha_runtime.cli import diagnosis
from fmha_runtime.cli import program as cli
from fmha_runtime.kernels import code_hash, manifest, sources, store
from fmha_runtime.kernels.spec import Arch, KernelSpec

SMALL = "fmha_fwd_sm80_bf16_d32"


@pytest.fixture
def own_cache(own_cache, tmp_path, monkeypatch):
    """As in conftest.py, and the package as a fresh clone has it, without cubins that a developer may have built."""
    for folder in ("manifest", "verified"):
        shutil.copytree(config.package_root() / folder, tmp_path / "package" / folder)
    monkeypatch.setattr(config, "package_root", lambda: tmp_path / "package")
    return own_cache


def values(found, section):
    return {label: value for part, label, value in found.lines if part == section}


def test_report(own_cache):
    found = diagnosis.examine()
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
        "import sys; from fmha_runtime.cli import diagnosis; found = diagnosis.examine();"
        "assert 'torch' not in sys.modules; assert any(label == 'torch' for _, label, _ in "
        "found.lines)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_broken_cubin_is_exit_4(own_cache, fake_nvcc):
    CliRunner().invoke(cli.main, ["build", SMALL])
    path = store.find(KernelSpec.parse(SMALL)).path
    path.write_bytes(path.read_bytes()[:-1])
    found = diagnosis.examine()
    assert found.exit_code == 4
    (problem,) = [problem for problem in found.problems if problem.code == 4]
    assert SMALL in problem.text
    assert problem.command == f"fmha build --force {SMALL}"


def test_an_unreadable_row_is_exit_4(own_cache, fake_nvcc):
    CliRunner().invoke(cli.main, ["build", SMALL])
    path = store.find(KernelSpec.parse(SMALL)).path
    (path.parent / manifest.ROW).write_text("{")
    found = diagnosis.examine()
    assert found.exit_code == 4
    assert "fmha cache prune" in [problem.command for problem in found.problems]


def test_an_nvcc_that_does_not_run_is_a_problem(own_cache, monkeypatch):
    monkeypatch.setenv("FMHA_NVCC", "/nowhere/nvcc")
    found = diagnosis.examine()
    assert found.exit_code == 3
    assert values(found, "variables")["FMHA_NVCC"] == "/nowhere/nvcc"
    assert any("FMHA_NVCC" in problem.text for problem in found.problems)


def test_a_bad_variable_is_a_problem(own_cache, monkeypatch):
    monkeypatch.setenv("FMHA_BUILD_JOBS", "lots")
    found = diagnosis.examine()
    assert "unset FMHA_BUILD_JOBS" in [problem.command for problem in found.problems]


def test_a_crashing_probe_does_not_stop_the_others(own_cache, monkeypatch):
    def crash(found):
        yield "before", "this line stays"
        raise RuntimeError("probe fell over")

    probes = (("broken", crash), *diagnosis._PROBES)
    monkeypatch.setattr(diagnosis, "_PROBES", probes)
    found = diagnosis.examine()
    assert values(found, "broken") == {
        "before": "this line stays",
        "failed": "RuntimeError: probe fell over",
    }
    assert values(found, "python")


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"arch": Arch.SM90, "gpus": 1, "driver": 13, "nvcc": None}, "there is no nvcc"),
        ({"arch": Arch.SM90, "gpus": 1, "driver": 12, "nvcc": "13.0.88"}, "ahead of the driver"),
        ({"gpus": 0, "cxx": False}, "no kernel can run here"),
    ],
)
def test_the_whole_picture(state, text):
    found = diagnosis.Diagnosis(**{"cxx": True, **state})
    found.problems.append(diagnosis.Problem("nothing built", "fmha build --arch sm90", 4))
    diagnosis._conclude(found)
    assert any(text in problem.text and problem.command for problem in found.problems)


def problems(found):
    list(diagnosis._cubins(found))
    return [(problem.code, problem.command) for problem in found.problems]


def test_a_gpu_without_kernels_is_a_problem(own_cache):
    assert problems(diagnosis.Diagnosis(arch=Arch.SM90, gpus=1)) == [(3, "fmha build --arch sm90a --arch sm90")]
    assert problems(diagnosis.Diagnosis(arch=Arch.SM89, gpus=1)) == [(3, "fmha build --arch sm89")]


@pytest.mark.parametrize("name", ["fmha_fwd_sm90a_bf16_d64", "fmha_fwd_sm90_bf16_d64"])
def test_kernels_of_either_target_serve_a_hopper_gpu(own_cache, fake_nvcc, name):
    assert CliRunner().invoke(cli.main, ["build", name]).exit_code == 0
    assert problems(diagnosis.Diagnosis(arch=Arch.SM90, gpus=1)) == []


def test_a_flipped_bit_is_a_problem(own_cache, fake_nvcc):
    CliRunner().invoke(cli.main, ["build", SMALL])
    path = store.find(KernelSpec.parse(SMALL)).path
    image = bytearray(path.read_bytes())
    image[7] ^= 4
    path.write_bytes(image)
    assert store.state(KernelSpec.parse(SMALL)).word == "ready"  # its size is right
    found = diagnosis.examine()
    assert found.exit_code == 4
    (problem,) = [problem for problem in found.problems if problem.code == 4]
    assert "SHA-256" in problem.text and problem.command == f"fmha build --force {SMALL}"


@pytest.mark.parametrize("damage", ["text", "gone"])
def test_a_packaged_manifest_that_is_damaged_or_gone_is_a_problem(own_cache, damage):
    root = config.package_root()
    if damage == "text":
        (root / "manifest" / "fwd_sm90.json").write_text('{"schema": 2, "rows": [')
    else:
        shutil.rmtree(root / "manifest")
    found = problems(diagnosis.Diagnosis(gpus=1))
    assert [code for code, _ in found] == [4]
    assert "pip install --force-reinstall" in found[0][1]


@pytest.mark.parametrize("package", ["cuda-bindings", "numpy", "click", "rich"])
def test_a_missing_dependency_is_a_problem(own_cache, monkeypatch, package):
    version = diagnosis.metadata.version

    def gone(name):
        if name == package:
            raise diagnosis.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(diagnosis.metadata, "version", gone)
    found = diagnosis.examine()
    (problem,) = [problem for problem in found.problems if package in problem.text]
    assert found.exit_code == 3 and problem.command.startswith(f"pip install '{package}")


@pytest.mark.parametrize("command", ["list", "doctor"])
def test_tables_are_read_once(own_cache, monkeypatch, command):
    """What makes `fmha list` and `fmha doctor` fast: their time grows with the rows, not with rows times rows."""
    read, tables, lexed = manifest.read_table, [], []
    monkeypatch.setattr(manifest, "read_table", lambda path, label="": tables.append(path) or read(path, label))
    lexer = code_hash._read
    monkeypatch.setattr(code_hash, "_read", lambda path: lexed.append(path) or lexer(path))
    sources._flattener.cache_clear()
    assert CliRunner().invoke(cli.main, [command]).exit_code in (0, 3)
    assert len(tables) == len(set(tables)) > 5
    # The kernels' headers once, and over the emulator's twins once more.
    assert max((lexed.count(path) for path in lexed), default=0) <= 2


def test_a_missing_table_is_a_problem(own_cache):
    (config.package_root() / "manifest" / "pack_sm80.json").unlink()
    found = CliRunner().invoke(cli.main, ["doctor"])
    assert found.exit_code == 4
    assert "pack_sm80.json" in found.output


def test_a_missing_ledger_is_a_problem(own_cache):
    shutil.rmtree(config.package_root() / "verified")
    found = CliRunner().invoke(cli.main, ["doctor"])
    assert found.exit_code == 4
    assert "nothing counts as verified" in found.output


def test_a_missing_header_is_a_problem(own_cache, monkeypatch, tmp_path):
    source = tmp_path / "kernel_src"
    shutil.copytree(config.kernel_src(), source)
    next(source.rglob("mask.cuh")).unlink()
    monkeypatch.setattr(config, "kernel_src", lambda: source)
    found = CliRunner().invoke(cli.main, ["doctor"])
    assert found.exit_code == 4
    assert "mask.cuh" in found.output

# SPDX-License-Identifier: Apache-2.0
"""A wheel with cubins installs on a machine without nvcc, and its kernels are ready there."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import sysconfig
import zipfile

import pytest
from helpers import ROOT

from fmha_runtime.device import driver
from fmha_runtime.errors import ArtifactError, InputError
from fmha_runtime.kernels.spec import Arch, DType
from fmha_runtime.problem import dispatch

_spec = importlib.util.spec_from_file_location("cubin_wheel", ROOT / "tools" / "wheel.py")
tool = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)  # by path: there is a library called wheel
_spec.loader.exec_module(tool)

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="needs the checkout that the wheel is built from"
)
SMALL = ("fmha_fwd_sm80_fp16_d32", "fmha_fwd_sm90_bf16_d32")


def kernels():
    """Two small ones; where there is a GPU, what plain attention at head dim 32 asks for there."""
    if not driver.available():
        return SMALL
    arch = Arch.for_capability(*driver.capability(0))
    return tuple(spec.name for spec in dispatch.kernels(dispatch.Problem(arch, DType.BF16, 32, 32)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The wheel, of kernels that were compiled for it."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("cubin_wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMHA_CACHE_DIR", str(folder / "cache"))
        patch.delenv("FMHA_CUBIN_DIR", raising=False)
        return tool.make(tool.compiled(tool.select([], kernels())), folder / "dist")


@pytest.fixture(scope="module")
def python(made, tmp_path_factory):
    """The interpreter of a fresh environment with the wheel; its requirements are those of this environment."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    interpreter = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run([*pip, made.path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")  # searched after its own
    return interpreter


def run(python, tmp_path, *arguments):
    # FMHA_NVCC is the only nvcc that is looked for once it is set, and this one does not exist.
    variables = {"PATH": "/usr/bin:/bin", "FMHA_NVCC": "/nowhere/nvcc", "FMHA_CACHE_DIR": str(tmp_path / "cache")}
    return subprocess.run(
        [python, *arguments], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )


@pytest.mark.nvcc
def test_the_wheel_says_what_it_carries(made):
    label = ".".join(sorted({row.spec.arch.value for row in made.rows}))
    assert f"+{label}-py3-none-any.whl" in made.path.name
    with zipfile.ZipFile(made.path) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        assert f"+{label}\n" in archive.read(metadata).decode() and f"+{label}.dist-info" in metadata
    cubins = sorted(name for name in names if name.endswith(".cubin"))
    assert cubins == sorted(f"{tool.INSIDE}/{row.spec.arch.value}/{row.spec.name}.cubin" for row in made.rows)
    assert made.size == made.path.stat().st_size and made.cubins == sum(row.size for row in made.rows)


@pytest.mark.nvcc
def test_its_kernels_are_ready_where_there_is_no_nvcc(python, made, tmp_path):
    done = run(python, tmp_path, "-m", "fmha_runtime", "list", "--json")
    assert done.returncode == 0, done.stderr
    items = json.loads(done.stdout)["items"]
    ready = {item["name"] for item in items if item["state"] == "ready"}
    assert ready == {row.spec.name for row in made.rows}
    where = run(python, tmp_path, "-c", "import fmha_runtime; print(fmha_runtime.__file__)").stdout
    assert where.startswith(str(python.parent.parent))
    refused = run(python, tmp_path, "-m", "fmha_runtime", "build", "fmha_fwd_sm89_fp16_d64")
    assert refused.returncode == 3 and "nvcc" in refused.stderr
    built = run(python, tmp_path, "-m", "fmha_runtime", "build", made.rows[0].spec.name)
    assert built.returncode == 0 and "up to date" in built.stdout  # nothing is compiled, so nothing is missed


@pytest.mark.gpu
@pytest.mark.nvcc
def test_its_kernel_runs_where_there_is_no_nvcc(python, made, tmp_path):
    code = """
import torch, fmha_runtime as fmha
q, k, v = (torch.randn(2, 100, 4, 32, dtype=torch.bfloat16, device="cuda") for _ in range(3))
out = fmha.attention(q, k, v)
want = torch.nn.functional.scaled_dot_product_attention(*(x.float().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
assert (out.float() - want).abs().max() < 0.02, (out.float() - want).abs().max()
print("ran", fmha.explain(q, k, v).chosen.name)
"""
    done = run(python, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] in {row.spec.name for row in made.rows}


@pytest.mark.nvcc
def test_a_wheel_with_another_cubin_is_refused(made, tmp_path):
    bad = tmp_path / made.path.name
    with zipfile.ZipFile(made.path) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}
    cubin = next(name for name in files if name.endswith(".cubin"))
    tool._write(bad, {**files, cubin: files[cubin][:-1] + b"?"})
    with pytest.raises(ArtifactError, match="its row says"):
        tool.check(bad, made.rows)


def test_nothing_is_guessed():
    with pytest.raises(InputError, match='make wheel ARCHS="sm90a sm89"; the archs are sm80, sm86'):
        tool.select([], [])
    with pytest.raises(InputError, match="'sm75' is unknown; it is one of sm80"):
        tool.select(["sm75"], [])
    with pytest.raises(InputError, match="fmha_fwd_sm80_fp16_d100"):
        tool.select([], ["fmha_fwd_sm80_fp16_d100"])
    specs = tool.select(["sm89"], ["fmha_fwd_sm89_bf16_d64"])
    assert len(specs) == len(set(specs)) and {spec.arch for spec in specs} == {Arch.SM89}


def test_the_command_says_what_is_wrong(capsys):
    assert tool.main(["--arch", "sm75"]) == 2
    assert "error: arch 'sm75' is unknown" in capsys.readouterr().err

# SPDX-License-Identifier: Apache-2.0
"""The wheel is complete: away from the checkout it lists, finds its sources and builds."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="needs the checkout that the wheel is built from"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    # The back end directly: no isolated environment, so no network.
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel's content in a folder of its own (a pure wheel is installed by unpacking it)."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(installed, tmp_path, *arguments):
    # The checkout is not importable: no working folder on the path, and the wheel first.
    environment = {
        "PYTHONPATH": str(installed),
        "FMHA_CACHE_DIR": str(tmp_path / "cache"),
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "PYTHONSAFEPATH": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_one_wheel_for_every_platform(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 2 << 20


def test_content(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = [p.relative_to(ROOT) for p in (ROOT / "kernel_src").rglob("*") if p.is_file()]
    modules = [p.relative_to(ROOT) for p in (ROOT / "fmha_runtime").rglob("*.py")]
    wanted = {str(path) for path in modules} | {"fmha_runtime/py.typed"}
    wanted |= {f"fmha_runtime/_data/{path}" for path in sources if "__pycache__" not in path.parts}
    tables = [p.relative_to(ROOT) for p in (ROOT / "cubins").rglob("*.json")]
    assert len(tables) > 20
    wanted |= {f"fmha_runtime/_data/{path}" for path in tables}
    assert wanted <= names
    strangers = {name for name in names - wanted if ".dist-info/" not in name}
    assert not strangers
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_metadata_says_that_it_is_typed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    assert "Classifier: Typing :: Typed" in text and "Classifier: Operating System :: POSIX :: Linux" in text


def test_the_changelog_has_this_version(wheel):
    version = wheel.name.split("-")[1]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_library_runs_from_the_wheel(installed, tmp_path):
    code = """
import fmha_runtime
from fmha_runtime import config
from fmha_runtime.kernels import catalog, store
print(fmha_runtime.__file__, config.kernel_src(), config.package_root(), sep="\\n")
states = store.Inventory.of(catalog.enumerate_specs()).states
assert len(states) > 1000 and {(s.word, s.row is not None) for s in states.values()} == {("not built", True)}, states
"""
    done = run(installed, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(installed)) for line in done.stdout.splitlines())


def test_list_works_from_the_wheel(installed, tmp_path):
    done = run(installed, tmp_path, "-m", "fmha_runtime", "list", "--json")
    assert done.returncode == 0, done.stderr
    listing = json.loads(done.stdout)
    assert len(listing["items"]) > 1000
    assert sum(item["verified"]["state"] == "verified" for item in listing["items"]) > 400
    assert not (tmp_path / "cache").exists()


@pytest.mark.nvcc
def test_a_kernel_builds_from_the_wheel(installed, tmp_path):
    name = "fmha_fwd_sm80_fp16_d32"
    done = run(installed, tmp_path, "-m", "fmha_runtime", "build", name)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "cache").glob(f"{name}-*/{name}.cubin"))

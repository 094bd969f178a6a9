# SPDX-License-Identifier: Apache-2.0
"""The recipes in docs/recipes run as they stand.

The python blocks of a page are one script. Words behind ``python`` say what a block needs: ``gpu``, or a module. Pages
with such blocks, or whose blocks use a GPU where there is one, run as gpu tests too, from top to bottom. ``sh nvcc``
blocks run in bash; other shell blocks are for the reader only.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

from helpers import ROOT

PAGES = sorted((ROOT / "docs" / "recipes").glob("*.md"))


def blocks(page):
    """(language, what it needs, code) of every fenced block."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(head.split()[0] if head else "", set(head.split()[1:]), code) for head, code in found]


def script(page, gpu):
    """(the python blocks that run with or without a GPU, the modules they need); "" where a GPU changes nothing."""
    wanted = [(needs, code) for kind, needs, code in blocks(page) if kind == "python" and (gpu or "gpu" not in needs)]
    if gpu and not any("gpu" in needs or '"cuda"' in code for needs, code in wanted):
        return "", set()
    return "\n".join(code for _, code in wanted), set().union(*(needs - {"gpu"} for needs, _ in wanted))


def run(command, tmp_path, **environment):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables, timeout=500)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def pages_with(gpu):
    return [pytest.param(page, id=page.stem) for page in PAGES if script(page, gpu)[0]]


def check(page, gpu, tmp_path):
    code, modules = script(page, gpu)
    for module in sorted(modules):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    path = tmp_path / "recipe.py"
    path.write_text(code)
    run([sys.executable, str(path)], tmp_path, FMHA_BUILD_ON_DEMAND="1")


@pytest.mark.parametrize("page", pages_with(False))
def test_blocks_run_without_a_gpu(page, tmp_path):
    check(page, False, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("page", pages_with(True))
def test_blocks_run_on_a_gpu(page, tmp_path):
    check(page, True, tmp_path)


@pytest.mark.nvcc
@pytest.mark.parametrize(
    "page",
    [pytest.param(p, id=p.stem) for p in PAGES if any(b[0] == "sh" and "nvcc" in b[1] for b in blocks(p))],
)
def test_shell_blocks_run(page, tmp_path, own_cache):
    code = "\n".join(code for language, needs, code in blocks(page) if language == "sh" and "nvcc" in needs)
    text = run(["bash", "-euo", "pipefail", "-c", code], tmp_path)
    if page.stem == "other_arch":
        assert re.search(r"fmha_fwd_sm89_bf16_d64 .* FMHA_CUBIN_DIR .*ready", text), text


def test_every_recipe_is_linked_and_has_code():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"](docs/recipes/{page.name})" in readme, page.name
        assert any(language == "python" for language, _, _ in blocks(page)), page.name
        for language, needs, _ in blocks(page):
            assert language in {"python", "sh", "text"}, f"{page.name}: a block in {language!r}"
            assert language == "python" or needs <= {"nvcc"}

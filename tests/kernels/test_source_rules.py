# SPDX-License-Identifier: Apache-2.0
"""Rules of the CUDA sources: cubins reproducible, hashes complete, instructions in one place."""

from __future__ import annotations

import re

import pytest

from fmha_runtime import config
from fmha_runtime.kernels import catalog, sources
from fmha_runtime.kernels.spec import KernelSpec

ROOT = config.kernel_src() / "fmha"
HEADERS = sorted(path for path in ROOT.rglob("*") if path.suffix in {".h", ".cuh"})
SPEC = KernelSpec.parse("fmha_fwd_sm80_bf16_d64")


def code(path):
    """The text of a file without comments and string literals."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r'"(?:[^"\\\n]|\\.)*"', '""', text)


def test_there_are_headers_and_nothing_else():
    assert len(HEADERS) > 5
    others = [path for path in ROOT.rglob("*") if path.is_file() and path not in HEADERS]
    assert not others, "translation units are rendered, never kept"


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.name)
def test_header(path):
    text = path.read_text()
    assert text.startswith("// SPDX-License-Identifier: Apache-2.0\n// "), "licence, then what lives here"
    described = re.match(r"(?:// .*\n)+", text.partition("\n")[2])[0].replace("// ", "")
    assert len(described.split()) >= 5 and described.rstrip().endswith((".", ":")), "a sentence says what lives here"
    assert text.count("#pragma once") == 1
    bare = code(path)
    # Symbols of an anonymous namespace and of statics carry a hash of the file's path.
    assert not re.search(r"\bnamespace\s*\{", bare)
    assert not re.search(r"^\s*static\s+(?!constexpr)[^;(]*[;=]", bare, re.MULTILINE)
    assert not re.search(r"__(FILE|DATE|TIME|TIMESTAMP|LINE)__", bare)
    assert not re.search(r"\bprintf\b", bare)
    if path.parent.name != "ptx":
        assert not re.search(r"\basm\b|__asm", bare), "inline PTX lives in ptx/"
        assert "__syncthreads" not in bare and "__shfl" not in bare, "wrappers live in ptx/"


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.name)
def test_static_assertions_are_sentences(path):
    text = re.sub(r"//[^\n]*", "", path.read_text())
    for found in re.finditer(r"\bstatic_assert\(.*?\);", text, re.DOTALL):
        assert re.search(r'"[^"]+ [^"]+"\s*\);$', found[0]), found[0]


def test_every_header_is_reached_by_a_kernel():
    """Wrappers of instructions may be there before the kernel that needs them."""
    reached = {path for spec in catalog.enumerate_specs() for path in sources.files(spec)}
    assert reached >= {path.resolve() for path in HEADERS if path.parent == ROOT}


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_ops_share_blocks_and_nothing_else(path):
    """ptx/ is below the structs of the ABI, these are below blocks/, and blocks/ is below the folders of ops."""
    floors = {"ptx": 0, ROOT.name: 1, "blocks": 2}
    for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
        folder = (ROOT / name).parent
        below = floors.get(folder.name, 3) < floors.get(path.parent.name, 3)
        assert (ROOT / name).is_file(), f"{path.name} includes {name}: includes are named from {ROOT}"
        assert folder == path.parent or below, f"{path.name} includes {name}"


def test_the_translation_unit_names_the_kernel_once():
    text = sources.render(SPEC, catalog.tile(SPEC))
    assert text.count(SPEC.name) == 1
    assert text.startswith('#include "forward/mma.cuh"\n')
    assert len(text.splitlines()) <= 12

# SPDX-License-Identifier: Apache-2.0
"""Rules of the CUDA sources: cubins reproducible, hashes complete, instructions in one place."""

from __future__ import annotations

import re

import artefacts
import pytest

from fmha_runtime import catalog, config, sources
from fmha_runtime.errors import ArtifactError
from fmha_runtime.spec import KernelSpec

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
    assert text.startswith("// SPDX-License-Identifier: Apache-2.0\n//"), "licence, then what lives here"
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
    reached = {path for spec in catalog.enumerate_specs() for path in sources.include_closure(sources.header(spec))}
    assert reached >= {path.resolve() for path in HEADERS if path.parent == ROOT}


def test_the_hash_covers_each_file_of_the_closure(tmp_path, monkeypatch):
    copy = artefacts.editable_sources(tmp_path, monkeypatch)
    first = sources.source_hash(SPEC)
    for path in sources.include_closure(sources.header(SPEC)):
        text = path.read_text()
        path.write_text(text + "\n")
        assert sources.source_hash(SPEC) != first, path.name
        path.write_text(text)
    assert sources.source_hash(SPEC) == first
    (copy / "fmha" / "unrelated.cuh").write_text("// not included by anything\n")
    assert sources.source_hash(SPEC) == first


def test_moving_text_between_files_changes_the_hash(tmp_path, monkeypatch):
    root = artefacts.editable_sources(tmp_path, monkeypatch) / "fmha"
    first = sources.source_hash(SPEC)
    (root / "mask.cuh").rename(root / "masks.cuh")
    for path in root.glob("*.cuh"):
        path.write_text(path.read_text().replace('"mask.cuh"', '"masks.cuh"'))
    assert sources.source_hash(SPEC) != first


@pytest.mark.parametrize("line", ["#include <cuda_fp16.h>", "#include HEADER", "#  include <vector>  // why not"])
def test_an_include_that_cannot_be_followed_is_refused(tmp_path, monkeypatch, line):
    root = artefacts.editable_sources(tmp_path, monkeypatch) / "fmha"
    with (root / "mask.cuh").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ArtifactError, match=r"mask\.cuh includes .* cannot follow"):
        sources.source_hash(SPEC)


def test_a_missing_header_is_named(tmp_path, monkeypatch):
    root = artefacts.editable_sources(tmp_path, monkeypatch) / "fmha"
    (root / "mask.cuh").unlink()
    with pytest.raises(ArtifactError, match=r"mask\.cuh is missing"):
        sources.source_hash(SPEC)


def test_the_translation_unit_names_the_kernel_once():
    text = sources.render(SPEC, catalog.tile(SPEC))
    assert text.count(SPEC.name) == 1
    assert text.startswith('#include "fwd_sm80.cuh"\n')
    assert len(text.splitlines()) <= 12

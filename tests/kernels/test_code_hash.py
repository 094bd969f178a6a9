# SPDX-License-Identifier: Apache-2.0
"""``code`` sees what the compiler sees: no comment, spacing or file name, and every token. Held against g++."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from helpers import artefacts
from hypothesis import given, settings
from hypothesis import strategies as st

from fmha_runtime import config
from fmha_runtime.errors import ArtifactError
from fmha_runtime.kernels import catalog, code_hash, sources
from fmha_runtime.kernels.code_hash import Flattener, tokens
from fmha_runtime.kernels.pack import family as pack_family
from fmha_runtime.kernels.spec import Arch, KernelSpec

SPEC = KernelSpec.parse("fmha_fwd_sm90a_bf16_d64_packed_paged")
FILES = sorted(path for path in config.kernel_src().rglob("*") if path.suffix in (".h", ".cuh", ".cpp"))
GXX = config.which(config.host_cxx())


def by_gxx(text: str) -> str:
    """Every character but spaces that the preprocessor leaves of a file: comments go, directives stay."""
    command = [str(GXX), "-fpreprocessed", "-E", "-P", "-x", "c++", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return re.sub(r"\s", "", done.stdout)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(config.kernel_src()).as_posix())
def test_the_lexer_agrees_with_the_preprocessor(path):
    if GXX is None:
        pytest.skip("needs g++")
    # The preprocessor leaves directives as they are, but for those that it has acted on by then.
    text = path.read_text().replace("\\\n", " ")
    text = re.sub(r"^#(?=define|undef|pragma once)", "DIRECTIVE ", text, flags=re.MULTILINE)
    ours = "".join(token for line in tokens(text) for token in line)
    assert re.sub(r"\s", "", ours) == by_gxx(text)


def test_there_are_files_to_compare():
    assert len(FILES) > 30


CODE = st.sampled_from(
    ["int", "x", "0x1p-3f", "1'000", "+", "++", "<<=", "->", "::", "'a'", "'\\''", '"//"', '"/* \\" */"', "/", "*", ";"]
)
NOTHING = st.sampled_from(["/* a */", "// b\n", "\n", " ", "\t", "/* 'c \n\" */", "\\\n", "/**/"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(CODE, NOTHING, NOTHING)))
def test_what_is_nothing_changes_nothing(parts):
    plain = " ".join(token for token, _, _ in parts)
    noisy = "".join(f"{token} {one} {two} " for token, one, two in parts)
    assert [t for line in tokens(noisy) for t in line] == [t for line in tokens(plain) for t in line]


@settings(max_examples=200, deadline=None)
@given(st.lists(CODE, min_size=1), st.data())
def test_a_token_more_or_less_is_another_code(parts, data):
    at = data.draw(st.integers(0, len(parts) - 1))
    flat = Flattener([])
    assert flat.digest(" ".join(parts)) != flat.digest(" ".join([*parts[:at], *parts[at + 1 :]]))


def test_tokens_that_touch_differ_from_tokens_that_do_not():
    flat = Flattener([])
    assert flat.digest("a + + b") != flat.digest("a ++ b")
    assert flat.digest("a > > b") != flat.digest("a >> b")
    assert flat.digest('"a b"') != flat.digest('"a  b"')
    assert flat.digest("#define A 1\nint b;") != flat.digest("#define A 1 int b;\n")
    assert flat.digest("12") != flat.digest("1 2")


@pytest.mark.parametrize("text", ["int a ??= 3;", "// a comment that goes on \\\nint b;", "'", '"open\n"', "int \\ x"])
def test_what_it_does_not_read_is_refused(text):
    with pytest.raises(ArtifactError, match=r"the text:\d"):
        tokens(text)


def test_raw_strings_are_one_token():
    assert tokens('asm(R"(a // b "c" )");') == [["asm", "(", 'R"(a // b "c" )"', ")", ";"]]
    assert tokens('R"x(a)" b)x"') == [['R"x(a)" b)x"']]


def noisy(text: str) -> str:
    """The text with every comment replaced, and more of them."""
    raw = re.search(r'R"\(.*?\)"', text, re.DOTALL)
    if raw:
        return noisy(text[: raw.start()]).rstrip("\n").removesuffix("  // more") + raw[0] + text[raw.end() :]
    lines = re.sub(r"//[^\n]*", "// another word", text).splitlines()
    lines = [f"{line}  // more" if _may_comment(line) else line for line in lines]
    return "\n".join(["// a new first line", "", *lines, ""])


def _may_comment(line: str) -> bool:
    return not line.endswith("\\") and "//" not in line and '"' not in line and "*" not in line


def test_every_comment_may_change(tmp_path, monkeypatch):
    specs = catalog.enumerate_specs()[::97]
    before = [(sources.code(s, catalog.tile(s)), sources.emulated_code(s, catalog.tile(s))) for s in specs]
    copy = artefacts.editable_sources(tmp_path, monkeypatch)
    for path in copy.rglob("*"):
        if path.suffix in (".h", ".cuh", ".cpp"):
            path.write_text(noisy(path.read_text()))
    assert [(sources.code(s, catalog.tile(s)), sources.emulated_code(s, catalog.tile(s))) for s in specs] == before


def test_a_header_may_move(tmp_path, monkeypatch):
    before = sources.code(SPEC, catalog.tile(SPEC))
    root = artefacts.editable_sources(tmp_path, monkeypatch) / "fmha"
    (root / "elsewhere").mkdir()
    (root / "blocks" / "seqlen.cuh").rename(root / "elsewhere" / "lengths.cuh")
    for path in root.rglob("*.cuh"):
        path.write_text(path.read_text().replace('"blocks/seqlen.cuh"', '"elsewhere/lengths.cuh"'))
    assert sources.code(SPEC, catalog.tile(SPEC)) == before


def test_each_file_counts_for_the_kernels_that_reach_it(tmp_path, monkeypatch):
    root = artefacts.editable_sources(tmp_path, monkeypatch) / "fmha"
    specs = [
        KernelSpec.parse(n)
        for n in ("fmha_fwd_sm80_bf16_d64", "fmha_fwd_sm90a_bf16_d64", pack_family.spec(Arch.SM80).name)
    ]
    before = [sources.code(s, catalog.tile(s)) for s in specs]
    reached = [set(sources.files(s)) for s in specs]
    for path in sorted(set().union(*reached)):
        text = path.read_text()
        path.write_text(text + "int one_more;\n")
        changed = [sources.code(s, catalog.tile(s)) != old for s, old in zip(specs, before, strict=True)]
        assert changed == [path in files for files in reached], path.relative_to(root)
        path.write_text(text)


def test_what_is_rendered_counts(monkeypatch):
    """A dropped feature gives another kernel from the same headers."""
    before = sources.code(SPEC, catalog.tile(SPEC))
    plain = catalog.unit
    monkeypatch.setattr(catalog, "unit", lambda spec, tile: plain(replace(spec, mask="band"), tile))
    assert sources.code(SPEC, catalog.tile(SPEC)) != before


def test_the_name_does_not_count():
    """sm86 runs what sm89 runs: their code is the same, and another tile's is not."""
    one = KernelSpec.parse("fmha_fwd_sm89_bf16_d64")
    other = replace(one, arch=Arch.SM86)
    assert sources.code(one, catalog.tile(one)) == sources.code(other, catalog.tile(one))
    assert sources.code(one, catalog.tile(one)) != sources.code(one, replace(catalog.tile(one), stages=3))


class TestEmulated:
    """What an emulator record is bound to."""

    def code(self):
        return sources.emulated_code(SPEC, catalog.tile(SPEC))

    @pytest.fixture
    def twins(self, tmp_path, monkeypatch):
        return artefacts.editable_sources(tmp_path, monkeypatch) / "emulator"

    @pytest.mark.parametrize("name", ["ptx/sm90.cuh", "scheduler.cpp", "memory.cpp", "state.h", "emulator.h"])
    def test_twins_and_core_count(self, twins, name):
        before = self.code()
        path = twins / name
        path.write_text(path.read_text() + "int one_more;\n")
        assert self.code() != before

    def test_a_twin_that_is_not_used_does_not_count(self, twins):
        spec = KernelSpec.parse("fmha_fwd_sm80_bf16_d64")
        before = sources.emulated_code(spec, catalog.tile(spec))
        (twins / "ptx" / "wgmma.cuh").write_text("#pragma once\n")
        assert sources.emulated_code(spec, catalog.tile(spec)) == before

    @pytest.mark.parametrize("flags", ["EMULATOR_FLAGS", "EMULATOR_CORE_FLAGS"])
    def test_flags_count(self, monkeypatch, flags):
        before = self.code()
        monkeypatch.setattr(sources, flags, (*getattr(sources, flags), "-ffast-math"))
        assert self.code() != before


@pytest.mark.parametrize("line", ["#include <cuda_fp16.h>", "#include HEADER", "#  include <vector>  // why not"])
def test_an_include_that_cannot_be_followed_is_refused(tmp_path, monkeypatch, line):
    header = next(p for p in _copy(tmp_path, monkeypatch) if p.name == "mask.cuh")
    header.write_text(f"{line}\n{header.read_text()}")
    with pytest.raises(ArtifactError, match=r"mask\.cuh includes .*cannot follow"):
        sources.code(SPEC, catalog.tile(SPEC))


def test_a_missing_header_is_named(tmp_path, monkeypatch):
    next(p for p in _copy(tmp_path, monkeypatch) if p.name == "seqlen.cuh").unlink()
    with pytest.raises(ArtifactError, match=r"seqlen\.cuh.*is missing"):
        sources.code(SPEC, catalog.tile(SPEC))


def test_a_header_without_pragma_once_is_refused(tmp_path, monkeypatch):
    header = next(p for p in _copy(tmp_path, monkeypatch) if p.name == "mask.cuh")
    header.write_text(header.read_text().replace("#pragma once", ""))
    with pytest.raises(ArtifactError, match=r"mask\.cuh lacks #pragma once"):
        sources.code(SPEC, catalog.tile(SPEC))


def _copy(tmp_path, monkeypatch):
    artefacts.editable_sources(tmp_path, monkeypatch)
    return sources.files(SPEC)


def test_kernel_src_is_looked_at_once_in_a_block(tmp_path, monkeypatch):
    before = sources.code(SPEC, catalog.tile(SPEC))
    path = next(p for p in _copy(tmp_path, monkeypatch) if p.name == "mask.cuh")
    with sources.unchanged():
        assert sources.code(SPEC, catalog.tile(SPEC)) == before
        path.write_text(path.read_text() + "int one_more;\n")
        assert sources.code(SPEC, catalog.tile(SPEC)) == before
    assert sources.code(SPEC, catalog.tile(SPEC)) != before


def test_the_copy_of_this_test_is_the_original(tmp_path):
    """Guards the tests above: editing a copy starts from the committed code."""
    shutil.copytree(config.kernel_src(), tmp_path / "again")
    flat = code_hash.Flattener([tmp_path / "again" / "fmha"])
    unit = sources.render(SPEC, catalog.tile(SPEC))
    assert flat.digest(unit, leave_out=SPEC.name) == sources.code(SPEC, catalog.tile(SPEC))

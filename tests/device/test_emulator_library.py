# SPDX-License-Identifier: Apache-2.0
"""What the emulator loads is, to the last byte, what was compiled, and nobody else could have put it there."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from fmha_runtime.device import emulator
from fmha_runtime.errors import ArtifactError, BuildError
from fmha_runtime.kernels import cache, files
from fmha_runtime.toolchain import gxx

LIBRARY_OF = gxx.library_of  # conftest.py keeps others from it
SOURCE = 'extern "C" int probe(void*) { return 0; }\n'


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A library of some kilobytes that defines what the emulator calls, as the compiler leaves it."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "probe.cpp").write_text(SOURCE)
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    subprocess.run(["g++", "-shared", "-fPIC", "-o", "probe.so", "probe.cpp"], cwd=folder, check=True)
    return (folder / "probe.so").read_bytes()


@pytest.fixture
def library(compiled, tmp_path):
    path = tmp_path / "probe.so"
    path.write_bytes(files.sealed(compiled))
    return path


def test_a_library_with_its_hash_loads(library):
    assert emulator.Kernel("probe", library).name == "probe"


@pytest.mark.parametrize("keep", [0, 1, 64, 4096, 0.5, -1, -100])
def test_a_library_that_was_cut_short_is_an_error(library, keep):
    """Not SIGBUS, which is what the loader's mapping of a short file gives."""
    whole = library.read_bytes()
    library.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    with pytest.raises(ArtifactError, match=r"is damaged.*remove the file") as caught:
        emulator.Kernel("probe", library)
    assert caught.value.path == library


def test_a_flipped_bit_is_an_error(library):
    whole = bytearray(library.read_bytes())
    whole[len(whole) // 3] ^= 1
    library.write_bytes(whole)
    with pytest.raises(ArtifactError, match="is damaged"):
        emulator.Kernel("probe", library)


def test_a_library_without_a_hash_is_an_error(library, compiled):
    library.write_bytes(compiled)
    with pytest.raises(ArtifactError, match="is damaged"):
        emulator.Kernel("probe", library)


def test_a_library_that_others_can_write_to_is_an_error(library):
    library.chmod(0o666)
    with pytest.raises(ArtifactError, match="can be written by everybody"):
        emulator.Kernel("probe", library)


def test_a_library_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match="cannot read"):
        emulator.Kernel("probe", tmp_path / "probe.so")


class TestCompiling:
    """With a compiler that writes what it was asked for into a file."""

    @pytest.fixture(autouse=True)
    def setup(self, own_cache, tmp_path, monkeypatch):
        self.cache, self.compiler = own_cache, tmp_path / "g++"
        self.write('for word; do out=$word; done; echo "$*" > "$out"')
        monkeypatch.setenv("FMHA_HOST_CXX", str(self.compiler))
        monkeypatch.setattr(files, "_trusted", set())
        gxx._version.cache_clear()

    def write(self, lines):
        self.compiler.write_text(f'#!/bin/sh\ncase "$1" in --version) echo "g++ of a test"; exit 0;; esac\n{lines}\n')
        self.compiler.chmod(0o755)

    def library(self, name="probe"):
        return LIBRARY_OF(SOURCE, name)

    def test_what_it_writes_is_sealed(self):
        path = self.library()
        assert files.is_sealed(path) and path.parent == self.cache / cache.EMULATOR
        assert sorted(each.suffix for each in path.parent.iterdir()) == [".o", ".so"]
        assert sorted(each.name for each in self.cache.iterdir()) == [cache.MARKER, cache.EMULATOR]

    def test_a_damaged_runtime_is_not_linked(self):
        self.library()
        (runtime,) = (self.cache / cache.EMULATOR).glob("runtime-*.o")
        runtime.write_bytes(runtime.read_bytes()[:-3])
        with pytest.raises(ArtifactError, match=r"runtime-.*\.o is damaged"):
            self.library("another")

    @pytest.mark.parametrize("part", ["", cache.EMULATOR])
    def test_a_folder_of_others_is_refused_before_anything_is_run(self, part):
        self.library()
        files._trusted.clear()
        (self.cache / part).chmod(0o777)
        with pytest.raises(ArtifactError, match="can be written by everybody"):
            self.library()

    @pytest.mark.parametrize("lines", ["exit 0", "echo wrong; exit 1"], ids=["nothing written", "failed"])
    def test_a_compiler_that_gives_nothing(self, lines):
        self.write(lines)
        with pytest.raises(BuildError, match="could not compile"):
            self.library()

    def test_libraries_of_earlier_versions_have_another_key(self, monkeypatch):
        now = self.library()
        monkeypatch.setattr(gxx, "_FORM", "")
        assert self.library() != now

# SPDX-License-Identifier: Apache-2.0
"""What is removed from a cache is ours, and what is not ours is named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.artefacts import OTHER, SMALL

from fmha_runtime.cli import program as cli
from fmha_runtime.errors import InputError
from fmha_runtime.kernels import cache, files, manifest, store
from fmha_runtime.toolchain import build, ptx

KEY = "0123456789ab"


def fmha(*words):
    return CliRunner().invoke(cli.main, ["cache", *words])


def tree(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


@pytest.fixture
def full(own_cache, fake_nvcc):
    """A cache with a good build, a damaged one, PTX, and a library that is cut short."""
    build.build([SMALL])
    build.build([OTHER])[0].row.path.write_bytes(b"damaged")
    ptx.compile_ptx(SMALL)
    emulator = own_cache / cache.EMULATOR
    emulator.mkdir()
    (emulator / f"{SMALL.name}-{'a' * 20}.so").write_bytes(files.sealed(b"library"))
    (emulator / f"{OTHER.name}-{'b' * 20}.so").write_bytes(files.sealed(b"library")[:-1])
    return own_cache


@pytest.fixture
def strangers(full):
    """Things of the user's in it, called much like ours."""
    link = full.parent / "elsewhere"
    shutil.copytree(store.find(SMALL).path.parent, link / f"{SMALL.name}-{KEY}")
    made = {
        "fmha_runtime-main/pyproject.toml": "a checkout",
        f"fmha_notes-{KEY}/notes.txt": "no row of ours",
        "emulator/games.so": "",
        "emulator/roms/tetris": "",
        "ptx/mine.ptx": "",
        "ptx/fmha_paper.ptx": "",
        ".tmp-work/draft": "",
        "notes.txt": "",
    }
    for name, text in made.items():
        path = full / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (full / f"{SMALL.name}-{KEY}").symlink_to(link / f"{SMALL.name}-{KEY}")
    return {name: (full / name) for name in (*made, f"{SMALL.name}-{KEY}/{manifest.ROW}")}


@pytest.mark.parametrize("command", ["prune", "clean"])
def test_what_is_not_ours_stays_and_is_named(strangers, command, own_cache):
    result = fmha(command)
    assert result.exit_code == 0, result.stderr
    for name, path in strangers.items():
        assert path.exists(), name
        top = name.split("/")[0]
        where = own_cache / (name if top in ("emulator", "ptx", "notes.txt") else top)
        where = where.parent if name == "emulator/roms/tetris" else where
        assert f"left {where}: " in result.stderr, name
    assert f"left {own_cache}/fmha_notes-{KEY}: it has no row.json" in result.stderr
    assert sum(not path.is_symlink() for path in own_cache.glob(f"{SMALL.name}-*")) == (command == "prune")


def test_prune_takes_what_is_damaged_and_keeps_what_is_good(full):
    result = fmha("prune")
    assert "removed 2 entries" in result.stderr and "3 in use" in result.stderr
    assert store.find(SMALL) is not None and not list(full.glob(f"{OTHER.name}-*"))
    assert [path.name for path in (full / cache.EMULATOR).iterdir()] == [f"{SMALL.name}-{'a' * 20}.so"]


def test_clean_takes_all_that_is_ours(full):
    assert "removed 5 entries" in fmha("clean").stderr
    assert tree(full) == [cache.MARKER, cache.EMULATOR, cache.PTX]


@pytest.mark.parametrize("command", ["prune", "clean"])
def test_a_dry_run_lists_and_removes_nothing(full, command):
    (full / cache.MARKER).unlink()
    before = tree(full)
    would = fmha(command, "--dry-run")
    assert tree(full) == before
    assert "would remove" in would.stderr and "would mark" in would.stderr
    fmha(command)
    listed = [line.split("  ")[0] for line in would.stdout.splitlines()]
    assert listed and not any(os.path.exists(path) for path in listed)
    assert len(before) - len(tree(full)) >= len(listed) - 1  # the marker came


def test_a_cache_is_marked_when_it_is_created(own_cache, fake_nvcc):
    build.build([SMALL])
    assert "fmha cache prune" in (own_cache / cache.MARKER).read_text()


def test_a_packaged_root_is_no_cache(own_cache, fake_nvcc, tmp_path):
    build.build([SMALL], into=tmp_path / "kernels")
    assert not (tmp_path / "kernels" / cache.MARKER).exists()


@pytest.mark.parametrize("command", ["prune", "clean"])
def test_a_folder_without_the_marker_is_left_alone(full, command):
    (full / cache.MARKER).unlink()
    (full / "thesis.tex").write_text("")
    before = tree(full)
    result = fmha(command)
    assert result.exit_code == 2 and tree(full) == before
    (line,) = result.stderr.splitlines()
    assert "is no cache of fmha_runtime" in line and "thesis.tex" in line and "FMHA_CACHE_DIR" in line


def test_a_cache_of_an_earlier_version_is_marked(full):
    """It has no marker, and all in it is ours."""
    (full / cache.MARKER).unlink()
    old = full / ".tmp-abcd1234" / SMALL.name
    old.mkdir(parents=True)
    (old / "whatever.ii").write_text("")
    os.utime(old.parent, (0, 0))
    result = fmha("prune")
    assert result.exit_code == 0 and "marked it as a cache" in result.stderr
    assert (full / cache.MARKER).exists() and not old.parent.exists()


def test_a_build_marks_a_cache_that_has_other_things_in_it(own_cache, fake_nvcc):
    own_cache.mkdir()
    (own_cache / "thesis.tex").write_text("")
    build.build([SMALL])
    assert "removed 1 entries" in fmha("clean").stderr
    assert tree(own_cache) == [cache.MARKER, "thesis.tex"]


def test_a_build_with_a_stranger_inside_stays_whole(full):
    folder = store.find(SMALL).path.parent
    (folder / "notes.txt").write_text("mine")
    result = fmha("clean")
    assert f"left {folder}: notes.txt in it is not ours" in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == [f"{SMALL.name}.cubin", "notes.txt", "row.json"]


def test_what_builds_keep_goes_with_them(own_cache, fake_nvcc):
    build.build([SMALL], keep=True)
    fmha("clean")
    assert tree(own_cache) == [cache.MARKER]


def test_work_that_may_go_on_is_left_by_prune(own_cache, fake_nvcc):
    build.build([SMALL])
    young = own_cache / f"{files.SCRATCH}abcd1234"
    young.mkdir()
    assert f"left {young}: younger than an hour" in fmha("prune").stderr
    fmha("clean")
    assert not young.exists()


def test_what_cannot_be_removed_is_said(own_cache, fake_nvcc, monkeypatch):
    folder = build.build([SMALL])[0].row.path.parent

    def refuse(self, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    result = fmha("clean")
    assert result.exit_code == 1
    assert f"could not remove {folder}: Permission denied" in result.stderr and "removed 0 entries" in result.stderr


def test_no_cache_yet(own_cache):
    result = fmha("clean")
    assert (result.exit_code, own_cache.exists()) == (0, False)
    assert "removed 0 entries" in result.stderr


def test_a_cache_that_is_a_file(own_cache, fake_nvcc):
    own_cache.write_text("")
    for words in (["prune"], ["clean", "--dry-run"]):
        result = fmha(*words)
        assert result.exit_code == 2 and "is not a folder; set FMHA_CACHE_DIR" in result.stderr
    with pytest.raises(InputError, match="is not a folder; set FMHA_CACHE_DIR"):
        build.build([SMALL])


def test_files_with_the_names_of_builds_are_no_builds(own_cache, fake_nvcc, monkeypatch):
    """Python 3.10's glob lists files for a pattern that ends in a slash."""
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: glob(self, pattern.rstrip("/")))
    build.build([SMALL])
    for name in (f"{SMALL.name}-{KEY}", f"{files.SCRATCH}notes", f"{OTHER.name}-{KEY}"):
        (own_cache / name).write_text("")
    rows, broken = store.rows()
    assert [row.spec for row in rows if row.root == "cache"] == [SMALL] and not broken
    assert store.state(OTHER).word == "not built"
    result = fmha("prune")
    assert result.exit_code == 0 and "removed 0 entries" in result.stderr


def test_folders_with_the_names_of_builds_are_no_builds(own_cache, fake_nvcc):
    build.build([SMALL])
    (own_cache / "fmha_runtime-main").mkdir()
    (own_cache / f"{OTHER.name}-{KEY}").mkdir()
    assert store.rows()[1] == [] and store.state(OTHER).word == "not built"

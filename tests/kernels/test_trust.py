# SPDX-License-Identifier: Apache-2.0
"""Kernels come from folders that nobody else can write to, and the packaged manifest has the last word on them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat

import pytest
from click.testing import CliRunner
from helpers.artefacts import OTHER, SMALL

from fmha_runtime import config
from fmha_runtime.cli import diagnosis
from fmha_runtime.cli import program as cli
from fmha_runtime.errors import ArtifactError
from fmha_runtime.kernels import cache, catalog, files, manifest, store
from fmha_runtime.kernels.ledger import Ledger
from fmha_runtime.ops import obtain
from fmha_runtime.toolchain import build, ptx

STRANGER = 4242


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Another process, which has looked at no folder yet."""
    monkeypatch.setattr(files, "_trusted", set())


@pytest.fixture
def row(own_cache, fake_nvcc):
    """A kernel in the cache."""
    row = build.build([SMALL])[0].row
    files._trusted.clear()
    return row


@pytest.fixture
def packaged(row, tmp_path, monkeypatch):
    """The kernel in a folder that FMHA_CUBIN_DIR names, and nowhere else."""
    root = tmp_path / "cubins"
    build.build([SMALL], into=root)
    monkeypatch.setenv("FMHA_CUBIN_DIR", str(root))
    shutil.rmtree(config.cache_dir())
    files._trusted.clear()
    return root


def give_away(path, monkeypatch):
    """From now on the file or folder is somebody else's."""
    if os.geteuid() == 0:
        os.chown(path, STRANGER, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: STRANGER)


def allow(path, bits):
    path.chmod(stat.S_IMODE(path.stat().st_mode) | bits)


def refused(word, *more):
    with pytest.raises(ArtifactError, match=word) as caught:
        obtain.image(SMALL)
    for text in more:
        assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


PARTS = {
    "cache": lambda row: row.path.parent.parent,
    "build": lambda row: row.path.parent,
    "cubin": lambda row: row.path,
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("bits", "who"), [(0o020, "its group"), (0o002, "everybody"), (0o022, "everybody")])
def test_what_others_can_write_to_is_refused_with_the_command(row, part, bits, who):
    path = PARTS[part](row)
    allow(path, bits)
    error = refused(f"can be written by {who}", str(path), f"`chmod -R go-w {path}`")
    assert os.system(error.command) == 0
    assert obtain.image(SMALL).spec == SMALL, "the command helps"


@pytest.mark.parametrize("part", PARTS)
def test_what_belongs_to_another_user_is_refused_with_the_command(row, part, monkeypatch):
    path = PARTS[part](row)
    give_away(path, monkeypatch)
    error = refused("belongs to user", f"`chown -R {os.geteuid()} ")
    if os.geteuid() == 0:
        assert str(path) in str(error) and os.system(error.command) == 0
        assert obtain.image(SMALL).spec == SMALL


def test_another_cache_is_the_other_remedy(row, monkeypatch, tmp_path):
    allow(config.cache_dir(), 0o002)
    refused("set FMHA_CACHE_DIR to a folder of your own")
    monkeypatch.setenv("FMHA_CACHE_DIR", str(tmp_path / "mine"))
    build.build([SMALL])
    assert obtain.image(SMALL).spec == SMALL


@pytest.mark.parametrize("folder", ["", "manifest", "sm80"])
def test_the_extra_folder_is_looked_at_as_well(packaged, folder):
    assert obtain.image(SMALL).spec == SMALL
    files._trusted.clear()
    allow(packaged / folder, 0o002)
    refused("can be written by everybody", "FMHA_CUBIN_DIR")


def test_a_refused_folder_does_not_hide_another(packaged, fake_nvcc):
    """What the cache has serves, although the folder that comes first is not to be trusted."""
    allow(packaged, 0o002)
    build.build([SMALL])
    assert store.find(SMALL).root == "cache"


def test_folders_above_count(own_cache, fake_nvcc, tmp_path, monkeypatch):
    above = tmp_path / "shared"
    monkeypatch.setenv("FMHA_CACHE_DIR", str(above / "mine"))
    build.build([SMALL])
    files._trusted.clear()
    allow(above, 0o002)
    refused("who could replace", f"`chmod go-w {above}`", "FMHA_CACHE_DIR")
    allow(above, 0o1000)
    assert obtain.image(SMALL).spec == SMALL, "sticky, as /tmp is: nobody else can rename what is in it"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to give files away")
def test_whose_the_folders_above_are(own_cache, fake_nvcc, tmp_path, monkeypatch):
    above = tmp_path / "shared"
    monkeypatch.setenv("FMHA_CACHE_DIR", str(above / "mine"))
    build.build([SMALL])
    for owner, group, mode, fine in (
        (STRANGER, STRANGER, 0o755, False),
        (files._NOBODY, files._NOBODY, 0o755, True),  # root, seen from a container
        (0, 0, 0o775, True),  # root's group
        (0, STRANGER, 0o775, False),
    ):
        files._trusted.clear()
        os.chown(above, owner, group)
        above.chmod(mode)
        if fine:
            assert obtain.image(SMALL).spec == SMALL
        else:
            refused("who could replace")


def test_a_link_is_followed(row, tmp_path, monkeypatch):
    real = tmp_path / "open" / "cache"
    real.parent.mkdir()
    shutil.move(config.cache_dir(), real)
    config.cache_dir().symlink_to(real)
    assert obtain.image(SMALL).spec == SMALL
    files._trusted.clear()
    allow(real.parent, 0o002)
    refused("who could replace")


@pytest.mark.parametrize("umask", [0o000, 0o002])
def test_what_is_built_under_a_lax_umask_is_trusted(own_cache, fake_nvcc, tmp_path, monkeypatch, umask):
    monkeypatch.setenv("FMHA_CACHE_DIR", str(tmp_path / "new" / "cache"))
    monkeypatch.setenv("FMHA_CUBIN_DIR", str(tmp_path / "extra" / "kernels"))
    before = os.umask(umask)
    try:
        build.build([SMALL], keep=True)
        build.build([OTHER], into=config.cubin_dir())
        ptx.compile_ptx(SMALL)
    finally:
        os.umask(before)
    files._trusted.clear()
    assert obtain.image(SMALL).spec == SMALL and obtain.image(OTHER).spec == OTHER
    assert ptx.compile_ptx(SMALL)
    for root in (tmp_path / "new", tmp_path / "extra"):
        for path in (root, *root.rglob("*")):
            assert not path.stat().st_mode & 0o022, path


def test_nothing_is_built_into_a_cache_of_others(row):
    allow(config.cache_dir(), 0o002)
    with pytest.raises(ArtifactError, match="can be written by everybody"):
        build.build([OTHER])
    with pytest.raises(ArtifactError, match="can be written by everybody"):
        ptx.compile_ptx(OTHER)


def test_ptx_is_looked_at_as_well(row):
    ptx.compile_ptx(SMALL)
    (path,) = (config.cache_dir() / cache.PTX).iterdir()
    allow(path, 0o002)
    with pytest.raises(ArtifactError, match="can be written by everybody"):
        ptx.compile_ptx(SMALL)


def test_a_folder_is_looked_at_once(row, monkeypatch):
    assert obtain.image(SMALL).spec == SMALL
    looked = []
    real = os.stat

    def stat_(path, *args, **kwargs):
        looked.append(os.fspath(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat_)
    monkeypatch.setattr(os, "lstat", stat_)
    files.check_folder(config.cache_dir(), "FMHA_CACHE_DIR")
    files.check_folder(row.path.parent, "FMHA_CACHE_DIR")
    assert looked == []


def test_the_program_says_it_in_a_line(row, monkeypatch):
    monkeypatch.setattr(config, "package_root", lambda: config.cache_dir().parent / "package")
    allow(config.cache_dir(), 0o002)
    result = CliRunner().invoke(cli.main, ["build", OTHER.name])
    assert result.exit_code == 4
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("building")]
    assert f"run `chmod -R go-w {config.cache_dir()}`" in line
    problems = [problem for problem in diagnosis.examine().problems if "can be written" in problem.text]
    assert [problem.command for problem in problems] == [f"chmod -R go-w {config.cache_dir()}"]
    assert {problem.code for problem in problems} == {4}


class TestTheManifestHasTheLastWord:
    """A folder of cubins that claims to be the build of a compiler whose bytes the packaged manifest has."""

    @pytest.fixture(autouse=True)
    def setup(self, packaged, tmp_path, monkeypatch):
        self.root = tmp_path / "package"
        shutil.copytree(packaged, self.root)
        self.lock = manifest.read_row(self.root, SMALL)
        self.lock.path.unlink()
        monkeypatch.setattr(config, "package_root", lambda: self.root)
        self.table = manifest.table(packaged, SMALL.op, SMALL.arch)
        self.cubin = packaged / "sm80" / f"{SMALL.name}.cubin"

    def claim(self, content=None, **facts):
        """Change the cubin and its row, which keeps to its SHA-256."""
        data = json.loads(self.table.read_text())
        if content is not None:
            self.cubin.write_bytes(content)
            facts = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), **facts}
        data["rows"][0].update(facts)
        self.table.write_text(json.dumps(data))

    def test_what_is_true_serves(self):
        assert obtain.image(SMALL).evidence == self.lock.sha256

    def test_other_bytes_of_the_same_compiler_do_not(self):
        self.claim(b"\x7fELF of a stranger")
        refused("claims to be the build of nvcc 13.0.99, and the packaged manifest has other bytes", str(self.cubin))
        assert store.state(SMALL).word == "broken"
        assert store.Inventory.of([SMALL]).states[SMALL].word == "broken"
        assert store.find_tile(SMALL, catalog.tile(SMALL)) is None

    def test_nor_under_the_ptx_of_that_compiler(self):
        self.claim(b"\x7fELF of a stranger", nvcc="13.5.37")
        refused("claims to be the build of nvcc 13.0.99's PTX")

    def test_another_compiler_may_give_other_bytes(self):
        self.claim(b"\x7fELF of another compiler", nvcc="13.5.37", ptx_sha256="0" * 64)
        found = obtain.image(SMALL)
        assert found.nvcc == "13.5.37"
        assert Ledger.load().status(SMALL, store.find(SMALL)).word != "verified"

    def test_the_same_bytes_are_of_the_manifests_compiler_whatever_the_row_says(self):
        self.claim(nvcc="99.0.1")
        assert obtain.image(SMALL).nvcc == store.find(SMALL).nvcc == self.lock.nvcc

    def test_what_was_built_here_is_believed(self, fake_nvcc):
        """`fmha build` said that it differs, and this machine's user asked for it."""
        text = fake_nvcc.path.read_text()
        fake_nvcc.path.write_text(text.replace("compiled by", "compiled otherwise by"))
        self.claim(b"\x7fELF of a stranger")
        assert build.build([SMALL])[0].lock == "differs"
        assert store.find(SMALL).root == "cache"

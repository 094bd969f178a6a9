# SPDX-License-Identifier: Apache-2.0
"""Whatever a variable is set to: it works, or one sentence says why not, with the exit code of its kind."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.artefacts import SMALL, FakeNvcc

from fmha_runtime import config
from fmha_runtime.cli import program as cli
from fmha_runtime.errors import InputError, ToolchainError
from fmha_runtime.toolchain import gxx

USAGE, ENVIRONMENT = 2, 3
NAMES = [variable.name for variable in config.VARIABLES]
FOLDERS = ["FMHA_CACHE_DIR", "FMHA_CUBIN_DIR", "XDG_CACHE_HOME"]
NUMBERS = ["FMHA_BUILD_JOBS", "FMHA_EMULATOR_THREADS"]
SWITCHES = ["FMHA_BUILD_ON_DEMAND", "FMHA_DEBUG"]

ODD = {
    "blank": "  ", "no user": "~nosuchuser/x", "dot": ".", "relative": "some/where", "device": "/dev/null",
    "file": "{tmp}/file", "under a file": "{tmp}/file/x", "folder": "{tmp}/folder", "data": "{tmp}/data",
    "true": "/bin/true", "false": "/bin/false", "nowhere": "/proc/x", "lines": "a\nb", "tab": "a\tb",
    "escape": "\x1b[31m", "bytes": os.fsdecode(b"/tmp/\xff"), "long name": "/" + "x" * 300, "long path": "/x" * 3000,
    "zero": "0", "negative": "-1", "float": "1.5", "exponent": "1e3", "superscript": "\u00b2", "arabic": "\u0663",
    "huge": "9" * 30, "endless": "9" * 5000, "words": "g++ -O2", "accent": "\u00e9", "comma": "1,2", "nan": "nan",
}  # fmt: skip


@pytest.fixture(autouse=True)
def machine(own_cache, tmp_path, monkeypatch):
    """Nothing but a pretended nvcc, and the things that values point to."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "data").write_text("no program")
    (tmp_path / "data").chmod(0o755)
    FakeNvcc(tmp_path / "toolkit", monkeypatch)
    monkeypatch.setattr(config, "package_root", lambda: tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    gxx._version.cache_clear()


def fmha(*words):
    return CliRunner().invoke(cli.main, list(words))


def one_sentence(result):
    """The error of a command that failed, which is all it says."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("building")]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert len(lines[0]) < 400 and "this is a bug" not in lines[0]
    assert re.search("; |: there is no", lines[0]), "it says what to do"
    return lines[0]


def set_to(name, value, monkeypatch, tmp_path):
    if name in ("XDG_CACHE_HOME", "HOME"):  # they count where the first of these is not set
        monkeypatch.delenv("FMHA_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(name, value.format(tmp=tmp_path))


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
@pytest.mark.parametrize("name", [*NAMES, "XDG_CACHE_HOME", "HOME"])
def test_no_value_surprises(name, value, monkeypatch, tmp_path):
    set_to(name, value, monkeypatch, tmp_path)
    for words in (["build", SMALL.name], ["list", SMALL.name], ["cache", "prune"], ["cache", "dir"]):
        result = fmha(*words)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code in (0, 1, 2, 3, 4)
        if result.exit_code and "FAIL" not in result.stderr:
            one_sentence(result)


@pytest.mark.parametrize("value", [ODD[word] for word in ("file", "bytes", "lines", "long path", "endless")])
@pytest.mark.parametrize("name", [*NAMES, "XDG_CACHE_HOME", "HOME"])
def test_the_doctor_always_answers(name, value, monkeypatch, tmp_path):
    set_to(name, value, monkeypatch, tmp_path)
    result = fmha("doctor")
    assert result.exit_code in (0, 3, 4) and "problems: " in result.stdout


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "\u00b2", "\u0663", "9" * 5000, "many", "1025"])
def test_numbers(name, value, monkeypatch):
    read = {"FMHA_BUILD_JOBS": config.build_jobs, "FMHA_EMULATOR_THREADS": config.emulator_threads}[name]
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=rf"^{name}=.*; set it to 1 or more, up to 1024$"):
        read()
    for fine in ("1", " 7 ", "1024"):
        monkeypatch.setenv(name, fine)
        assert read() == int(fine)
    for unset in ("", "  "):
        monkeypatch.setenv(name, unset)
        assert read() >= 1
    if name == "FMHA_BUILD_JOBS":
        monkeypatch.setenv(name, value)
        result = fmha("build", SMALL.name)
        assert result.exit_code == USAGE and one_sentence(result)


@pytest.mark.parametrize("name", SWITCHES)
def test_switches(name, monkeypatch):
    read = {"FMHA_BUILD_ON_DEMAND": config.build_on_demand, "FMHA_DEBUG": config.debug}[name]
    for value, meaning in {"1": True, " yes ": True, "TRUE": True, "0": False, "no": False, " ": False}.items():
        monkeypatch.setenv(name, value)
        assert read() is meaning
    for value in ("2", "on and off", "\u0661"):
        monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=rf"^{name}=.* is not a switch; set it to 0 or 1$"):
            read()


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("value", ["/a\nb", os.fsdecode(b"/tmp/\xff"), "/" + "x" * 300, "/x" * 3000])
def test_folders_that_cannot_be(name, value, monkeypatch):
    if name == "XDG_CACHE_HOME":
        monkeypatch.delenv("FMHA_CACHE_DIR")
    monkeypatch.setenv(name, value)
    result = fmha("list", SMALL.name)
    assert result.exit_code == USAGE and f"{name}=" in one_sentence(result)


def test_a_cache_in_a_file_is_usage(monkeypatch, tmp_path):
    for value in ("file", "file/x"):
        monkeypatch.setenv("FMHA_CACHE_DIR", str(tmp_path / value))
        for words in (["build", SMALL.name], ["cache", "clean"]):
            result = fmha(*words)
            assert result.exit_code == USAGE and "set FMHA_CACHE_DIR" in one_sentence(result)


def test_the_rule_of_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("FMHA_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "some/where")
    assert config.cache_dir() == tmp_path / ".cache" / "fmha_runtime", "a relative one does not count"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert config.cache_dir() == tmp_path / "other" / "fmha_runtime"
    monkeypatch.delenv("XDG_CACHE_HOME")

    def nobody(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)  # a user without an entry, as containers have
    result = fmha("cache", "dir")
    assert result.exit_code == USAGE and "set FMHA_CACHE_DIR to a folder" in one_sentence(result)


@pytest.mark.parametrize("value", ["/proc/x", "{tmp}/file", "{tmp}/folder", "{tmp}/data", "/bin/true", "/bin/false"])
def test_an_nvcc_that_is_none(value, monkeypatch, tmp_path):
    monkeypatch.setenv("FMHA_NVCC", value.format(tmp=tmp_path))
    result = fmha("build", SMALL.name)
    assert result.exit_code == ENVIRONMENT and "FMHA_NVCC" in one_sentence(result)


@pytest.mark.parametrize("value", ["/proc/x", "{tmp}/file", "{tmp}/folder", "g++ -O2"])
def test_a_host_compiler_that_is_none(value, monkeypatch, tmp_path):
    monkeypatch.setenv("FMHA_HOST_CXX", value.format(tmp=tmp_path))
    result = fmha("build", SMALL.name)
    assert result.exit_code == ENVIRONMENT and "FMHA_HOST_CXX" in one_sentence(result)


@pytest.mark.parametrize("value", ["{tmp}/data", "/bin/false"])
def test_a_host_compiler_that_does_not_answer(value, monkeypatch, tmp_path):
    monkeypatch.setenv("FMHA_HOST_CXX", value.format(tmp=tmp_path))
    with pytest.raises(ToolchainError, match="set FMHA_HOST_CXX") as caught:
        gxx._version(gxx._compiler())
    assert len(str(caught.value).splitlines()) == 1


def test_compilers_may_be_named_from_here(monkeypatch, tmp_path):
    """They run in folders of their own."""
    monkeypatch.setenv("FMHA_NVCC", "./toolkit/nvcc")
    result = fmha("build", SMALL.name)
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("value", ["a b", "a\nb", "\u00e9", "x" * 101])
def test_a_commit_that_is_none(value, monkeypatch):
    monkeypatch.setenv("FMHA_COMMIT", value)
    with pytest.raises(InputError, match=r"^FMHA_COMMIT=.* is not the name of a commit; set it to"):
        config.commit()


def test_the_doctor_names_what_to_unset(monkeypatch):
    for name in NUMBERS:
        monkeypatch.setenv(name, "many")
    monkeypatch.setenv("FMHA_CUBIN_DIR", "~nosuchuser/x")
    monkeypatch.setenv("FMHA_COMMIT", "a b")
    text = fmha("doctor").stdout
    for name in (*NUMBERS, "FMHA_CUBIN_DIR", "FMHA_COMMIT"):
        assert len(re.findall(rf"^    unset {name}$", text, re.MULTILINE)) == 1

# SPDX-License-Identifier: Apache-2.0
"""Whatever is published is on disk before it gets its name, and the name is on disk before anybody is told of it."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
from helpers.artefacts import OTHER, SMALL

from fmha_runtime.kernels import cache, ledger
from fmha_runtime.toolchain import build, gxx, ptx

LIBRARY_OF = gxx.library_of  # conftest.py keeps others from it


@pytest.fixture
def names(monkeypatch):
    """Every name that was given, in order; each is checked when it is given and at the end."""
    synced, given, waiting = set(), [], set()
    real = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}

    def fsync(handle):
        real["fsync"](handle)
        path = os.readlink(f"/proc/self/fd/{handle}")
        synced.add(path)
        waiting.discard(path)

    def renaming(name):
        def rename(source, target, **options):
            path = Path(source)
            for each in [path, *(path.iterdir() if path.is_dir() else ())]:
                assert os.fspath(each) in synced, f"{target} gets its name before {each.name} is on disk"
            real[name](source, target, **options)
            given.append(Path(target).name)
            waiting.add(os.path.dirname(target))

        return rename

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, renaming(name))
    yield given
    assert not waiting, "names that are not on disk"


def test_a_build(own_cache, fake_nvcc, names):
    row = build.build([SMALL])[0].row
    assert names == [cache.MARKER, row.path.parent.name]


def test_a_packaged_root(own_cache, fake_nvcc, names, tmp_path):
    build.build([SMALL, OTHER], into=tmp_path / "kernels")
    assert sorted(names) == [f"{SMALL.name}.cubin", f"{OTHER.name}.cubin", "fwd_sm80.json"]


def test_ptx(own_cache, fake_nvcc, names):
    ptx.compile_ptx(SMALL)
    assert names[-1].endswith(".ptx")


def test_a_library_of_the_emulator(own_cache, tmp_path, monkeypatch, names):
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nfor word; do out=$word; done\necho "$*" | tee "$out"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("FMHA_HOST_CXX", str(compiler))
    LIBRARY_OF("int probe;", "probe")
    assert [Path(name).suffix for name in names] == ["", ".o", ".so"]


def test_a_ledger(names, tmp_path):
    values = {"str": "x", "int": 1, "float": 0.5, "str | None": None}
    record = ledger.Record(**{each.name: values[each.type] for each in fields(ledger.Record)})
    ledger.record([replace(record, name=SMALL.name, how="cubin")], tmp_path)
    assert names == ["fwd_sm80.json"]

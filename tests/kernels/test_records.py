# SPDX-License-Identifier: Apache-2.0
"""JSON with a number, a text or a list in the wrong place is one sentence that names the file and the field."""

from __future__ import annotations

import json
import math

import pytest
from click.testing import CliRunner
from helpers import ROOT
from helpers.artefacts import SMALL

from fmha_runtime import config, records
from fmha_runtime.bench.record import BenchRecord, Timing
from fmha_runtime.cli import program as cli
from fmha_runtime.errors import ArtifactError
from fmha_runtime.kernels import ledger, manifest, store
from fmha_runtime.kernels.ledger import Ledger
from fmha_runtime.toolchain import build
from fmha_runtime.tune.record import Outcome, TuneRecord

NO_NUMBERS = ["12", None, True, [], {}, -1, math.nan, math.inf, "NaN"]

LEDGER = sorted((ROOT / "cubins" / "verified").glob("fwd_*.json"))[0]
BENCH = sorted((ROOT / "docs" / "bench").glob("h200_*.json"))[0]
TUNE = sorted((ROOT / "docs" / "notes").glob("tune_*.json"))[0]


def sentence(error):
    text = str(error)
    assert len(text.splitlines()) == 1 and "object at 0x" not in text
    return text


def changed(source, target, change):
    """A copy of a record, changed."""
    data = json.loads(source.read_text())
    change(data)
    target.write_text(json.dumps(data))
    return target


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("field", ["cases", "worst_rel_l2"])
def test_ledgers(tmp_path, field, value):
    changed(LEDGER, tmp_path / LEDGER.name, lambda data: data["records"][3].update({field: value}))
    with pytest.raises(ArtifactError, match="is not a verification ledger") as caught:
        Ledger.load(tmp_path)
    assert f"{field} is {value!r}" in sentence(caught.value) and LEDGER.name in str(caught.value)


@pytest.mark.parametrize("value", [v for v in NO_NUMBERS if v is not None], ids=repr)
@pytest.mark.parametrize(("part", "field"), [("cells", "median_us"), ("cells", "reps"), ("host", "host_us")])
def test_bench_records(tmp_path, part, field, value):
    path = changed(BENCH, tmp_path / "bench.json", lambda data: data[part][0].update({field: value}))
    with pytest.raises(ArtifactError, match="is not a benchmark record") as caught:
        BenchRecord.load(path)
    assert f"{field} is {value!r}" in sentence(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("value", [v for v in NO_NUMBERS if v is not None], ids=repr)
def test_tuning_records(tmp_path, value):
    def speed(data):
        speeds = data["kernels"][0]["outcomes"][0]["tflops"]
        speeds[next(iter(speeds))] = value

    for change in (speed, lambda data: data["kernels"][0]["outcomes"][0].update({"registers": value})):
        path = changed(TUNE, tmp_path / "tune.json", change)
        with pytest.raises(ArtifactError, match="is not a tuning record") as caught:
            TuneRecord.load(path)
        assert f" is {value!r}" in sentence(caught.value)


@pytest.mark.parametrize(
    "text", ["", "7", "[]", "null", "[" * 100_000, '{"schema": 1}', '{"schema": 1, "cells": 3, "meta": {}, "host": []}']
)
@pytest.mark.parametrize("load", [BenchRecord.load, TuneRecord.load], ids=["bench", "tune"])
def test_what_is_no_record(tmp_path, text, load):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=r"record\.json is not a"):
        load(path)


@pytest.mark.parametrize("text", ["", "7", "[]", "null", "[" * 100_000, '{"schema": 2, "records": [7]}', "\xff"])
def test_what_is_no_ledger(tmp_path, text):
    (tmp_path / LEDGER.name).write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match="is not a verification ledger"):
        Ledger.load(tmp_path)


def test_a_ledger_that_is_a_folder(tmp_path):
    (tmp_path / LEDGER.name).mkdir()
    with pytest.raises(ArtifactError, match="is not a verification ledger"):
        Ledger.load(tmp_path)


def test_the_recorded_ones_are_read_as_they_were_written():
    assert len(list(Ledger.load())) > 1000
    assert BenchRecord.load(BENCH).cells and TuneRecord.load(TUNE).choices()
    assert records.parsed(Timing, {"case": "a", "provider": "ours"}) == Timing("a", "ours")
    assert records.parsed(Outcome, {"variant": "a", "tflops": {"x": 3}}).tflops == {"x": 3}


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (7, "a Timing is 7, not an object"),
        ({"case": "a"}, "lacks provider"),
        ({"case": "a", "provider": "b", "colour": 1}, "unknown fields: colour"),
        ({"case": 1, "provider": "b"}, "case is 1, not text"),
    ],
)
def test_what_is_wrong_with_an_item(item, text):
    with pytest.raises(ValueError, match=text):
        records.parsed(Timing, item)


class TestRows:
    @pytest.fixture(autouse=True)
    def setup(self, own_cache, fake_nvcc, tmp_path, monkeypatch):
        monkeypatch.setattr(config, "package_root", lambda: tmp_path / "package")
        self.row = build.build([SMALL])[0].row.path.parent / manifest.ROW

    def run(self, *words):
        result = CliRunner().invoke(cli.main, list(words))
        assert "Traceback" not in result.output and "this is a bug" not in result.output
        return result

    @pytest.mark.parametrize("value", [*NO_NUMBERS, 1.5], ids=repr)
    @pytest.mark.parametrize("field", ["registers", "size", "abi"])
    def test_fields_of_a_build(self, field, value):
        changed(self.row, self.row, lambda data: data.update({field: value}))
        listed = self.run("list", SMALL.name)
        (line,) = [line for line in listed.stderr.splitlines() if line.startswith("broken")]
        assert f"{field} is {value!r}, not a count" in line and str(self.row) in line
        assert self.run("doctor").exit_code == 4
        with pytest.raises(ArtifactError, match=f"{field} is ") as caught:
            store.find(SMALL)
        sentence(caught.value)
        assert self.run("build", SMALL.name).exit_code == 0, "building again is the remedy"
        assert "ready" in self.run("list", SMALL.name).stdout

    @pytest.mark.parametrize("cut", [1, 40, 400, 500])
    def test_a_table_that_was_cut_short(self, tmp_path, monkeypatch, cut):
        root = tmp_path / "kernels"
        build.build([SMALL], into=root)
        table = manifest.table(root, SMALL.op, SMALL.arch)
        table.write_bytes(table.read_bytes()[:-cut])
        monkeypatch.setenv("FMHA_CUBIN_DIR", str(root))
        self.row.unlink()
        state = store.state(SMALL)
        assert state.word == ("ready" if cut == 1 else "broken")
        if cut > 1:
            assert f"the row of {SMALL.name} is not JSON" in sentence(state.reason)
            assert self.run("doctor").exit_code == 4


def test_the_program_says_it_in_a_line(tmp_path, monkeypatch):
    changed(LEDGER, tmp_path / LEDGER.name, lambda data: data["records"][0].update(cases="many"))
    monkeypatch.setattr(ledger, "folder", lambda: tmp_path)
    result = CliRunner().invoke(cli.main, ["list", SMALL.name])
    assert result.exit_code == 4
    (line,) = result.stderr.splitlines()
    assert "cases is 'many', not a count" in line

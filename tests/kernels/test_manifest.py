# SPDX-License-Identifier: Apache-2.0
"""Rows tell the truth or are refused: schema, types, staleness, damage, order, the lock file."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers import artefacts
from helpers.artefacts import OTHER, SMALL

from fmha_runtime import config
from fmha_runtime.errors import ArtifactError
from fmha_runtime.kernels import cache, catalog, manifest, sources, store
from fmha_runtime.kernels.tile import Tile
from fmha_runtime.toolchain import build

pytestmark = pytest.mark.usefixtures("own_cache", "fake_nvcc")


@pytest.fixture(autouse=True)
def package_without_cubins(request, tmp_path, monkeypatch):
    """The committed manifest as a fresh clone has it, whatever `make kernels` has put beside it here."""
    if request.cls is None:
        root = tmp_path / "package"
        shutil.copytree(config.package_root() / "manifest", root / "manifest")
        monkeypatch.setattr(config, "package_root", lambda: root)


@pytest.fixture
def row():
    """The row of one kernel in the cache."""
    return build.build([SMALL])[0].row


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A packaged root with two kernels, searched first."""
    root = tmp_path / "packaged"
    build.build([OTHER, SMALL], into=root)
    monkeypatch.setenv("FMHA_CUBIN_DIR", str(root))
    return root


def table(root):
    return manifest.table(root, SMALL.op, SMALL.arch)


def edit(path, **changes):
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps(data))


def edit_row(path, **changes):
    """Change the first row of a manifest."""
    data = json.loads(path.read_text())
    data["rows"][0].update(changes)
    path.write_text(json.dumps(data))


def test_a_row_survives_its_file(row):
    assert manifest.KernelRow.from_json(row.to_json(), row.path).to_json() == row.to_json()
    assert manifest.read_entry(row.path.parent) == row
    assert (row.registers, row.spill_bytes, row.abi) == (100, 0, sources.abi())
    assert row.tile == catalog.tile(SMALL)


def test_one_row_a_line_sorted_by_name(packaged):
    lines = table(packaged).read_text().splitlines()
    names = [json.loads(line.rstrip(","))["name"] for line in lines[1:-1]]
    assert names == sorted([SMALL.name, OTHER.name])
    assert json.loads(lines[0] + "]}")["schema"] == manifest.SCHEMA


def test_another_schema_is_refused_with_both_numbers(packaged):
    edit(table(packaged), schema=99)
    with pytest.raises(ArtifactError, match=r"schema 99.*reads schema 2") as caught:
        store.find(SMALL)
    assert str(table(packaged)) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"schema": 2}', '{"schema": 2, "rows": 7}', "\xff", "[" * 100_000],
    ids=range(8),
)
def test_text_that_is_no_manifest(packaged, text):
    table(packaged).write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match=r"fwd_sm80\.json"):
        store.find(SMALL)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../etc/passwd"},
        {"name": None},
        {"tile": "64x64"},
        {"tile": 3},
        {"size": -1},
        {"size": "12"},
        {"registers": True},
        {"registers": 1.5},
        {"abi": None},
        {"sha256": 5},
        {"flags": ["-O3"]},
    ],
    ids=str,
)
def test_impossible_fields(packaged, change):
    edit_row(table(packaged), **change)
    with pytest.raises(ArtifactError, match=r"fwd_sm80\.json is not usable"):
        store.find(SMALL)


def test_a_missing_field_is_named(packaged):
    data = json.loads(table(packaged).read_text())
    del data["rows"][0]["sha256"]
    table(packaged).write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="sha256"):
        store.find(SMALL)


def test_a_row_of_another_table_is_refused(packaged):
    edit_row(table(packaged), name=SMALL.name.replace("sm80", "sm89"))
    (error,) = store.rows()[1]
    assert "belongs to another table" in str(error)


def test_the_one_table_of_an_earlier_version_is_named(packaged):
    shutil.rmtree(packaged / "manifest")
    (packaged / "manifest.json").write_text('{"schema": 1, "rows": []}')
    with pytest.raises(ArtifactError, match=r"earlier version \(schema 1\).*fmha build --into"):
        store.find(SMALL)
    assert [str(error) for error in store.rows()[1]] != []


def test_two_rows_of_one_kernel(packaged):
    data = json.loads(table(packaged).read_text())
    data["rows"].append(data["rows"][0])
    table(packaged).write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="two rows"):
        store.find(SMALL)


def test_nothing_built():
    assert store.find(SMALL) is None
    state = store.state(SMALL)
    assert state.word == "not built"
    assert f"fmha build {SMALL.name}" in state.reason


def test_ready(row):
    assert store.find(SMALL) == row
    assert store.state(SMALL).word == "ready"
    assert manifest.load_image(row) == row.path.read_bytes()


def test_states_agree_with_state(row, packaged):
    specs = catalog.enumerate_specs()
    inventory = store.Inventory.of(specs).states.values()
    assert [s.word for s in inventory] == [store.state(s).word for s in specs]
    assert sum(s.word == "ready" for s in inventory) == 2


def test_another_tile_is_stale(row, monkeypatch):
    monkeypatch.setattr(catalog, "tile", lambda spec: Tile(64, 64, 4, 2, 1))
    assert store.find(SMALL) is None
    state = store.state(SMALL)
    assert state.word == "stale"
    assert str(row.tile) in state.reason and "64x64 w4 s2 c1" in state.reason


def test_another_abi_is_stale(row, monkeypatch):
    monkeypatch.setattr(sources, "abi", lambda: row.abi + 1)
    assert store.find(SMALL) is None
    assert f"ABI {row.abi}, this runtime speaks {row.abi + 1}" in store.state(SMALL).reason


def test_other_sources_are_stale(row, tmp_path, monkeypatch):
    header = artefacts.editable_sources(tmp_path, monkeypatch) / "fmha" / "blocks/mask.cuh"
    assert store.find(SMALL) == row
    header.write_text("// A comment changes no byte of a cubin.\n" + header.read_text())
    assert store.find(SMALL) == row
    header.write_text(header.read_text() + "int more;\n")
    assert store.find(SMALL) is None
    assert "built from code" in store.state(SMALL).reason


def test_other_flags_are_stale(row, monkeypatch):
    monkeypatch.setattr(sources, "flags", lambda arch: ("-O1",))
    assert "flags" in store.state(SMALL).reason


def test_a_truncated_cubin_is_broken_before_it_is_loaded(row):
    row.path.write_bytes(row.path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=rf"has {row.size - 1} bytes, its row says {row.size}"):
        store.find(SMALL)


def test_a_changed_byte_is_refused_at_load(row):
    image = bytearray(row.path.read_bytes())
    image[5] ^= 1
    row.path.write_bytes(image)
    with pytest.raises(ArtifactError, match="is not the cubin that was built") as caught:
        manifest.load_image(store.find(SMALL))
    assert caught.value.path == row.path
    assert caught.value.expected == row.sha256
    assert caught.value.expected in str(caught.value) and caught.value.found in str(caught.value)
    assert f"fmha build --force {SMALL.name}" in str(caught.value)


def test_a_cubin_that_vanishes_after_the_search(row):
    found = store.find(SMALL)
    found.path.unlink()
    with pytest.raises(ArtifactError, match="cannot read"):
        manifest.load_image(found)


def test_a_damaged_entry_does_not_hide_a_good_one(row, packaged):
    (row.path.parent / "row.json").write_text("{")
    assert store.find(SMALL).root == "FMHA_CUBIN_DIR"
    assert [str(error) for error in store.rows()[1]] != []


def test_a_damaged_entry_is_reported_when_nothing_else_serves(row):
    (row.path.parent / "row.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"row\.json"):
        store.find(SMALL)
    assert store.state(OTHER).word == "not built", "other kernels do not suffer"
    assert store.Inventory.of([SMALL, OTHER]).states[OTHER].word == "not built"


def test_an_entry_of_another_version_is_passed_over(row):
    """Two versions may share a cache: neither is broken by what the other built."""
    edit(row.path.parent / "row.json", schema=manifest.SCHEMA - 1)
    assert store.find(SMALL) is None
    assert store.state(SMALL).word == "not built"
    assert store.rows()[1] == []
    assert len(cache.sweep(config.cache_dir()).removed) == 1


def test_an_entry_of_another_kernel_is_refused(row):
    other = row.path.parent.with_name(row.path.parent.name.replace(SMALL.name, OTHER.name))
    shutil.copytree(row.path.parent, other)
    with pytest.raises(ArtifactError, match=f"describes {SMALL.name}"):
        store.find(OTHER)


def test_roots_are_searched_in_order(row, packaged, monkeypatch):
    assert store.find(SMALL).root == "FMHA_CUBIN_DIR"
    assert store.find(SMALL).path == packaged / "sm80" / f"{SMALL.name}.cubin"
    monkeypatch.delenv("FMHA_CUBIN_DIR")
    assert store.find(SMALL).root == "cache"


def test_a_cache_may_serve_as_the_extra_root(row, monkeypatch, tmp_path):
    monkeypatch.setenv("FMHA_CUBIN_DIR", str(config.cache_dir()))
    monkeypatch.setenv("FMHA_CACHE_DIR", str(tmp_path / "empty"))
    assert store.find(SMALL).root == "FMHA_CUBIN_DIR"


def test_an_extra_root_that_does_not_exist_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("FMHA_CUBIN_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(ArtifactError, match=r"FMHA_CUBIN_DIR=.*nowhere is not a folder"):
        store.find(SMALL)


def test_a_manifest_without_its_cubin_locks_and_does_not_serve(packaged, monkeypatch):
    monkeypatch.delenv("FMHA_CUBIN_DIR")
    monkeypatch.setattr(config, "package_root", lambda: packaged)
    (packaged / "sm80" / f"{SMALL.name}.cubin").unlink()
    assert store.find(SMALL) is None
    assert store.state(SMALL).word == "not built"
    assert store.locked(SMALL).spec == SMALL


def test_the_newest_compiler_wins(fake_nvcc):
    for version in ("13.0.99", "13.10.1", "13.2.5"):
        fake_nvcc.write(version=version)
        build.build([SMALL])
    assert len([row for row in store.rows()[0] if row.spec == SMALL and row.path]) == 3
    assert store.find(SMALL).nvcc == "13.10.1"


class TestCommitted:
    """cubins/manifest as it is in the repository."""

    rows, broken = manifest.read(config.package_root())

    def test_is_written_as_the_builder_writes_it(self):
        assert self.broken == []
        for path, text in manifest.write(config.package_root(), self.rows).items():
            assert path.read_text() == text, path

    def test_one_row_is_read_as_in_the_whole_table(self):
        for row in self.rows[::50]:
            assert manifest.read_row(config.package_root(), row.spec) == row

    def test_every_row_is_current(self):
        assert {row.spec.name: store.why_stale(row) for row in self.rows} == {row.spec.name: "" for row in self.rows}

    def test_covers_the_catalogue(self):
        if not self.rows:
            pytest.skip("no kernel is locked yet: run `fmha build --into cubins`")
        assert {row.spec for row in self.rows} == set(catalog.enumerate_specs())

    def test_stays_small_enough_to_ship(self):
        for arch in {row.spec.arch for row in self.rows}:
            assert sum(row.size for row in self.rows if row.spec.arch is arch) < 60 << 20

# SPDX-License-Identifier: Apache-2.0
"""``fmha build --check``: identical by code, by bytes, or changed; nothing is written unasked."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from helpers import artefacts
from helpers.artefacts import OTHER, SMALL

from fmha_runtime import config
from fmha_runtime.cli import program as cli
from fmha_runtime.errors import BuildError
from fmha_runtime.kernels import manifest, sources, store
from fmha_runtime.toolchain import build, check

HOPPER = "fmha_fwd_sm90a_bf16_d64"


@pytest.fixture
def package(own_cache, fake_nvcc, tmp_path, monkeypatch):
    """A packaged root with two kernels of the pretended compiler."""
    root = tmp_path / "package"
    build.build([SMALL, OTHER], into=root)
    monkeypatch.setattr(config, "package_root", lambda: root)
    return root


@pytest.fixture
def sources_copy(tmp_path, monkeypatch):
    return artefacts.editable_sources(tmp_path, monkeypatch) / "fmha"


def words(specs=(SMALL, OTHER), **options):
    return [one.word for one in check.check(specs, **options)]


def edit(root, old, new):
    """Replace text in every header."""
    count = 0
    for path in root.rglob("*.cuh"):
        text = path.read_text()
        count += text.count(old)
        path.write_text(text.replace(old, new))
    assert count


def test_equal_code_compiles_nothing(package, fake_nvcc, sources_copy):
    before = fake_nvcc.runs
    edit(sources_copy, "// SPDX", "// A word more. SPDX")
    assert words() == [check.BY_CODE] * 2
    assert fake_nvcc.runs == before


def test_other_code_is_compiled_and_compared(package, fake_nvcc, sources_copy):
    """The pretended compiler's cubin is the unit, which does not hold the headers: other code, the same bytes."""
    edit(sources_copy, "#pragma once", "#pragma once\nint one_more;")
    before = fake_nvcc.runs
    assert words() == [check.BY_BYTES] * 2
    assert fake_nvcc.runs == before + 2


def test_other_bytes_are_changed_and_named(package, monkeypatch):
    render = sources.render
    monkeypatch.setattr(sources, "render", lambda spec, tile: render(spec, tile) + "int x;\n" * (spec == OTHER))
    first, second = check.check([SMALL, OTHER])
    assert (first.word, second.word) == (check.BY_CODE, check.CHANGED)
    assert "size" in second.reason and second.spec == OTHER
    result = CliRunner().invoke(cli.main, ["build", "--check", SMALL.name, OTHER.name])
    assert result.exit_code == 1 and OTHER.name in result.stdout and SMALL.name not in result.stdout
    assert "1 identical by code · 1 changed" in result.stderr
    allowed = CliRunner().invoke(cli.main, ["build", "--check", "--allow-changed", SMALL.name, OTHER.name])
    assert allowed.exit_code == 0


def test_bytes_edited_by_hand_are_found_when_asked(package):
    path = manifest.table(package, SMALL.op, SMALL.arch)
    sha = store.locked(SMALL).sha256
    path.write_text(path.read_text().replace(sha, "0" * 64))
    assert words() == [check.BY_CODE] * 2
    assert words(compile_all=True) == [check.CHANGED, check.BY_BYTES]


def test_a_kernel_that_no_longer_builds(package, fake_nvcc, sources_copy):
    edit(sources_copy, "#pragma once", "#pragma once\nint one_more;")
    fake_nvcc.write(failing=SMALL.name)
    assert words() == [check.FAILED, check.BY_BYTES]


def test_a_kernel_that_the_manifest_lacks(package):
    from fmha_runtime.kernels.spec import KernelSpec

    assert words([KernelSpec.parse(HOPPER)]) == [check.MISSING]
    assert CliRunner().invoke(cli.main, ["build", "--check", HOPPER]).exit_code == 1


def test_another_compiler_cannot_compare(package, fake_nvcc, sources_copy):
    fake_nvcc.write(version="13.5.37")
    assert words() == [check.BY_CODE] * 2, "nothing has to be compiled"
    edit(sources_copy, "#pragma once", "#pragma once\nint one_more;")
    with pytest.raises(BuildError, match=r"are of nvcc 13\.0\.99 and this is 13\.5\.37.*cannot be compared"):
        words()


def test_update_writes_what_is_identical_by_bytes_and_nothing_else(package, sources_copy, monkeypatch):
    edit(sources_copy, "#pragma once", "#pragma once\nint one_more;")
    render = sources.render
    monkeypatch.setattr(sources, "render", lambda spec, tile: render(spec, tile) + "int x;\n" * (spec == OTHER))
    before = {spec: store.locked(spec) for spec in (SMALL, OTHER)}
    checked = check.check([SMALL, OTHER])
    assert [one.word for one in checked] == [check.BY_BYTES, check.CHANGED]
    assert {spec: store.locked(spec) for spec in before} == before, "checking writes nothing"
    assert check.update(checked) == [SMALL]
    assert store.locked(SMALL).code == sources.code(SMALL, before[SMALL].tile) != before[SMALL].code
    assert store.locked(SMALL).sha256 == before[SMALL].sha256
    assert store.locked(OTHER) == before[OTHER]
    assert words([SMALL]) == [check.BY_CODE]
    assert not list((package / "manifest").glob(".tmp*"))


def test_as_json(package):
    result = CliRunner().invoke(cli.main, ["build", "--check", "--json", SMALL.name])
    (item,) = json.loads(result.stdout)["items"]
    assert (item["name"], item["result"], item["code"]) == (SMALL.name, check.BY_CODE, store.locked(SMALL).code)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--update"], "belong to --check"),
        (["--check", "--force"], "leave out the options of building"),
        (["--check", "--all", SMALL.name], "--all is every kernel"),
    ],
)
def test_options_that_do_not_go_together(arguments, text):
    result = CliRunner().invoke(cli.main, ["build", *arguments])
    assert result.exit_code == 2 and text in result.stderr


def test_the_committed_manifest_is_of_the_present_code():
    """What `fmha build --check --all` says on a clean checkout; no compiler is needed for it."""
    from fmha_runtime.kernels import catalog

    assert {one.word for one in check.check(catalog.enumerate_specs())} == {check.BY_CODE}

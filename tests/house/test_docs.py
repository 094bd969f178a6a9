# SPDX-License-Identifier: Apache-2.0
"""The documentation is true: examples run, links lead somewhere, tables are those of the code."""

from __future__ import annotations

import re

import pytest
from helpers import ROOT

from fmha_runtime import config
from fmha_runtime.cli import program as cli

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "recipes").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.emulator
def test_readme_example_runs(capsys):
    pytest.importorskip("torch", reason="torch is not installed")
    (example,) = blocks(README, "python")
    exec(compile(example, "README.md", "exec"), {})
    text = capsys.readouterr().out
    assert "torch.Size([2, 100, 8, 64]) torch.Size([2, 8, 100])" in text
    assert "chosen    fmha_fwd_sm80_bf16_d64" in text


def test_readme_transformers_example_names_what_exists():
    (example,) = blocks(README, "py")
    compile(example, "README.md", "exec")
    from fmha_runtime.integrations import transformers

    assert "fmha_transformers.register()" in example
    assert transformers.register.__kwdefaults__ == {"device": None, "harmless": ()}
    assert transformers.register.__defaults__ == ("fmha",)


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_pages_for_readers_speak_of_measurements_only(page):
    text = (ROOT / page).read_text(encoding="utf-8").lower()
    assert not [word for word in ("quotient", "goal", "yardstick", "issue 4") if word in text]


def test_every_nan_of_the_accuracy_page_is_explained():
    prose, _, table = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8").partition("<!-- generated")
    assert "| nan |" not in table or "`nan`" in prose


def test_variables_are_those_of_config():
    section = README.partition("## Variables")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    expected = [f"| `{v.name}` | {v.default} | {v.meaning} |" for v in config.VARIABLES]
    assert rows == expected


def test_errors_are_those_of_the_package():
    from fmha_runtime import errors

    section = README.partition("## When it says no")[2].partition("\n## ")[0]
    named = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    raised = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.FmhaError)
    }
    # The base class, and what only who builds or debugs kernels meets.
    assert set(named) == raised - {"FmhaError", "BuildError", "EmulatorFault"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    for command in re.findall(r"(?<![\w.])fmha ([a-z]+)\b", text):
        assert command in cli.main.commands, f"{page.name}: fmha {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page):
    from itertools import chain

    known = {
        option
        for command in cli.main.commands.values()
        for option in chain.from_iterable(parameter.opts for parameter in command.params)
    } | {"--help"}
    for line in re.findall(r"fmha [a-z]+[^`\n]*", page.read_text(encoding="utf-8")):
        for option in re.findall(r"--[a-z][a-z-]*", line):
            assert option in known, f"{page.name}: {line}"


def files_named(text):
    return set(re.findall(r"`((?:\w+/)*\w+\.(?:py|cuh|h))`", text))


def in_its_row(module, text):
    """Whether a line that is about a module's folder names it, without the folder."""
    folder, _, short = module.partition("/")
    return any(f"`{folder}/" in line and f"`{short}`" in line for line in text.splitlines())


def test_the_architecture_page_names_every_file_and_no_other():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = files_named(text)
    package, kernels = ROOT / "fmha_runtime", ROOT / "kernel_src" / "fmha"
    modules = {p.relative_to(package).as_posix() for p in package.rglob("*.py") if p.name != "__init__.py"}
    headers = {p.relative_to(kernels).as_posix() for p in kernels.rglob("*.*h") if p.parent.name != "ptx"}
    short = {p.partition("/")[2] for p in modules}
    missing = {p for p in modules | headers if p not in named and not in_its_row(p, text)}
    assert not missing
    others = {
        path.relative_to(ROOT).as_posix() for folder in ("tests", "tools") for path in (ROOT / folder).rglob("*.py")
    }
    assert not named - modules - headers - short - others


def test_a_short_name_counts_in_the_row_of_its_folder_only():
    text = "| `verify/`, `bench/` | `run.py` |\n| `tune/` | `record.py` |"
    assert in_its_row("bench/run.py", text)
    assert not in_its_row("tune/run.py", text)


def test_a_file_that_is_not_named_is_noticed():
    assert files_named("`a.py`, `b/c.cuh` and `d/e.h`, not `f` or g.py") == {"a.py", "b/c.cuh", "d/e.h"}

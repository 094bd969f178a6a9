# SPDX-License-Identifier: Apache-2.0
"""tests/constraints.txt pins what pyproject.toml asks for, within its ranges, and README names what is pinned."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")

ROOT = Path(__file__).resolve().parents[2]
MACHINES = {"torch", "cuda-toolkit"}  # the Makefile chooses them

PINNED = {
    canonicalize_name(r.name): str(r.specifier).removeprefix("==")
    for r in map(Requirement, re.findall(r"^[^#\n]+$", (ROOT / "tests" / "constraints.txt").read_text(), re.M))
}


def test_what_pyproject_asks_for_is_pinned_within_its_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(x for extra in project["optional-dependencies"].values() for x in extra)]
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        if name not in MACHINES:
            assert name in PINNED, f"{name} floats: make constraints"
            assert PINNED[name] in requirement.specifier, f"{requirement} excludes {PINNED[name]}, which was tested"


def test_readme_names_the_tested_transformers():
    minor = ".".join(PINNED["transformers"].split(".")[:2])
    assert f"transformers {minor}," in (ROOT / "README.md").read_text()
    assert minor in (ROOT / "docs" / "recipes" / "transformers.md").read_text()

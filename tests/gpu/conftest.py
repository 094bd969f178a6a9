# SPDX-License-Identifier: Apache-2.0
"""Every test of this folder needs a GPU, and may build a kernel that is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items):
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def build_what_is_missing(monkeypatch):
    monkeypatch.setenv("FMHA_BUILD_ON_DEMAND", "1")

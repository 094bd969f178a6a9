# SPDX-License-Identifier: Apache-2.0
"""Machines to run the program on: without kernels, without a GPU, with an H200."""

from __future__ import annotations

import pytest

from fmha_runtime import config
from fmha_runtime.device import driver
from fmha_runtime.errors import DriverError


@pytest.fixture
def bare_cache(own_cache, tmp_path, monkeypatch):
    """An empty cache, and none of the package's cubins, which a developer may have built."""
    monkeypatch.setattr(config, "package_root", lambda: tmp_path / "package")
    return own_cache


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without a driver."""

    def missing(*args):
        raise DriverError("no CUDA driver on this machine")

    monkeypatch.setattr(driver, "device_count", missing)


@pytest.fixture
def hopper(monkeypatch):
    """A machine that claims to have an H200."""
    monkeypatch.setattr(driver, "available", lambda: True)
    monkeypatch.setattr(driver, "capability", lambda index: (9, 0))
    monkeypatch.setattr(driver, "device_info", lambda index=0: None)

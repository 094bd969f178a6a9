# SPDX-License-Identifier: Apache-2.0
"""What all tests share: a private cache, a pretended nvcc, when GPU and nvcc tests are skipped."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
from helpers.artefacts import FakeNvcc

from fmha_runtime.errors import ToolchainError
from fmha_runtime.toolchain import nvcc


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory):
    """The cache of this run, shared by its workers; one that the caller chose is used as it is."""
    chosen = os.environ.get("FMHA_CACHE_DIR")
    if chosen:
        yield Path(chosen)
        return
    base = tmp_path_factory.getbasetemp()
    run = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMHA_CACHE_DIR", str(run / "fmha-cache"))
        yield run / "fmha-cache"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache for one test, with no other root beside the package's."""
    monkeypatch.setenv("FMHA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FMHA_CUBIN_DIR", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    """A script in the place of nvcc: fast, counts its runs, and fails on request."""
    return FakeNvcc(tmp_path / "toolkit", monkeypatch)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and (reason := _no_gpu()):
        pytest.skip(reason)
    if item.get_closest_marker("nvcc") and (reason := _no_nvcc()):
        pytest.skip(reason)


@functools.cache
def _no_gpu():
    torch = pytest.importorskip("torch")
    return "" if torch.cuda.is_available() else "needs a CUDA device: torch sees none"


@functools.cache
def _no_nvcc():
    try:
        nvcc.find_nvcc()
        nvcc.find_host_cxx()
    except ToolchainError as error:
        return f"needs nvcc: {error}"
    return ""

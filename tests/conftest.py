# SPDX-License-Identifier: Apache-2.0
"""What all tests share: a private cache, a pretended nvcc, when GPU and nvcc tests are skipped."""

from __future__ import annotations

import functools
import os
from collections import Counter
from pathlib import Path

import pytest
from helpers.artefacts import FakeNvcc

from fmha_runtime.errors import ToolchainError
from fmha_runtime.toolchain import gxx, nvcc


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


@pytest.fixture(autouse=True)
def emulator_only_where_it_is_marked(request, monkeypatch):
    """Keeps `make test-fast` fast and honest: a test that runs emulated kernels says so."""
    if request.node.get_closest_marker("emulator") or request.node.get_closest_marker("gpu"):
        return

    def refuse(text, name, include_dirs=None):
        pytest.fail(f"this test runs {name} on the emulator: mark it with pytest.mark.emulator")

    monkeypatch.setattr(gxx, "library_of", refuse)


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


def pytest_terminal_summary(terminalreporter):
    """The time of all tests by folder: seconds of work, whatever the number of workers."""
    seconds, tests = Counter(), Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration") and hasattr(report, "when"):
                parts = report.nodeid.partition("::")[0].split("/")
                folder = parts[1] if len(parts) > 2 else parts[0]
                seconds[folder] += report.duration
                tests[folder] += report.when == "call"
    if sum(tests.values()) > 100:
        terminalreporter.section("time by folder")
        for folder, took in seconds.most_common():
            terminalreporter.write_line(f"{took:8.1f} s  {tests[folder]:5} tests  {folder}")

# SPDX-License-Identifier: Apache-2.0
"""``fmha cache``: where it is, what is removed."""

from __future__ import annotations

from helpers.program import SMALL, fmha

from fmha_runtime.kernels import store
from fmha_runtime.kernels.spec import KernelSpec


def test_cache(bare_cache, fake_nvcc):
    assert fmha("cache", "dir").stdout.strip() == str(bare_cache)
    fmha("build", SMALL)
    assert "removed 0 entries" in fmha("cache", "prune").stderr
    assert "removed 1 entries" in fmha("cache", "clean").stderr
    assert store.state(KernelSpec.parse(SMALL)).word != "ready"


def test_cache_prune_removes_what_is_outdated(bare_cache, fake_nvcc):
    fmha("build", SMALL)
    path = store.find(KernelSpec.parse(SMALL)).path
    path.write_bytes(b"not a cubin")
    assert "removed 1 entries" in fmha("cache", "prune").stderr

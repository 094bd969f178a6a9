# SPDX-License-Identifier: Apache-2.0
"""``fmha inspect``: a kernel that is built and one that is not."""

from __future__ import annotations

import json

import pytest
from helpers.program import SMALL, fmha

from fmha_runtime.kernels import store
from fmha_runtime.kernels.spec import KernelSpec


def test_inspect_of_a_kernel_that_is_not_built(bare_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("FMHA_NVCC", str(tmp_path / "nothing"))
    result = fmha("inspect", SMALL)
    assert result.exit_code == 0
    assert f"fmha build {SMALL}" in result.stdout
    assert "no instruction mix" in result.stdout
    assert fmha("inspect").exit_code == 2


@pytest.mark.nvcc
def test_inspect_of_a_real_kernel(cache_dir):
    assert fmha("build", SMALL).exit_code == 0
    (item,) = json.loads(fmha("inspect", SMALL, "--json").stdout)["items"]
    row = store.find(KernelSpec.parse(SMALL))
    assert (item["registers"], item["spill_bytes"]) == (row.registers, 0)
    assert item["key"] == row.path.parent.name
    words = {name.lower() for name in item["mix"]}
    assert words & {"hmma", "mma"}, "no matrix instruction in an attention kernel"

# SPDX-License-Identifier: Apache-2.0
"""``fmha list``: the whole catalogue, as a table and as JSON."""

from __future__ import annotations

import json
import re

from helpers.program import SMALL, fmha, names

import fmha_runtime
from fmha_runtime.kernels import catalog, store
from fmha_runtime.kernels.spec import KernelSpec


def test_list_shows_the_whole_catalogue():
    result = fmha("list")
    assert result.exit_code == 0
    assert names(result) == [spec.name for spec in catalog.enumerate_specs()]
    assert f"{len(catalog.enumerate_specs())} in catalogue" in result.stderr


def test_list_json():
    result = fmha("list", "--json", "--arch", "sm90", "--head-dim", "192x128", "--op", "fwd")
    body = json.loads(result.stdout)
    assert body["version"] == fmha_runtime.__version__
    assert body["schema"] == 1
    item = body["items"][0]
    assert item["name"] == "fmha_fwd_sm90_bf16_d192x128"
    spec = KernelSpec.parse(item["name"])
    assert (item["arch"], item["op"], item["dtype"]) == ("sm90", "fwd", "bf16")
    assert (item["head_dim"], item["head_dim_v"]) == (192, 128)
    assert (item["mask"], item["score"], item["kv"]) == ("band", "plain", "contiguous")
    assert item["tile"] == str(catalog.tile(spec))
    assert item["smem_bytes"] == catalog.smem_bytes(spec, catalog.tile(spec))
    assert item["state"] in {"ready", "stale", "not built", "broken"}
    assert item["verified"]["state"] in {"verified", "stale", "unverified"}


def test_list_of_a_built_kernel(bare_cache, fake_nvcc):
    assert fmha("build", SMALL).exit_code == 0
    result = fmha("list", SMALL)
    assert re.search(r" 100 +cache .* ready$", result.stdout)
    assert "1 ready" in result.stderr
    (item,) = json.loads(fmha("list", "--json", SMALL).stdout)["items"]
    assert (item["state"], item["from"], item["registers"]) == ("ready", "cache", 100)


def test_list_shows_a_truncated_cubin(bare_cache, fake_nvcc):
    fmha("build", SMALL)
    path = store.find(KernelSpec.parse(SMALL)).path
    path.write_bytes(path.read_bytes()[:10])
    result = fmha("list", SMALL)
    assert "broken" in result.stdout
    assert "fmha build" in result.stdout

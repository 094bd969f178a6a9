# SPDX-License-Identifier: Apache-2.0
"""A small part of the published grids (test_gpu_grids.py has them whole) on the emulator."""

from __future__ import annotations

import pytest
import torch
from helpers import grids

import fmha_runtime as fmha

pytestmark = pytest.mark.emulator

EMULATOR = "emulator:sm90"


def batch(d, lens=(150, 64, 70), heads=4, kv_heads=2, dtype=torch.bfloat16, queries=None):
    return grids.make("cpu", dtype, (d, d), heads, kv_heads, list(lens), queries)


@pytest.mark.parametrize("layout", grids.LAYOUTS)
@pytest.mark.parametrize("d", [40, 128])
def test_layouts(d, layout):
    x = batch(d)
    grids.hold(x, layout, EMULATOR, causal=True)
    grids.hold(x, layout, EMULATOR, causal=True, window=(53, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["softcap", "sinks", "alibi_slopes", "mask", "attention_chunk"])
def test_features(name, dtype):
    x = batch(64, dtype=dtype)
    value = {
        "softcap": 30.0,
        "sinks": torch.rand(4) * 5,
        "alibi_slopes": fmha.alibi_slopes(4),
        "mask": torch.rand(1, len(x.q), 150, generator=torch.Generator().manual_seed(3)) < 0.5,
        "attention_chunk": 64,
    }[name]
    for layout in ("separate", "paged 32"):
        grids.hold(x, layout, EMULATOR, causal=name != "mask", **{name: value})


@pytest.mark.parametrize("queries", [1, 63])
def test_fewer_queries_than_keys(queries):
    x = batch(64, queries=[queries] * 3)
    for layout in ("contiguous", "paged 128 HND"):
        grids.hold(x, layout, EMULATOR, causal=True, window=(127, 0))


def test_a_sequence_of_1024():
    grids.hold(batch(64, (1024,), 2, 1), "separate", EMULATOR, causal=True, window=(127, 0))


def test_the_rule_can_fail(monkeypatch):
    x, real = batch(64), grids.run

    def off(*args, **options):
        out, lse = real(*args, **options)
        return out * 1.01, lse

    monkeypatch.setattr(grids, "run", off)
    with pytest.raises(AssertionError, match="relative L2"):
        grids.hold(x, "separate", EMULATOR)

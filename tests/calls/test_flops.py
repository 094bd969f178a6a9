# SPDX-License-Identifier: Apache-2.0
"""torch's FlopCounterMode counts our operators, by torch's own formula for SDPA."""

from __future__ import annotations

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from helpers import ROOT  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention as sdpa  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count  # noqa: E402

import fmha_runtime as fmha  # noqa: E402

B, S, T, H, HK, D, DV = 3, 17, 29, 4, 4, 64, 32


@pytest.fixture(autouse=True)
def ours():
    torch._dynamo.reset()
    fmha.register_torch_ops()


def half(*shape):
    return torch.randn(*shape).to(torch.bfloat16)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def counted(call, *args, **kwargs):
    with FlopCounterMode(display=False) as counter:
        call(*args, **kwargs)
    return counter.get_total_flops()


def by_torch(queries, keys, heads=H, d=D, dv=DV):
    """Torch's count, sequence by sequence."""
    return sum(
        sdpa_flop_count((1, heads, n, d), (1, heads, m, d), (1, heads, m, dv))
        for n, m in zip(queries, keys, strict=True)
    )


def dense():
    return half(B, S, H, D), half(B, T, HK, D), half(B, T, HK, DV)


def test_dense_as_sdpa():
    q, k, v = dense()
    ours = counted(fmha.attention, q, k, v, causal=True)
    assert ours == counted(
        lambda q, k, v: sdpa(q.float(), k.float(), v.float()), *(x.transpose(1, 2) for x in (q, k, v))
    )
    assert ours == by_torch([S] * B, [T] * B) == 2 * B * H * S * T * (D + DV)
    assert counted(fmha.attention, q, k, v, window=(3, 3), out=half(B, S, H, DV)) == ours
    assert counted(fmha.attention, q, k[:, :, :2], v[:, :, :2]) == ours, "queries share heads of keys"
    used = ints(29, 0, 5)
    assert counted(fmha.attention, q, k, v, seqused_k=used) == by_torch([S] * B, used.tolist())


def test_packed_sequences():
    cu_q, cu_k = ints(0, 5, 5, 17), ints(0, 9, 20, 29)
    q, k, v = half(17, H, D), half(29, HK, D), half(29, HK, DV)
    want = by_torch([5, 0, 12], [9, 11, 9])
    for options in ({}, {"out": half(17, H, DV)}):
        assert counted(fmha.attention_varlen, q, k, v, cu_q, cu_k, 12, 11, causal=True, **options) == want
    want = by_torch([5, 0, 12], [9, 0, 4])
    assert counted(fmha.attention_varlen, q, k, v, cu_q, cu_k, 12, 11, seqused_k=ints(99, -1, 4)) == want


def test_caches():
    q, k, v = dense()
    lengths, want = ints(29, 3, 0), by_torch([S] * B, [29, 3, 0])
    assert counted(fmha.attention_with_kvcache, q, k, v, cache_seqlens=lengths) == want
    assert counted(fmha.attention_with_kvcache, q, k, v, cache_seqlens=7) == by_torch([S] * B, [7] * B)
    pool_k, pool_v = half(12, 8, HK, D), half(12, 8, HK, DV)
    table = torch.arange(12, dtype=torch.int32).view(3, 4)
    options = {"cache_seqlens": ints(32, 3, 100), "page_table": table}
    want = by_torch([S] * B, [32, 3, 32])
    assert counted(fmha.attention_with_kvcache, q, pool_k, pool_v, **options) == want
    cu = ints(0, 1, 1, 8)
    options |= {"cu_seqlens_q": cu, "max_seqlen_q": 7}
    assert counted(fmha.attention_with_kvcache, half(8, H, D), pool_k, pool_v, **options) == by_torch(
        [1, 0, 7], [32, 3, 32]
    )


def test_lengths_that_cannot_be_read_count_as_their_bounds():
    with FakeTensorMode():
        q, k, v = dense()
        assert counted(fmha.attention, q, k, v) == by_torch([S] * B, [T] * B)
        cu = torch.empty(B + 1, dtype=torch.int32)
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        assert counted(fmha.attention_varlen, *flat, cu, cu, 11, 13) == by_torch([11] * B, [13] * B)
        assert counted(fmha.attention_with_kvcache, q, k, v, cache_seqlens=cu[1:]) == by_torch([S] * B, [T] * B)


def test_compiled_calls_are_counted():
    """torch runs what it compiled as plain Python while a mode counts, so fullgraph=True would refuse here."""
    q, k, v = dense()
    compiled = torch.compile(fmha.attention, backend="aot_eager")
    compiled(q, k, v)
    assert counted(compiled, q, k, v) == by_torch([S] * B, [T] * B)


def test_the_first_call_of_a_process_may_run_under_a_counter():
    """The counter was made before our operators were."""
    code = """
import torch, fmha_runtime as fmha
from torch.utils.flop_counter import FlopCounterMode
q = torch.randn(2, 8, 4, 64).half()
counter = FlopCounterMode(display=False)
with counter:
    fmha.attention(q, q, q)
assert counter.get_total_flops() == 2 * 2 * 4 * 8 * 8 * 128, counter.get_total_flops()
late = FlopCounterMode(display=False)
with FlopCounterMode(display=False), late:
    fmha.attention(q, q, q)
assert late.get_total_flops() == counter.get_total_flops()
mine = FlopCounterMode(display=False, custom_mapping={torch.ops.fmha.fwd: lambda *a, out_shape=None, **k: 5})
with mine:
    fmha.attention(q, q, q)
assert mine.get_total_flops() == 5
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr

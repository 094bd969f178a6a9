# SPDX-License-Identifier: Apache-2.0
"""ALiBi, softcap, sinks and chunked attention compute what the reference says, on the emulator."""

from __future__ import annotations

import math
import random

import pytest
import torch
from helpers.numbers import REL_L2, qkv
from hypothesis import given, settings
from hypothesis import strategies as st

import fmha_runtime as fmha
from fmha_runtime.ops.forward import binding, reference
from fmha_runtime.problem import alibi

pytestmark = pytest.mark.emulator


def agree(q, k, v, **options):
    """Output and LSE of the emulated kernel are the reference's; returns the output."""
    out, lse = fmha.attention(q, k, v, return_lse=True, device="emulator", **options)
    ref, ref_lse = reference.attention(q, k, v, **options)
    assert (out.double() - ref).norm() <= REL_L2[q.dtype] * ref.norm()
    assert torch.equal(lse.isinf(), ref_lse.isinf())
    assert (lse.double() - ref_lse).nan_to_num(0).abs().max() < 1e-3
    return out


BOTH = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@BOTH
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (9, 30)}], ids=str)
@pytest.mark.parametrize("sq,sk", [(70, 131), (131, 70)])
def test_alibi(dtype, options, sq, sk):
    q, k, v = qkv(2, sq, sk, 6, 2, 64, dtype=dtype)
    shared = agree(q, k, v, alibi_slopes=fmha.alibi_slopes(6), **options)
    own = torch.stack([fmha.alibi_slopes(6), torch.zeros(6)])
    own = agree(q, k, v, alibi_slopes=own, **options)
    assert torch.equal(own[0], shared[0]) and not torch.equal(own[1], shared[1])
    plain = fmha.attention(q, k, v, device="emulator", **options)
    assert not torch.equal(shared, plain)


@BOTH
@pytest.mark.parametrize("cap,scale", [(3.0, None), (30.0, None), (30.0, 1.0), (0.5, 0.5)])
def test_softcap(dtype, cap, scale):
    q, k, v = qkv(1, 70, 131, 4, 2, 64, dtype=dtype)
    out = agree(q, k, v, softcap=cap, scale=scale, causal=True)
    assert not torch.equal(out, fmha.attention(q, k, v, scale=scale, causal=True, device="emulator"))


def test_softcap_of_enormous_scores_is_the_cap():
    q, k, v = qkv(1, 17, 40, 1, 1, 64, dtype=torch.float16)
    agree(q * 50, k * 50, v, softcap=4.0)


@pytest.mark.parametrize("size", [3.0, 60.0])
def test_sinks(size):
    q, k, v = qkv(2, 131, 70, 6, 2, 40)
    sinks = torch.tensor([1.0, -1.0, 0.0, -math.inf, 0.3, -0.7]) * size
    out = agree(q, k, v, sinks=sinks, causal=True)
    plain, plain_lse = fmha.attention(q, k, v, causal=True, return_lse=True, device="emulator")
    assert torch.equal(out[:, :, 3], plain[:, :, 3])  # a sink of -inf takes no weight
    # out = plain * sigmoid(lse - sink), the identity that lets a sink be applied afterwards
    weight = torch.sigmoid(plain_lse.transpose(1, 2) - sinks).nan_to_num(0)[..., None]
    assert (out.float() - plain.float() * weight).abs().max() < 2e-2


def test_rows_without_keys_keep_their_sink():
    q, k, v = qkv(1, 9, 4, 2, 2, 64)
    sinks = torch.tensor([2.0, -3.0])
    out, lse = fmha.attention(q, k, v, sinks=sinks, causal=True, return_lse=True, device="emulator")
    assert (out[:, :5] == 0).all()
    assert (lse[0, :, :5] - sinks[:, None]).abs().max() < 1e-5
    out, lse = fmha.attention(q, k[:, :0], v[:, :0], sinks=sinks, return_lse=True, device="emulator")
    assert (out == 0).all() and (lse[0] - sinks[:, None]).abs().max() < 1e-5


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (20, None)}], ids=str)
@pytest.mark.parametrize("chunk", [1, 37, 64, 100, 1000])
@pytest.mark.parametrize("sq,sk", [(131, 300), (150, 70)])
def test_attention_chunk(options, chunk, sq, sk):
    q, k, v = qkv(1, sq, sk, 2, 1, 64)
    agree(q, k, v, attention_chunk=chunk, **options)


def test_tiles_outside_the_chunk_are_not_visited():
    """Keys of other chunks are NaN: one of them in a tile that is read would show."""
    q, k, v = qkv(1, 64, 1024, 1, 1, 64)
    want = agree(q, k, v, attention_chunk=256, causal=True)
    k[:, :768] = v[:, :768] = math.nan
    out = fmha.attention(q, k, v, attention_chunk=256, causal=True, device="emulator")
    assert torch.equal(out, want)


def test_chunk_reciprocal_is_division():
    rng = random.Random(0)
    top = 1 << 29
    chunks = [
        *range(1, 70),
        8191,
        8192,
        8193,
        top - 1,
        top,
        *(rng.randrange(1, top) for _ in range(99)),
    ]
    for chunk in chunks:
        multiplier, shift = binding.chunk_reciprocal(chunk)
        assert 0 < multiplier < 1 << 31 and 0 <= shift < 32
        edges = [chunk * rng.randrange(1 + top // chunk) + e for e in (-1, 0, 1) for _ in range(20)]
        for p in [0, 1, top, *edges, *(rng.randrange(top) for _ in range(20))]:
            if 0 <= p <= top:
                assert ((2 * p + 1) * multiplier >> 32) >> shift == p // chunk
        for p in (-1, -chunk, -top):  # before the first key: a chunk that ends at or before 0
            assert ((2 * p + 1) * multiplier >> 32) >> shift < 0


@given(
    sq=st.integers(1, 140), sk=st.integers(0, 200), group=st.integers(1, 3), seed=st.integers(0, 99),
    window=st.tuples(st.none() | st.integers(0, 150), st.none() | st.integers(0, 150)),
    chunk=st.none() | st.integers(1, 250), sink=st.booleans(), what=st.sampled_from(["plain", "alibi", "softcap"]),
)  # fmt: skip
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_combination(sq, sk, group, seed, window, chunk, sink, what):
    q, k, v = qkv(1, sq, sk, 2 * group, 2, 64, dtype=torch.bfloat16, seed=seed)
    options = {"window": window, "attention_chunk": chunk}
    options |= {"sinks": torch.randn(2 * group)} if sink else {}
    options |= {"alibi_slopes": torch.rand(2 * group)} if what == "alibi" else {}
    options |= {"softcap": 5.0} if what == "softcap" else {}
    out, lse = fmha.attention(q, k, v, return_lse=True, device="emulator", **options)
    ref, ref_lse = reference.attention(q, k, v, **options)
    base, _ = reference.baseline(q, k, v, **options)
    allowed = 2 * (base.double() - ref).abs().max() + 2e-2
    assert (out.double() - ref).abs().max() <= allowed
    assert (lse.double() - ref_lse).nan_to_num(0).abs().max() < 1e-3
    assert torch.equal(lse.isinf(), ref_lse.isinf())


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 20, 32, 71])
def test_slopes(heads):
    slopes = alibi.slope_list(heads)
    assert len(slopes) == len(set(slopes)) == heads and all(0 < s < 1 for s in slopes)
    power = 1 << (heads.bit_length() - 1)
    assert slopes[:power] == [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    assert slopes[power:] == alibi.slope_list(2 * power)[0::2][: heads - power]
    assert torch.equal(fmha.alibi_slopes(heads), torch.tensor(slopes, dtype=torch.float32))


def test_slopes_need_heads():
    for heads in (0, -3, 2.5, True):
        with pytest.raises(fmha.InputError, match="positive int"):
            fmha.alibi_slopes(heads)


def test_plans_with_optional_tensors():
    q, k, v = qkv(1, 20, 30, 2, 1, 64)
    slopes, sinks = torch.rand(2), torch.randn(2)
    plan = fmha.plan(q, k, v, alibi_slopes=slopes, sinks=sinks, device="emulator")
    want = fmha.attention(q, k, v, alibi_slopes=slopes, sinks=sinks, device="emulator")
    assert torch.equal(plan.run(q, k, v, alibi_slopes=slopes, sinks=sinks), want)
    with pytest.raises(fmha.InputError, match="one set of optional tensors"):
        plan.run(q, k, v, alibi_slopes=slopes)


def test_cpu_tensors_take_the_reference():
    q, k, v = qkv(1, 20, 30, 2, 1, 64)
    for options in ({"softcap": 2.0}, {"sinks": torch.randn(2)}, {"attention_chunk": 7}):
        ours = fmha.attention(q, k, v, device="emulator", **options)
        assert (ours.float() - fmha.attention(q, k, v, **options).float()).abs().max() < 2e-2

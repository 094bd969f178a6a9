# SPDX-License-Identifier: Apache-2.0
"""Odd lengths, offsets, pages and numbers mean the same in plain torch and in both families of kernels."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from helpers.numbers import close, qkv  # noqa: E402

import fmha_runtime as fmha  # noqa: E402
from fmha_runtime.errors import InputError, UnsupportedProblem  # noqa: E402
from fmha_runtime.ops.forward import reference  # noqa: E402

everywhere = pytest.mark.parametrize(
    "device",
    [
        pytest.param(None, id="torch"),
        pytest.param("emulator:sm80", id="mma.sync", marks=pytest.mark.emulator),
        pytest.param("emulator:sm90", id="wgmma", marks=pytest.mark.emulator),
    ],
)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@everywhere
def test_lengths_below_0_are_0_and_lengths_past_the_room_are_the_room(device):
    q, k, v = qkv(4, 3, 40, 2, 1, 64)
    out, lse = fmha.attention(q, k, v, seqused_k=ints(-5, 0, 9, 1000), return_lse=True, causal=True, device=device)
    close(out, lse, *reference.attention(q, k, v, seqused_k=ints(0, 0, 9, 40), causal=True))
    assert (out[:2] == 0).all() and (lse[:2] == -torch.inf).all()


@everywhere
def test_lengths_past_their_segment_end_with_it(device):
    q, k, v = (t[0] for t in qkv(1, 9, 40, 2, 1, 64))
    cu_q, cu_k, used = ints(0, 4, 9), ints(0, 25, 40), ints(100, -1)
    out, lse = fmha.attention_varlen(q, k, v, cu_q, cu_k, 5, 25, seqused_k=used, return_lse=True, device=device)
    close(out, lse, *reference.attention_varlen(q, k, v, cu_q, cu_k, seqused_k=ints(25, 0)))


@everywhere
def test_cache_lengths_likewise(device):
    q, k, v = qkv(3, 2, 64, 2, 1, 64)
    pool_k, pool_v = (t.reshape(-1, 16, 1, 64) for t in (k, v))
    table = torch.arange(12, dtype=torch.int32).view(3, 4)
    want = reference.attention(q, k, v, seqused_k=ints(0, 64, 17), causal=True)
    options = {"cache_seqlens": ints(-3, 65, 17), "causal": True, "return_lse": True, "device": device}
    close(*fmha.attention_with_kvcache(q, k, v, **options), *want)
    close(*fmha.attention_with_kvcache(q, pool_k, pool_v, page_table=table, **options), *want)


@everywhere
@pytest.mark.parametrize("entry", [-1, 12, 1 << 30])
def test_a_page_that_is_none_inside_the_length_is_refused(device, entry):
    q, k, v = qkv(3, 2, 64, 2, 1, 64)
    pool_k, pool_v = (t.reshape(-1, 16, 1, 64) for t in (k, v))
    table = torch.arange(12, dtype=torch.int32).view(3, 4)
    table[2, 1] = entry
    used = ints(64, 64, 16)
    first = fmha.attention_with_kvcache(q, pool_k, pool_v, page_table=table, cache_seqlens=used, device=device)
    assert first.isfinite().all(), "behind the length an entry may be anything"
    with pytest.raises(
        InputError, match=rf"page_table\[2, 1\] is {entry}, but sequence 2 has 17 tokens.*pages 0 to 11"
    ):
        fmha.attention_with_kvcache(q, pool_k, pool_v, page_table=table, cache_seqlens=used + 1, device=device)


@everywhere
def test_longest_sequences_and_offsets_are_checked(device):
    q, k, v = (t[0] for t in qkv(1, 9, 40, 2, 1, 64))

    def call(cu_q, cu_k, max_q=5, max_k=25):
        return fmha.attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, device=device)

    good = call(ints(0, 4, 9), ints(0, 25, 40))
    assert torch.equal(call(ints(0, 4, 9), ints(0, 25, 40), 9, 64), good)
    for arguments, message in (
        ((ints(0, 4, 9), ints(0, 25, 40), 4), "max_seqlen_q is 4, but sequence 1 has 5 tokens"),
        ((ints(0, 4, 9), ints(0, 25, 40), 5, 24), "max_seqlen_k is 24, but sequence 0 has 25 tokens"),
        ((ints(0, 5, 4), ints(0, 25, 40)), r"cu_seqlens_q\[1\] is 5 and cu_seqlens_q\[2\] is 4; offsets must ascend"),
        ((ints(0, 4, 10), ints(0, 25, 40), 6), r"cu_seqlens_q\[2\] is 10; .* at most the 9 tokens of q"),
        ((ints(0, 4, 9), ints(-1, 20, 40)), r"cu_seqlens_k\[0\] is -1"),
        ((ints(0, 4, 9), ints(0, 25, 41)), "at most the 40 tokens of k"),
    ):
        with pytest.raises(InputError, match=message):
            call(*arguments)
    assert torch.equal(call(ints(0, 4, 9), ints(0, 25, 40)), good)


@everywhere
@pytest.mark.parametrize("given", [-1, 65, True, 1.5])
def test_a_cache_length_that_the_host_knows_is_checked(device, given):
    q, k, v = qkv(3, 2, 64, 2, 1, 64)
    with pytest.raises(InputError, match=r"cache_seqlens is"):
        fmha.attention_with_kvcache(q, k, v, cache_seqlens=given, device=device)


@everywhere
@pytest.mark.parametrize("sink", [float("inf"), 1e30, -1e30, float("-inf")])
def test_extreme_sinks(device, sink):
    q, k, v = qkv(1, 5, 40, 2, 1, 64)
    out, lse = fmha.attention(q, k, v, sinks=torch.full((2,), sink), return_lse=True, device=device)
    if sink > 0:
        assert (out == 0).all() and torch.equal(lse, torch.full_like(lse, sink)), "the sink has all the weight"
    else:
        close(out, lse, *reference.attention(q, k, v))


@everywhere
def test_gradients_are_refused_and_plain_torch_has_them_when_asked(device):
    q, k, v = (t.requires_grad_() for t in qkv(1, 5, 7, 2, 2, 64))
    with pytest.raises(UnsupportedProblem, match="no backward kernel"):
        fmha.attention(q, k, v, device=device)
    with torch.no_grad():
        want = fmha.attention(q, k, v, device=device)
    if device is None:
        out = fmha.attention(q, k, v, fallback="torch")
        assert torch.equal(out, want)
        out.float().sum().backward()
        assert q.grad is not None and q.grad.isfinite().all()


@everywhere
def test_out_may_be_q_and_share_no_byte_with_anything_else(device):
    fused = torch.randn(2, 40, 3 * 2 * 64).bfloat16()
    q, k, v = (t.unflatten(-1, (2, 64)) for t in fused.split(128, -1))
    want = fmha.attention(q, k, v, device=device)
    for out, what in ((k, "k"), (v, "v"), (fused[:, :, 64:192].unflatten(-1, (2, 64)), "q")):
        with pytest.raises(InputError, match=f"out and {what} share memory"):
            fmha.attention(q, k, v, out=out, device=device)
    wider = torch.randn(2, 40, 4 * 2 * 64).bfloat16()
    wider[..., :384] = fused
    a, b, c, d = (t.unflatten(-1, (2, 64)) for t in wider.split(128, -1))
    assert torch.equal(fmha.attention(a, b, c, out=d, device=device), want), "rows of one buffer, but no byte in common"
    again = wider.clone()
    assert fmha.attention(a, b, c, out=a, device=device) is a and torch.equal(a, want)
    assert torch.equal(wider[..., 128:], again[..., 128:])


@everywhere
def test_an_out_whose_elements_share_memory_is_refused(device):
    q, k, v = qkv(2, 40, 40, 2, 2, 64)
    room = torch.empty(2 * 40 * 2 * 64).bfloat16()
    for strides in ((0, 128, 64, 1), (5120, 64, 64, 1), (5120, 0, 64, 1), (64, 128, 64, 1)):
        with pytest.raises(InputError, match="several results would share one place"):
            fmha.attention(q, k, v, out=torch.as_strided(room, q.shape, strides), device=device)
    turned = torch.as_strided(room, q.shape, (64, 256, 128, 1))
    assert torch.equal(fmha.attention(q, k, v, out=turned, device=device), fmha.attention(q, k, v, device=device))

# SPDX-License-Identifier: Apache-2.0
"""The look-alikes under torch.compile: one unbroken graph for all batch sizes, and the numbers of eager calls."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from helpers.flash import BF16, ints  # noqa: E402
from helpers.traced import flat, same  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

from fmha_runtime.compat import flash_attn as fa  # noqa: E402
from fmha_runtime.compat import flash_attn_3 as fa3  # noqa: E402
from fmha_runtime.compat import rotary  # noqa: E402

S, H, HK, D, ROOM = 17, 4, 2, 64, 48


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setenv("FMHA_BUILD_ON_DEMAND", "1")


def half(*shape, device):
    return torch.randn(*shape, device=device).to(BF16)


# Each takes a batch (no size that another dimension has) and a device, and gives the tensors of a call.


def dense(b, device, d=D):
    return [half(b, S, n, d, device=device) for n in (H, HK, HK)]


def kvpacked(b, device):
    return half(b, S, H, D, device=device), half(b, S, 2, HK, D, device=device)


def qkvpacked(b, device):
    return (half(b, S, 3, H, D, device=device),)


def offsets(b, device):
    return torch.arange(b + 1, dtype=torch.int32, device=device) * S


def packed(b, device):
    return *(half(b * S, n, D, device=device) for n in (H, HK, HK)), offsets(b, device)


def kv_of_varlen(b, device):
    return half(b * S, H, D, device=device), half(b * S, 2, HK, D, device=device), offsets(b, device)


def qkv_of_varlen(b, device):
    return half(b * S, 3, H, D, device=device), offsets(b, device)


def cached(b, device):
    q, k, v = (half(b, 1, n, D, device=device) for n in (H, HK, HK))
    caches = [half(b, ROOM, HK, D, device=device) for _ in range(2)]
    angle = torch.rand(ROOM, 8, device=device)
    return q, *caches, k, v, angle.cos(), angle.sin(), ints(*[9] * b, device=device)


def paged(b, device):
    q, k, v = (half(b, 1, n, D, device=device) for n in (H, HK, HK))
    pools = [half(3 * b, 16, HK, D, device=device) for _ in range(2)]
    table = torch.arange(3 * b, dtype=torch.int32, device=device).flip(0).view(b, 3)
    return q, *pools, k, v, ints(*[9] * b, device=device), table


def of_vllm(b, device):
    q, pool, _, _, _, used, table = paged(b, device)
    return q.flatten(0, 1), pool, pool.clone(), torch.arange(b + 1, dtype=torch.int32, device=device), used, table


def call_vllm(q, k, v, cu, used, table):
    out = torch.zeros_like(q)
    fa.flash_attn_varlen_func(
        q=q, k=k, v=v, out=out, cu_seqlens_q=cu, max_seqlen_q=1, seqused_k=used, max_seqlen_k=ROOM, causal=True,
        window_size=None, block_table=table, fa_version=3,
    )  # fmt: skip
    return out


CALLS = {
    "2": (dense, lambda q, k, v: fa.flash_attn_func(q, k, v, causal=True)),
    "2 options": (
        dense,
        lambda q, k, v: fa.flash_attn_func(
            q, k, v, 0.0, 0.3, False, (5, 2), 3.0, deterministic=True, return_attn_probs=True
        ),
    ),
    "2 padded": (lambda b, device: dense(b, device, 100), lambda q, k, v: fa.flash_attn_func(q, k, v, causal=True)),
    "2 kvpacked": (kvpacked, lambda q, kv: fa.flash_attn_kvpacked_func(q, kv, causal=True)),
    "2 qkvpacked": (qkvpacked, lambda qkv: fa.flash_attn_qkvpacked_func(qkv, causal=True)),
    "2 varlen": (packed, lambda q, k, v, cu: fa.flash_attn_varlen_func(q, k, v, cu, cu, S, S, causal=True)),
    "2 varlen kvpacked": (
        kv_of_varlen,
        lambda q, kv, cu: fa.flash_attn_varlen_kvpacked_func(q, kv, cu, cu, S, S, causal=True, return_attn_probs=True),
    ),
    "2 varlen qkvpacked": (qkv_of_varlen, lambda qkv, cu: fa.flash_attn_varlen_qkvpacked_func(qkv, cu, S, causal=True)),
    "2 kvcache": (
        cached,
        lambda q, kc, vc, k, v, cos, sin, n: fa.flash_attn_with_kvcache(
            q, kc, vc, k, v, cos, sin, cache_seqlens=n, causal=True
        ),
    ),
    "2 pages": (
        paged,
        lambda q, kc, vc, k, v, n, table: fa.flash_attn_with_kvcache(
            q, kc, vc, k, v, cache_seqlens=n, block_table=table, causal=True
        ),
    ),
    "vLLM": (of_vllm, call_vllm),
    "3": (dense, lambda q, k, v: fa3.flash_attn_func(q, k, v, causal=True)),
    "3 options": (
        dense,
        lambda q, k, v: fa3.flash_attn_func(q, k, v, 0.3, True, attention_chunk=4, return_attn_probs=True),
    ),
    "3 qkvpacked": (qkvpacked, lambda qkv: fa3.flash_attn_qkvpacked_func(qkv, causal=True)),
    "3 varlen": (
        packed,
        lambda q, k, v, cu: fa3.flash_attn_varlen_func(q, k, v, cu, cu, S, S, causal=True, return_attn_probs=True),
    ),
    "rotary": (cached, lambda q, kc, vc, k, v, cos, sin, n: rotary.apply_rotary_emb(kc, cos, sin)),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_graph_serves_all_batch_sizes(name):
    make, call = CALLS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    compilations = None
    for batch in (5, 6, 11):
        tensors = make(batch, "cpu")
        own = [x.clone() for x in tensors]
        assert same(compiled(*tensors), call(*own))
        assert same(tuple(tensors), tuple(own)), "caches are written alike"
        compilations = compilations or counter.frame_count
    assert counter.frame_count == compilations


@pytest.mark.parametrize("name", ["2", "2 varlen", "3", "3 varlen"])
def test_without_dynamic_shapes_too(name):
    make, call = CALLS[name]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for batch in (5, 6):
        tensors = make(batch, "cpu")
        assert same(compiled(*tensors), call(*tensors))


def test_head_dims_may_be_dynamic():
    compiled = torch.compile(fa.flash_attn_func, fullgraph=True, backend="aot_eager")
    for d in (64, 100, 112, 36):
        q, k, v = dense(2, "cpu", d)
        assert same(compiled(q, k, v), fa.flash_attn_func(q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_inductor_on_the_gpu(name):
    make, call = CALLS[name]
    compiled = torch.compile(call, fullgraph=True)
    tensors = make(5, "cuda")
    own = [x.clone() for x in tensors]
    for ours, plain in zip(flat(compiled(*tensors)), flat(call(*own)), strict=True):
        assert (ours.float() - plain.float()).norm() <= 2e-2 * plain.float().norm() + 1e-6

# SPDX-License-Identifier: Apache-2.0
"""The kernel that packs masks, on a GPU: every bit, streams, graphs, threads."""

from __future__ import annotations

import threading

import pytest

torch = pytest.importorskip("torch")

import fmha_runtime as fmha  # noqa: E402
from fmha_runtime.ops.pack import packer  # noqa: E402
from fmha_runtime.problem import packed_mask  # noqa: E402
from fmha_runtime.verify import run as verifier  # noqa: E402


def same(a, b):
    return torch.equal(a.words.cpu(), b.words.cpu()) and torch.equal(a.any.cpu(), b.any.cpu())


@pytest.mark.parametrize("via", ["cubin", "ptx"])
def test_it_verifies(via):
    packer.prepare(0)  # builds it
    found = verifier.verify_kernel(packer.spec_for(0), device="cuda:0", via=via)
    assert found.ok and not found.skipped, "\n".join(found.lines())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(70, 131), (2, 3, 100, 2300), (1, 1, 1024, 1024)])
def test_the_public_call_packs_as_on_the_cpu(shape, dtype):
    bits = torch.rand(shape, device="cuda") < 0.3
    mask = bits.to(dtype)
    if dtype.is_floating_point:  # what SDPA adds to the scores
        mask = torch.zeros(shape, dtype=dtype, device="cuda").masked_fill(~bits, -torch.inf)
    assert same(fmha.pack_mask(mask), fmha.pack_mask(bits.cpu()))
    assert same(fmha.pack_mask(mask), fmha.pack_mask(mask.cpu()))
    assert same(fmha.pack_mask(mask.transpose(-1, -2)), fmha.pack_mask(mask.transpose(-1, -2).cpu()))


def test_varlen():
    cu = torch.tensor([0, 5, 5, 75, 200], dtype=torch.int32)
    mask = torch.rand(4, 210, 140, device="cuda") < 0.3
    want = fmha.pack_mask(mask.cpu(), cu_seqlens_q=cu)
    assert same(fmha.pack_mask(mask, cu_seqlens_q=cu.cuda()), want)
    assert same(fmha.pack_mask(mask, cu_seqlens_q=cu), want), "lengths on the host are moved"
    assert torch.equal(fmha.unpack_mask(fmha.pack_mask(mask, cu_seqlens_q=cu.cuda()), cu_seqlens_q=cu.cuda()), mask)


def test_a_mask_of_four_gigabytes():
    rows = cols = 1 << 16
    mask = torch.zeros(rows, cols, dtype=torch.bool, device="cuda")
    for at in ((0, 0), (rows - 1, cols - 1), (40000, 60001)):  # row * columns past 2^31
        mask[at] = True
    got = fmha.pack_mask(mask)
    corner = packed_mask.pack(mask[-64:, -64:].cpu())
    assert torch.equal(got.words[0, 0, -1, -1].cpu(), corner.words[0, 0, 0, 0])
    assert int((got.words != 0).sum()) == 3 and int((got.any != 0).sum()) == 3


def qkv(sq=130, sk=300, h=4, hk=2, d=64):
    return [torch.randn(2, s, n, d, device="cuda", dtype=torch.bfloat16) for s, n in ((sq, h), (sk, hk), (sk, hk))]


def test_the_current_stream_and_the_stream_of_a_call():
    q, k, v = qkv()
    mask = torch.rand(130, 300, device="cuda") < 0.5
    want = fmha.attention(q, k, v, mask=mask)
    late = torch.ones_like(mask)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for explicit in (False, True):
        late.fill_(True)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            late.copy_(mask)  # the packer must wait for this
            if not explicit:
                got = fmha.attention(q, k, v, mask=late)
        if explicit:
            out = torch.empty_like(want)
            got = fmha.attention(q, k, v, mask=late, out=out, stream=side.cuda_stream)
        side.synchronize()
        assert torch.equal(got, want), f"explicit={explicit}"


def test_a_graph_packs_the_present_mask():
    q, k, v = qkv()
    mask = torch.rand(130, 300, device="cuda") < 0.5
    fmha.prepare(fmha.explain(q, k, v, mask=mask).problem)
    out = torch.empty_like(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fmha.attention(q, k, v, mask=mask, out=out)
    for seed in range(3):
        torch.manual_seed(seed)
        mask.copy_(torch.rand(130, 300, device="cuda") < 0.3)
        graph.replay()
        assert torch.equal(out, fmha.attention(q, k, v, mask=mask))


def test_the_first_cuda_call_of_a_thread():
    mask = torch.rand(130, 300, device="cuda") < 0.5
    want, got = fmha.pack_mask(mask), []
    torch.cuda.synchronize()
    thread = threading.Thread(target=lambda: got.append(fmha.pack_mask(mask)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert len(got) == 1 and same(got[0], want)

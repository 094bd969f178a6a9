# SPDX-License-Identifier: Apache-2.0
"""The flash_attn look-alike against attention written out here, and a script for flash_attn's documented API."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from helpers import ROOT  # noqa: E402
from helpers.flash import BF16, CPU_AND_GPU, INT, batched, close, pool, split, tensors  # noqa: E402

from fmha_runtime.compat import flash_attn as fa  # noqa: E402
from fmha_runtime.compat import flash_attn_3 as fa3  # noqa: E402
from fmha_runtime.errors import FmhaError, InputError, UnsupportedProblem  # noqa: E402


@pytest.fixture(autouse=True)
def build_what_is_missing(monkeypatch):
    monkeypatch.setenv("FMHA_BUILD_ON_DEMAND", "1")


OPTIONS = [
    ({}, {}),
    ({"causal": True}, {"causal": True}),
    ({"window_size": (9, 4)}, {"window": (9, 4)}),
    ({"window_size": (11, 11), "causal": True}, {"window": (11, 0)}),
    ({"window_size": (-1, 3)}, {"window": (-1, 3)}),
    ({"softcap": 3.0, "causal": True}, {"softcap": 3.0, "causal": True}),
    ({"softmax_scale": 0.3}, {"scale": 0.3}),
    ({"deterministic": True, "num_splits": 4, "pack_gqa": True, "scheduler_metadata": None}, {}),
    ({"attention_chunk": 16, "causal": True}, {"chunk": 16, "causal": True}),
]


@CPU_AND_GPU
@pytest.mark.parametrize("asked,meant", OPTIONS, ids=str)
@pytest.mark.parametrize("sq,sk", [(37, 53), (53, 37)])
def test_func(device, asked, meant, sq, sk):
    q, k, v = tensors(device, sq=sq, sk=sk)
    out, lse, mask = fa.flash_attn_func(q, k, v, return_attn_probs=True, **asked)
    want, want_lse = batched(q, k, v, **meant)
    close(out, want)
    close(lse, want_lse)
    assert out.dtype is BF16 and lse.dtype is torch.float32 and mask.shape == (0,)
    assert torch.equal(fa.flash_attn_func(q, k, v, **asked), out)


@CPU_AND_GPU
def test_alibi(device):
    q, k, v = tensors(device)
    for slopes in (torch.rand(4), torch.rand(2, 4)):
        slopes = slopes.to(device)
        out = fa.flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)
        close(out, batched(q, k, v, slopes=slopes, causal=True)[0])


@CPU_AND_GPU
@pytest.mark.parametrize("d,dv", [(16, 16), (36, 36), (100, 100), (112, 64)])
def test_head_dims_without_a_kernel_are_padded(device, d, dv):
    q, k, v = tensors(device, d=d, dv=dv)
    out, lse, _ = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    want, want_lse = batched(q, k, v, causal=True)
    close(out, want)
    close(lse, want_lse)


@CPU_AND_GPU
def test_packed_forms_and_strides(device):
    qkv = torch.randn(2, 40, 3, 4, 64).to(device, BF16)
    want = fa.flash_attn_func(*qkv.unbind(2), causal=True)
    assert torch.equal(fa.flash_attn_qkvpacked_func(qkv, causal=True), want)
    assert torch.equal(fa.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=True), want)
    strided = torch.stack((qkv, qkv), -1)[..., 0]  # the head dim is not contiguous
    assert torch.equal(fa.flash_attn_qkvpacked_func(strided, 0.0, None, True), want)
    cu = torch.tensor([0, 40, 80], dtype=INT, device=device)
    flat = qkv.flatten(0, 1)
    packed = fa.flash_attn_varlen_qkvpacked_func(flat, cu, 40, causal=True)
    close(packed, want.flatten(0, 1).double())
    got = fa.flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], cu, cu, 40, 40, 0.0, None, True)
    assert torch.equal(got, packed)


@CPU_AND_GPU
def test_varlen(device):
    cu_q, cu_k = [0, 5, 5, 75, 78], [0, 9, 13, 80, 210]
    q, k, v = (x[0] for x in tensors(device, 1, 78, 210))
    both = [torch.tensor(cu, dtype=INT, device=device) for cu in (cu_q, cu_k)]
    out, lse, _ = fa.flash_attn_varlen_func(q, k, v, *both, 70, 130, causal=True, return_attn_probs=True)
    want, want_lse = batched(split(q, cu_q), split(k, cu_k), split(v, cu_k), causal=True)
    close(out, torch.cat(want))
    close(lse, torch.cat(want_lse, 1))
    used = torch.tensor([9, 0, 30, 129], dtype=INT, device=device)
    out = fa.flash_attn_varlen_func(q, k, v, *both, 70, 130, seqused_k=used)
    keys = [[x[:n] for x, n in zip(split(t, cu_k), used.tolist(), strict=True)] for t in (k, v)]
    close(out, torch.cat(batched(split(q, cu_q), *keys)[0]))


@CPU_AND_GPU
@pytest.mark.parametrize("page", [16, 256, 512])
def test_varlen_with_a_block_table(device, page):
    q, k, v = tensors(device, 2, 12, 1024)
    keys, table = pool(k, page, device)
    values, _ = pool(v, page, device)
    cu_q = torch.tensor([0, 12, 24], dtype=INT, device=device)
    cu_k = torch.tensor([0, 700, 700 + 33], dtype=INT, device=device)
    out = fa.flash_attn_varlen_func(q.flatten(0, 1), keys, values, cu_q, cu_k, 12, 1024, causal=True, block_table=table)
    want, _ = batched(q, [k[0, :700], k[1, :33]], [v[0, :700], v[1, :33]], causal=True)
    close(out, torch.cat(want))


def rotated(x, cos, sin, first, step, interleaved):
    """[S, H, D] by the textbook: one pair of dims at a time."""
    x = x.double().clone()
    half = cos.shape[-1]
    for i in range(x.shape[0]):
        at = first + (i if step else 0)
        for p in range(half):
            a, b = (2 * p, 2 * p + 1) if interleaved else (p, p + half)
            c, s = cos[at, p].double(), sin[at, p].double()
            x[i, :, a], x[i, :, b] = x[i, :, a] * c - x[i, :, b] * s, x[i, :, a] * s + x[i, :, b] * c
    return x


LENGTHS = [17, 0, 40]


@CPU_AND_GPU
@pytest.mark.parametrize("layout", ["dense", "rows", "odd rows", "leftpad", "both", "paged"])
@pytest.mark.parametrize("rotary", [None, "interleaved", "halves"])
@pytest.mark.parametrize("causal", [False, True])
def test_kvcache_takes_in_new_keys(device, layout, rotary, causal):
    """The cache holds the new keys where they belong and nothing else of it changes."""
    b, rows, new = 3, 5, 4
    size = {"odd rows": 53, "rows": 96}.get(layout, 64)
    q, k, v = tensors(device, b, new, new)
    k_cache, v_cache = (torch.randn(rows, size, 2, 64).to(device, BF16) for _ in range(2))
    lengths = torch.tensor(LENGTHS, dtype=INT, device=device)
    index = [4, 0, 2] if "row" in layout or layout == "both" else None
    leftpad = [5, 0, 40] if layout in ("leftpad", "both") else [0] * b
    if index is None:
        k_cache, v_cache = k_cache[:b], v_cache[:b]
    options, table = {"causal": causal}, None
    k_new = list(k)
    if rotary:
        angle = torch.rand(size, 8).to(device)
        interleaved = rotary == "interleaved"
        options |= {"rotary_cos": angle.cos(), "rotary_sin": angle.sin(), "rotary_interleaved": interleaved}
        cos, sin = angle.cos(), angle.sin()
        k_new = [rotated(x, cos, sin, n, True, interleaved).to(BF16) for x, n in zip(k, LENGTHS, strict=True)]
        q_new = [rotated(x, cos, sin, n, causal, interleaved).to(BF16) for x, n in zip(q, LENGTHS, strict=True)]
    else:
        q_new = q
    expected = [k_cache.clone(), v_cache.clone()]
    for i, n in enumerate(LENGTHS):
        row = i if index is None else index[i]
        expected[0][row, n : n + new], expected[1][row, n : n + new] = k_new[i], v[i]
    seen = [[x[i if index is None else index[i], leftpad[i] : LENGTHS[i] + new] for i in range(b)] for x in expected]
    caches = [k_cache, v_cache]
    if layout == "paged":
        (caches[0], table), (caches[1], _) = pool(k_cache, 16, device), pool(v_cache, 16, device)
        options["block_table"] = table
    if index is not None:
        options["cache_batch_idx"] = torch.tensor(index, dtype=INT, device=device)
    if any(leftpad):
        options["cache_leftpad"] = torch.tensor(leftpad, dtype=INT, device=device)
    out, lse = fa.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, return_softmax_lse=True, **options)
    want, want_lse = batched(q_new, *seen, causal=causal)
    close(out, want)
    close(lse, want_lse)
    assert lengths.tolist() == LENGTHS
    for got, right in zip(caches, expected, strict=True):
        if table is not None:
            got = got[table.long()].flatten(1, 2)
        if rotary:  # fp32 here, fp64 there: the last bit may differ
            assert (got.float() - right.float()).abs().max() <= 0.02 * right.float().abs().max()
        else:
            assert torch.equal(got, right)


@CPU_AND_GPU
def test_kvcache_lengths_and_windows(device):
    q, k, v = tensors(device, 2, 3, 64)
    full = fa.flash_attn_with_kvcache(q, k, v)
    close(full, batched(q, k, v)[0])
    out = fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=20, causal=True, window_size=(7, 7), softcap=2.0)
    close(out, batched(q, k[:, :20], v[:, :20], window=(7, 0), softcap=2.0)[0])
    slopes = torch.rand(4).to(device)
    out = fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=20, alibi_slopes=slopes, num_splits=3)
    close(out, batched(q, k[:, :20], v[:, :20], slopes=slopes)[0])


@CPU_AND_GPU
def test_kvcache_of_packed_queries_and_keys(device):
    """FlashAttention 3: chunked prefill beside decoding."""
    q_lens, new_lens, lengths = [1, 6, 0], [1, 6, 2], [17, 3, 30]
    q = torch.randn(7, 4, 64).to(device, BF16)
    k, v = (torch.randn(9, 2, 64).to(device, BF16) for _ in range(2))
    caches = [torch.randn(3, 48, 2, 64).to(device, BF16) for _ in range(2)]
    cu_q, cu_new = ([0, *torch.tensor(n).cumsum(0).tolist()] for n in (q_lens, new_lens))
    expected = [x.clone() for x in caches]
    for x, new in zip(expected, (k, v), strict=True):
        for i, part in enumerate(split(new, cu_new)):
            x[i, lengths[i] : lengths[i] + len(part)] = part
    seen = [[x[i, : n + m] for i, (n, m) in enumerate(zip(lengths, new_lens, strict=True))] for x in expected]
    to = {"dtype": INT, "device": device}
    out, lse, *rest = fa3.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=torch.tensor(lengths, **to), cu_seqlens_q=torch.tensor(cu_q, **to),
        cu_seqlens_k_new=torch.tensor(cu_new, **to), max_seqlen_q=6, causal=True, return_softmax_lse=True,
    )  # fmt: skip
    want, want_lse = batched(split(q, cu_q), *seen, causal=True)
    close(out, torch.cat(want))
    close(lse, torch.cat(want_lse, 1))
    assert len(rest) == 2
    assert all(torch.equal(*pair) for pair in zip(caches, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["dense", "paged", "leftpad"])
def test_a_decoding_step_in_a_cuda_graph(layout):
    """Rotary embedding, appending and attention are captured: nothing of it reads a device value on the host."""
    torch.manual_seed(0)
    b, size, steps = 2, 64, 9
    q, k, v = torch.randn(3, steps, b, 1, 4, 64, device="cuda").to(BF16)
    cos, sin = (f(torch.rand(size, 8, device="cuda")) for f in (torch.cos, torch.sin))
    lengths = torch.tensor([5, 30], dtype=INT, device="cuda")
    options = {"cache_seqlens": lengths, "rotary_cos": cos, "rotary_sin": sin, "causal": True}
    if layout == "paged":
        caches = [torch.randn(12, 16, 4, 64, device="cuda").to(BF16) for _ in range(2)]
        options["block_table"] = torch.randperm(12, device="cuda")[:8].view(b, 4).to(INT)
    else:
        caches = [torch.randn(b, size, 4, 64, device="cuda").to(BF16) for _ in range(2)]
    if layout == "leftpad":
        options["cache_leftpad"] = torch.tensor([3, 0], dtype=INT, device="cuda")
    begin, start = lengths.clone(), [x.clone() for x in caches]
    want = []
    for t in range(steps):
        want.append(fa.flash_attn_with_kvcache(q[t], *caches, k[t], v[t], **options))
        lengths += 1
    filled = [x.clone() for x in caches]
    static = [x[0].clone() for x in (q, k, v)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fa.flash_attn_with_kvcache(static[0], *caches, *static[1:], **options)
    lengths.copy_(begin)
    for x, y in zip(caches, start, strict=True):
        x.copy_(y)
    for t in range(steps):
        for x, y in zip(static, (q, k, v), strict=True):
            x.copy_(y[t])
        graph.replay()
        assert torch.equal(out, want[t])
        lengths += 1
    assert all(torch.equal(*pair) for pair in zip(caches, filled, strict=True))


@CPU_AND_GPU
def test_version_3_has_its_own_order(device):
    q, k, v = tensors(device)
    want, want_lse = batched(q, k, v, scale=0.2, causal=True)
    out, lse = fa3.flash_attn_func(q, k, v, 0.2, True, return_attn_probs=True)
    close(out, want)
    close(lse, want_lse)
    cu_q, cu_k = (torch.arange(3, dtype=INT, device=device) * n for n in (37, 53))
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    used = torch.tensor([53, 20], dtype=INT, device=device)
    out = fa3.flash_attn_varlen_func(*flat, cu_q, cu_k, 37, 53, None, used, 0.2, True)
    keys = [[k[0], k[1, :20]], [v[0], v[1, :20]]]
    close(out, torch.cat(batched(q, *keys, scale=0.2, causal=True)[0]))
    qkv = torch.randn(2, 9, 4 + 2 * 2, 64).to(device, BF16)
    parts = qkv.split([4, 2, 2], -2)
    assert torch.equal(fa3.flash_attn_qkvpacked_func(qkv, num_heads_q=4), fa3.flash_attn_func(*parts))


def test_what_cannot_be_honoured_is_refused():
    q, k, v = tensors("cpu")
    for options, what in (
        ({"dropout_p": 0.1}, "dropout_p is 0.1"),
        ({"qv": q}, "qv="),
        ({"softcap": 2.0, "alibi_slopes": torch.ones(4)}, "softcap and alibi_slopes"),
    ):
        with pytest.raises(UnsupportedProblem, match=what):
            fa.flash_attn_func(q, k, v, **options)
    with pytest.raises(UnsupportedProblem, match=r"FP8 scale.*q_descale"):
        fa.flash_attn_func(*(x.to(torch.float8_e4m3fn) for x in (q, k, v)), q_descale=torch.ones(1))
    with pytest.raises(TypeError, match="'soft_cap'"):
        fa.flash_attn_func(q, k, v, soft_cap=1.0)
    with pytest.raises(InputError, match="a pair"):
        fa.flash_attn_func(q, k, v, window_size=3)
    new = [x[:, :2] for x in (k, v)]
    lens = torch.zeros(2, dtype=INT)
    for options, error, what in (
        ({"k": new[0]}, InputError, "k and v come together"),
        ({"k": new[0], "v": new[1]}, InputError, "need cache_seqlens"),
        ({"rotary_cos": torch.ones(9, 8)}, InputError, "rotary_cos and rotary_sin"),
        ({"k": new[0].half(), "v": new[1], "cache_seqlens": lens}, InputError, "all must agree"),
        ({"k": new[0][:, :, :1], "v": new[1], "cache_seqlens": lens}, InputError, "last two axes"),
        ({"k": new[0][:1], "v": new[1][:1], "cache_seqlens": lens}, InputError, "q has batch 2, k and v have 1"),
        ({"block_table": lens[:, None], "cache_leftpad": lens}, UnsupportedProblem, "paged cache"),
        ({"block_table": lens[:, None]}, UnsupportedProblem, "pages of 53 tokens"),
    ):
        with pytest.raises(error, match=what):
            fa.flash_attn_with_kvcache(q[:, :2], k, v, **options)


@pytest.mark.emulator
def test_gradients_are_refused(monkeypatch):
    monkeypatch.setattr(fa.shared, "device", "emulator")
    q, k, v = tensors("cpu", sq=4, sk=4)
    q.requires_grad_()
    with pytest.raises(UnsupportedProblem, match="gradient"):
        fa.flash_attn_func(q, k, v)
    with pytest.raises(UnsupportedProblem, match="gradient"):
        fa.flash_attn_with_kvcache(q, k, v)
    with torch.no_grad():
        fa.flash_attn_func(q, k, v)


@pytest.mark.emulator
@pytest.mark.parametrize("device", ["emulator", "emulator:sm90"])
def test_on_the_emulator(monkeypatch, device):
    """The kernels themselves, among them the paths with gaps between sequences and pages of a dense cache."""
    monkeypatch.setattr(fa.shared, "device", device)
    q, k, v = tensors("cpu", 3, 4, 64)
    close(fa.flash_attn_func(q, k, v, causal=True), batched(q, k, v, causal=True)[0])
    lengths, leftpad = [60, 9, 33], [5, 9, 0]
    out, lse = fa.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=torch.tensor(lengths, dtype=INT), cache_leftpad=torch.tensor(leftpad, dtype=INT),
        causal=True, return_softmax_lse=True,
    )  # fmt: skip
    seen = [[x[i, leftpad[i] : lengths[i]] for i in range(3)] for x in (k, v)]
    want, want_lse = batched(q, *seen, causal=True)
    close(out, want)
    close(lse, want_lse)
    index = [2, 0, 2]
    out = fa.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=torch.tensor(lengths, dtype=INT), cache_batch_idx=torch.tensor(index, dtype=INT)
    )
    seen = [[x[j, :n] for j, n in zip(index, lengths, strict=True)] for x in (k, v)]
    close(out, batched(q, *seen)[0])


# Name, order and default of every parameter, as flash_attn 2.8.3 and flash_attn_interface (FlashAttention 3) have them.
REST = (
    "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None "
    "deterministic=False"
)
SIGNATURES = {
    "flash_attn_func": f"q k v {REST} return_attn_probs=False",
    "flash_attn_kvpacked_func": f"q kv {REST} return_attn_probs=False",
    "flash_attn_qkvpacked_func": f"qkv {REST} return_attn_probs=False",
    # vLLM leaves cu_seqlens_k out, so the next ones need a default as well.
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k=None max_seqlen_q=None max_seqlen_k=None "
    f"{REST} return_attn_probs=False block_table=None",
    "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
    f"{REST} return_attn_probs=False",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {REST} return_attn_probs=False",
    "flash_attn_with_kvcache": "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None cache_seqlens=None "
    "cache_batch_idx=None cache_leftpad=None block_table=None softmax_scale=None causal=False window_size=(-1,-1) "
    "softcap=0.0 rotary_interleaved=True alibi_slopes=None num_splits=0 return_softmax_lse=False",
}
SCALES = "q_descale=None k_descale=None v_descale=None"
TAIL = "num_splits=1 pack_gqa=None deterministic=False sm_margin=0 return_attn_probs=False"
SIGNATURES_3 = {
    "flash_attn_func": f"q k v softmax_scale=None causal=False qv=None {SCALES} window_size=(-1,-1) attention_chunk=0 "
    f"softcap=0.0 {TAIL}",
    "flash_attn_qkvpacked_func": f"qkv softmax_scale=None causal=False {SCALES} window_size=(-1,-1) attention_chunk=0 "
    "softcap=0.0 deterministic=False num_heads_q=None sm_margin=0 return_attn_probs=False",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q=None seqused_k=None "
    f"softmax_scale=None causal=False qv=None {SCALES} window_size=(-1,-1) attention_chunk=0 softcap=0.0 {TAIL}",
    "flash_attn_with_kvcache": "q k_cache v_cache k=None v=None qv=None rotary_cos=None rotary_sin=None "
    "cache_seqlens=None cache_batch_idx=None cache_leftpad=None page_table=None cu_seqlens_q=None "
    f"cu_seqlens_k_new=None max_seqlen_q=None rotary_seqlens=None {SCALES} softmax_scale=None causal=False "
    "window_size=(-1,-1) attention_chunk=0 softcap=0.0 rotary_interleaved=True scheduler_metadata=None num_splits=0 "
    "pack_gqa=None sm_margin=0 return_softmax_lse=False",
}


@pytest.mark.parametrize("module,signatures", [(fa, SIGNATURES), (fa3, SIGNATURES_3)], ids=["2", "3"])
def test_signatures(module, signatures):
    for name, want in signatures.items():
        found = inspect.signature(getattr(module, name)).parameters.values()
        named = [p for p in found if p.kind is not p.VAR_KEYWORD]
        got = [p.name if p.default is p.empty else f"{p.name}={str(p.default).replace(' ', '')}" for p in named]
        assert got == want.split(), name
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in named)


# A decoder layer as people write it against flash_attn: unpadding, training-shaped calls, then decoding with a cache.
SCRIPT = """
import importlib.util
import torch
import flash_attn
from flash_attn import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func

assert tuple(int(x) for x in flash_attn.__version__.split(".")) >= (2, 5, 0)
assert importlib.util.find_spec("flash_attn") is not None
try:
    import flash_attn.modules.mha
except ImportError as error:
    assert "flash_attn.modules" in str(error)
else:
    raise SystemExit("flash_attn.modules is not there")

torch.manual_seed(0)
device, dtype = DEVICE, torch.bfloat16
b, s, h, d = 2, 24, 4, 64
qkv = torch.randn(b, s, 3, h, d, device=device, dtype=dtype)
whole = flash_attn_qkvpacked_func(qkv, dropout_p=0.0, causal=True)
assert whole.shape == (b, s, h, d)

# padded batch
mask = torch.arange(s, device=device) < torch.tensor([[24], [11]], device=device)
tokens, indices, cu_seqlens, longest, used = unpad_input(qkv, mask)
assert used.tolist() == [24, 11] and longest == 24
packed = flash_attn_varlen_qkvpacked_func(tokens, cu_seqlens, longest, causal=True)
padded = pad_input(packed, indices, b, s)
assert (padded[1, 11:] == 0).all()
assert (padded - whole)[mask].abs().max() < 0.04
q, k, v = (index_first_axis(qkv[:, :, i].flatten(0, 1), indices) for i in range(3))
again = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, None, True)
assert torch.equal(again, packed)

# the same, token by token with a cache
k_cache, v_cache = torch.zeros(2, b, 32, h, d, device=device, dtype=dtype)
lengths = torch.zeros(b, dtype=torch.int32, device=device)
steps = []
for t in range(s):
    q, k, v = qkv[:, t : t + 1].unbind(2)
    steps.append(flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True))
    lengths += 1
assert (torch.cat(steps, 1) - whole).abs().max() < 0.04
assert torch.equal(k_cache[:, :s], qkv[:, :, 1])
out, lse, _ = flash_attn_func(*qkv.unbind(2), causal=True, return_attn_probs=True)
assert torch.equal(out, whole) and lse.shape == (b, h, s)
print("fine")
"""


@CPU_AND_GPU
def test_a_script_for_flash_attn_runs_after_install(device):
    start = "from fmha_runtime.compat import flash_attn\nflash_attn.install()\ndel flash_attn\n"
    code = start + SCRIPT.replace("DEVICE", repr(device))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


@pytest.fixture
def clean_modules(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] in ("flash_attn", "flash_attn_interface")]:
        monkeypatch.delitem(sys.modules, name)
    yield
    fa.uninstall()


def test_install_and_uninstall(clean_modules):
    fa.install(device="emulator")
    import flash_attn

    assert flash_attn.flash_attn_func is fa.flash_attn_func
    assert sys.modules["flash_attn.flash_attn_interface"].flash_attn_varlen_func is fa.flash_attn_varlen_func
    assert "flash_attn_interface" not in sys.modules
    assert fa.shared.device == "emulator"
    fa.install(fa3=True)  # a second time changes the options
    import flash_attn_interface

    assert flash_attn_interface.flash_attn_func is fa3.flash_attn_func
    assert fa.shared.device is None
    fa.uninstall()
    fa.uninstall()
    assert not [n for n in sys.modules if n.partition(".")[0] in ("flash_attn", "flash_attn_interface")]


def test_a_real_flash_attn_is_replaced_only_by_force(clean_modules, monkeypatch):
    real, part = type(sys)("flash_attn"), type(sys)("flash_attn.modules")
    monkeypatch.setitem(sys.modules, "flash_attn", real)
    monkeypatch.setitem(sys.modules, "flash_attn.modules", part)
    with pytest.raises(FmhaError, match=r"flash_attn, flash_attn\.modules was imported already.*force=True"):
        fa.install()
    assert sys.modules["flash_attn"] is real
    fa.install(force=True)
    assert sys.modules["flash_attn"].flash_attn_func is fa.flash_attn_func
    assert "flash_attn.modules" not in sys.modules
    fa.uninstall()
    assert sys.modules["flash_attn"] is real and sys.modules["flash_attn.modules"] is part

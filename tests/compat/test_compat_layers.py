# SPDX-License-Identifier: Apache-2.0
"""``flash_attn.layers.rotary`` and ``flash_attn.bert_padding``: by the textbook, and as other code imports them."""

from __future__ import annotations

import inspect
import sys
import types

import pytest

torch = pytest.importorskip("torch")

from helpers.flash import BF16, CPU_AND_GPU, ints  # noqa: E402

from fmha_runtime.compat import bert_padding, rotary  # noqa: E402
from fmha_runtime.compat import flash_attn as fa  # noqa: E402
from fmha_runtime.errors import InputError, UnsupportedProblem  # noqa: E402


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def turned(x, cos, sin, positions, interleaved, sign=1):
    """x [S, H, D] turned one pair of dims after the other, in fp64; positions outside the table turn nothing."""
    x = x.double().clone()
    half = cos.shape[-1]
    for i, at in enumerate(positions):
        if not 0 <= at < cos.shape[0]:
            continue
        for p in range(half):
            a, b = (2 * p, 2 * p + 1) if interleaved else (p, p + half)
            c, s = cos[at, p].double(), sign * sin[at, p].double()
            x[i, :, a], x[i, :, b] = x[i, :, a] * c - x[i, :, b] * s, x[i, :, a] * s + x[i, :, b] * c
    return x


def near(got, want, dtype):
    assert got.dtype is dtype and got.shape == want.shape
    assert (got.double() - want).abs().max() <= (4e-2 if dtype is BF16 else 1e-5)


def angles(rows, half, dtype=torch.float32, device="cpu"):
    angle = 3 * torch.rand(rows, half, device=device)
    return angle.cos().to(dtype), angle.sin().to(dtype)


@CPU_AND_GPU
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offset", [0, 4, "tensor"])
def test_apply_rotary_emb(device, dtype, interleaved, inplace, offset):
    x = torch.randn(2, 9, 3, 40, device=device).to(dtype)
    cos, sin = angles(13, 8, dtype, device)
    first = [2, 7] if offset == "tensor" else [offset] * 2  # 7: the last positions are behind the table
    given = ints(*first, device=device) if offset == "tensor" else offset
    want = torch.stack([turned(x[b], cos, sin, range(n, n + 9), interleaved) for b, n in enumerate(first)])
    before = x.clone()
    out = rotary.apply_rotary_emb(x, cos, sin, interleaved, inplace, seqlen_offsets=given)
    near(out, want, dtype)
    assert (out is x) == inplace and (inplace or torch.equal(x, before))
    back = rotary.apply_rotary(out, cos, sin, given, interleaved=interleaved, conjugate=True)
    near(back, before.double(), dtype)


@CPU_AND_GPU
@pytest.mark.parametrize("interleaved", [False, True])
def test_apply_rotary_emb_of_a_packed_batch(device, interleaved):
    x = torch.randn(15, 3, 40, device=device)
    cos, sin = angles(12, 20, device=device)
    offsets = ints(3, 0, 11, device=device)
    cu = ints(0, 5, 5, 12, device=device)  # the last 3 tokens are of nobody and stay
    out = rotary.apply_rotary_emb(x, cos, sin, interleaved, False, offsets, cu, 7)
    positions = [*range(3, 8), *range(11, 18), -1, -1, -1]
    near(out, turned(x, cos, sin, positions, interleaved), torch.float32)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_has_a_gradient(interleaved):
    cos, sin = angles(9, 5, torch.float64)
    x = torch.randn(2, 7, 2, 12, dtype=torch.float64, requires_grad=True)
    out = rotary.apply_rotary_emb(x, cos, sin, interleaved)
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, x, grad)
    want = torch.stack([turned(g, cos, sin, range(7), interleaved, sign=-1) for g in grad])
    assert (found - want).abs().max() < 1e-5
    y = x * 1  # in place, behind an operation, as models have it
    rotary.apply_rotary_emb(y, cos, sin, interleaved, True)
    (again,) = torch.autograd.grad(y, x, grad)
    assert torch.allclose(again, found)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_plain_form(interleaved):
    x = torch.randn(2, 9, 3, 40)
    cos, sin = angles(9, 8)
    want = rotary.apply_rotary_emb(x, cos, sin, interleaved)
    assert torch.allclose(rotary.apply_rotary_emb_torch(x, cos, sin, interleaved), want, atol=1e-6)
    batch = rotary.apply_rotary_emb_torch(x, cos.expand(2, -1, -1), sin.expand(2, -1, -1), interleaved)
    assert torch.allclose(batch, want, atol=1e-6)
    a = torch.arange(4.0)
    pairs = [-1.0, 0.0, -3.0, 2.0] if interleaved else [-2.0, -3.0, 0.0, 1.0]
    assert rotary.rotate_half(a, interleaved).tolist() == pairs


@pytest.mark.parametrize("form", ["qkv", "grouped", "kv"])
@pytest.mark.parametrize("offset", [0, 3])
def test_packed_forms_in_place(form, offset):
    cos, sin = angles(12, 8)
    cos_k, sin_k = angles(12, 8)
    shape = {"qkv": (2, 9, 3, 4, 40), "grouped": (2, 9, 4 + 2 * 2, 40), "kv": (2, 9, 2, 2, 40)}[form]
    x = torch.randn(shape)
    before = x.clone()
    if form == "kv":
        assert rotary.apply_rotary_emb_kv_(x, cos, sin, seqlen_offsets=offset) is x
        expected = rotary.apply_rotary_emb(before[:, :, 0], cos, sin, seqlen_offsets=offset)
        assert torch.equal(x[:, :, 0], expected) and torch.equal(x[:, :, 1], before[:, :, 1])
        return
    heads = None if form == "qkv" else 4
    q, k, v = before.unbind(2) if form == "qkv" else before.split([4, 2, 2], 2)
    out = rotary.apply_rotary_emb_qkv_(x, cos, sin, cos_k, sin_k, seqlen_offsets=offset, num_heads_q=heads)
    assert out is x
    parts = x.unbind(2) if form == "qkv" else x.split([4, 2, 2], 2)
    assert torch.equal(parts[0], rotary.apply_rotary_emb(q, cos, sin, seqlen_offsets=offset))
    assert torch.equal(parts[1], rotary.apply_rotary_emb(k, cos_k, sin_k, seqlen_offsets=offset))
    assert torch.equal(parts[2], v)


@CPU_AND_GPU
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scale_base", [None, 512])
def test_the_module(device, interleaved, scale_base):
    module = rotary.RotaryEmbedding(16, base=500.0, interleaved=interleaved, scale_base=scale_base, device=device)
    assert not module.state_dict(), "nothing of it is saved"
    qkv = torch.randn(2, 9, 3, 4, 40, device=device)
    before = qkv.clone()
    assert module(qkv, seqlen_offset=5) is qkv
    position = torch.arange(14, device=device).double()
    pair = torch.arange(8, device=device).double()
    angle = position[:, None] / 500.0 ** (2 * pair / 16)
    scale = torch.ones(14, 8, device=device).double()
    if scale_base:
        scale = ((2 * pair + 0.4 * 16) / (1.4 * 16)) ** ((position - 7)[:, None] / scale_base)
    for i, factor in ((0, scale), (1, 1 / scale)):
        table = angle.cos() * factor, angle.sin() * factor
        want = torch.stack([turned(before[b, :, i], *table, range(5, 14), interleaved) for b in range(2)])
        near(qkv[:, :, i], want, torch.float32)
    assert torch.equal(qkv[:, :, 2], before[:, :, 2])


def test_the_modules_other_forms():
    module = rotary.RotaryEmbedding(16)
    qkv = torch.randn(2, 9, 8, 40)
    q, k, v = (x.clone() for x in qkv.split([4, 2, 2], 2))
    grouped = module(qkv.clone(), num_heads_q=4)
    kv = torch.stack((k, v), 2)
    given = q.clone()
    out = module(given, kv)
    assert out[0] is given and out[1] is kv
    assert torch.equal(grouped, torch.cat((given, kv[:, :, 0], v), 2))
    lengths = ints(3, 0)
    fresh = rotary.RotaryEmbedding(16)
    with pytest.raises(InputError, match="max_seqlen="):
        fresh(qkv.clone(), seqlen_offset=lengths, num_heads_q=4)
    moved = fresh(qkv.clone(), seqlen_offset=lengths, max_seqlen=12, num_heads_q=4)
    assert torch.equal(moved[1], grouped[1]) and not torch.equal(moved[0], grouped[0])


def test_the_table_is_exact_in_a_model_that_was_cast():
    exact, cast = rotary.RotaryEmbedding(16), rotary.RotaryEmbedding(16).to(BF16)
    x = torch.randn(1, 300, 3, 1, 16).to(BF16)
    assert torch.equal(exact(x.clone()), cast(x.clone()))
    assert exact._cos_cached.dtype is BF16
    table = exact._cos_cached
    exact(x[:, :20].clone())
    assert exact._cos_cached is table, "it grows only"


def test_signatures_of_the_layers():
    """As flash_attn 2.8.3 has them."""
    offsets = "seqlen_offsets=0"
    for function, want in (
        (
            rotary.apply_rotary_emb,
            f"x cos sin interleaved=False inplace=False {offsets} cu_seqlens=None max_seqlen=None",
        ),
        (rotary.apply_rotary_emb_torch, "x cos sin interleaved=False"),
        (
            rotary.apply_rotary_emb_qkv_,
            f"qkv cos sin cos_k=None sin_k=None interleaved=False {offsets} num_heads_q=None",
        ),
        (rotary.apply_rotary_emb_kv_, f"kv cos sin interleaved=False {offsets}"),
        (
            rotary.apply_rotary,
            f"x cos sin {offsets} cu_seqlens=None max_seqlen=None interleaved=False inplace=False conjugate=False",
        ),
        (
            rotary.RotaryEmbedding.__init__,
            "self dim base=10000.0 interleaved=False scale_base=None device=None pos_idx_in_fp32=True",
        ),
        (
            rotary.RotaryEmbedding.forward,
            "self qkv kv=None seqlen_offset=0 max_seqlen=None num_heads_q=None",
        ),
        (bert_padding.unpad_input_for_concatenated_sequences, "hidden_states attention_mask_in_length"),
    ):
        found = inspect.signature(function).parameters.values()
        got = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in found]
        assert got == want.split(), function


def test_what_rotary_refuses():
    x = torch.randn(2, 9, 3, 40)
    cos, sin = angles(9, 8)
    for given, options, what in (
        ((x, cos, sin[:5]), {}, "both must be"),
        ((x, cos[:8], sin[:8]), {}, "have 8 positions; 9 tokens from position 0 on"),
        ((x, cos, sin), {"seqlen_offsets": 1}, "9 tokens from position 1 on need positions 1 to 9"),
        ((x, cos, sin), {"seqlen_offsets": torch.zeros(2)}, "seqlen_offsets is torch.float32"),
        ((x, cos, sin), {"seqlen_offsets": ints(1, 2, 3)}, r"\[3\].*\[2\] is needed|\(3,\).*\[2\] is needed"),
        ((x[..., :14], cos, sin), {}, "8 columns; the head dim 14 has room for 7"),
        ((x[0], cos, sin), {}, "without cu_seqlens is needed"),
        ((x[0], cos, sin), {"cu_seqlens": ints(0, 9)}, "cu_seqlens needs max_seqlen"),
    ):
        with pytest.raises(InputError, match=what):
            rotary.apply_rotary_emb(*given, **options)
    with pytest.raises(InputError, match="num_heads_q is None"):
        rotary.apply_rotary_emb_qkv_(x, cos, sin)
    with pytest.raises(InputError, match="kv has shape"):
        rotary.apply_rotary_emb_kv_(x, cos, sin)
    for options in ({"pos_idx_in_fp32": False}, {"device": True}):
        with pytest.raises(UnsupportedProblem, match="positions are always fp32"):
            rotary.RotaryEmbedding(16, **options)


# --- padding ---


@CPU_AND_GPU
def test_unpad_input_for_concatenated_sequences(device):
    parts = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]], device=device)
    x = torch.randn(3, 6, 4, 8, device=device)
    tokens, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(x, parts)
    places = [*range(5), *range(6, 11), *range(12, 18)]
    assert indices.tolist() == places and longest == 6
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and cu_seqlens.dtype is torch.int32
    assert torch.equal(tokens, x.flatten(0, 1)[places])
    padded = bert_padding.pad_input(tokens, indices, 3, 6)
    assert torch.equal(padded[2], x[2]) and (padded[0, 5] == 0).all() and (padded[1, 5] == 0).all()


def test_attention_of_concatenated_sequences_sees_no_neighbour():
    parts = torch.tensor([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    qkv = torch.randn(2, 6, 3, 4, 64).to(BF16)
    tokens, indices, cu, longest = bert_padding.unpad_input_for_concatenated_sequences(qkv, parts)
    out = bert_padding.pad_input(fa.flash_attn_varlen_qkvpacked_func(tokens, cu, longest, causal=True), indices, 2, 6)
    for row, begin, end in ((0, 0, 2), (0, 2, 5), (1, 0, 6)):
        alone = fa.flash_attn_qkvpacked_func(qkv[row : row + 1, begin:end], causal=True)
        assert (out[row, begin:end].float() - alone[0].float()).abs().max() < 2e-2


def test_concatenated_lengths_that_do_not_fit():
    x = torch.randn(2, 4, 8)
    for parts in ([[2, 2, 0, 0], [3, 2, 0, 0]], [[2, 2, 0, 0], [3, -2, 0, 0]]):
        with pytest.raises(InputError, match=r"attention_mask_in_length\[1\] is \[3, -?2, 0, 0\]"):
            bert_padding.unpad_input_for_concatenated_sequences(x, torch.tensor(parts))
    tokens, indices, cu, longest = bert_padding.unpad_input_for_concatenated_sequences(x, torch.zeros(2, 4).long())
    assert (len(tokens), len(indices), cu.tolist(), longest) == (0, 0, [0], 0)


# --- as other code imports them ---


@pytest.fixture
def installed(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    fa.install()
    yield
    fa.uninstall()


def test_imports_of_models(installed):
    import flash_attn
    import flash_attn.layers.rotary as layers
    from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input_for_concatenated_sequences
    from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb, apply_rotary_emb_func
    from flash_attn.ops.triton.rotary import apply_rotary

    assert layers.apply_rotary_emb is apply_rotary_emb is apply_rotary_emb_func is rotary.apply_rotary_emb
    assert RotaryEmbedding is rotary.RotaryEmbedding and apply_rotary is rotary.apply_rotary
    assert flash_attn.layers.rotary is layers and flash_attn.ops.triton.rotary.apply_rotary is apply_rotary
    assert index_first_axis is bert_padding.index_first_axis and pad_input is bert_padding.pad_input
    assert unpad_input_for_concatenated_sequences is bert_padding.unpad_input_for_concatenated_sequences

    class Unpadded(RotaryEmbedding):  # as ModernBERT derives its own
        def forward(self, qkv, cu_seqlens, max_seqlen):
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
            return apply_rotary(
                qkv[:, 0], self._cos_cached, self._sin_cached, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
            )

    out = Unpadded(dim=16)(torch.randn(9, 3, 4, 16), ints(0, 4, 9), 5)
    assert out.shape == (9, 4, 16)


def test_einops_is_passed_on_where_it_is(installed, monkeypatch):
    """verl imports rearrange from flash_attn.bert_padding."""
    einops = types.ModuleType("einops")
    einops.rearrange, einops.repeat = len, max
    monkeypatch.setitem(sys.modules, "einops", einops)
    from flash_attn.bert_padding import rearrange, repeat

    assert (rearrange, repeat) == (len, max)
    monkeypatch.setitem(sys.modules, "einops", None)
    with pytest.raises(ImportError):
        from flash_attn.bert_padding import rearrange
    with pytest.raises(ImportError):
        from flash_attn.bert_padding import IndexFirstAxis  # noqa: F401

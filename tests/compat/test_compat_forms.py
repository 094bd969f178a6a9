# SPDX-License-Identifier: Apache-2.0
"""The forms in which other code calls flash_attn: odd windows, FlashAttention 3's module paths, vLLM's keywords."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from helpers.flash import BF16, CPU_AND_GPU, INT, batched, close, ints, pool, split, tensors  # noqa: E402

from fmha_runtime import attention  # noqa: E402
from fmha_runtime.compat import flash_attn as fa  # noqa: E402
from fmha_runtime.compat import flash_attn_3 as fa3  # noqa: E402
from fmha_runtime.errors import FmhaError, InputError, UnsupportedProblem  # noqa: E402


@pytest.fixture(autouse=True)
def build_what_is_missing(monkeypatch):
    monkeypatch.setenv("FMHA_BUILD_ON_DEMAND", "1")


@pytest.fixture
def clean_modules(monkeypatch):
    ours = ("flash_attn", "flash_attn_3", "flash_attn_interface")
    for name in [n for n in sys.modules if n.partition(".")[0] in ours]:
        monkeypatch.delitem(sys.modules, name)
    yield
    fa.uninstall()


# --- windows ---

WINDOWS = {
    "tensors": ((torch.tensor(9), torch.tensor(4)), (9, 4)),
    "one tensor": (torch.tensor([9, 4]), (9, 4)),
    "numpy": ((np.int64(9), np.int32(4)), (9, 4)),
    "an array": (np.array([9, 4]), (9, 4)),
    "a list": ([9, 4], (9, 4)),
    "sys.maxsize": ((sys.maxsize, 4), (-1, 4)),
    "beyond int32": ((9, 1 << 40), (9, -1)),
    "int32 max": ((2**31 - 1, 2**31 - 1), (-1, -1)),
    "negative": ((-7, 4), (-1, 4)),
    "None": ((None, 4), (-1, 4)),
    "nothing": (None, (-1, -1)),
}


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("module", [fa, fa3], ids=["2", "3"])
def test_windows(module, name):
    given, meant = WINDOWS[name]
    q, k, v = tensors("cpu")
    close(module.flash_attn_func(q, k, v, window_size=given), batched(q, k, v, window=meant)[0])
    lengths = ints(53, 53)
    out = module.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True, window_size=given)
    close(out, batched(q, k, v, window=(meant[0], 0))[0])


@pytest.mark.gpu
def test_a_window_may_lie_on_the_gpu():
    q, k, v = tensors("cuda")
    out = fa.flash_attn_func(q, k, v, window_size=torch.tensor([9, 4], device="cuda"))
    close(out, batched(q, k, v, window=(9, 4))[0])


@pytest.mark.parametrize("given", [3, (1,), (1, 2, 3), "ab", (1.5, 2), (torch.tensor(1.5), 2), torch.tensor(3)])
def test_what_is_no_window(given):
    with pytest.raises(InputError, match="window_size"):
        fa.flash_attn_func(*tensors("cpu"), window_size=given)


# --- what is returned ---


@CPU_AND_GPU
def test_return_attn_probs_gives_an_empty_mask_without_dropout(device):
    """So does version 2: S_dmask [0] in the dtype of q; probabilities are there with dropout only."""
    qkv = torch.randn(2, 40, 3, 4, 64).to(device, BF16)
    q, k, v = qkv.unbind(2)
    cu, flat = ints(0, 40, 80, device=device), qkv.flatten(0, 1)
    a, b, c = flat.unbind(1)
    asked = {"causal": True, "return_attn_probs": True}
    dense = (
        fa.flash_attn_func(q, k, v, **asked),
        fa.flash_attn_kvpacked_func(q, qkv[:, :, 1:], **asked),
        fa.flash_attn_qkvpacked_func(qkv, **asked),
    )
    packed = (
        fa.flash_attn_varlen_func(a, b, c, cu, cu, 40, 40, **asked),
        fa.flash_attn_varlen_kvpacked_func(a, flat[:, 1:], cu, cu, 40, 40, **asked),
        fa.flash_attn_varlen_qkvpacked_func(flat, cu, 40, **asked),
    )
    want, want_lse = batched(q, k, v, causal=True)
    for out, lse, mask in dense:
        close(out, want)
        close(lse, want_lse)
        assert (mask.shape, mask.dtype, mask.device) == ((0,), q.dtype, q.device)
    for out, lse, mask in packed:
        close(out, torch.cat(want))
        close(lse, torch.cat(want_lse, 1))
        assert (mask.shape, mask.dtype, mask.device) == ((0,), q.dtype, q.device)
    out, lse = fa3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    close(lse, want_lse)


# --- FlashAttention 3 ---


def test_both_names_of_version_3(clean_modules):
    fa.install(fa3=True)
    for name in ("flash_attn_interface", "flash_attn_3.flash_attn_interface"):
        module = importlib.import_module(name)
        assert importlib.util.find_spec(name) is not None
        for function in fa3.FUNCTIONS:
            assert getattr(module, function) is getattr(fa3, function)
    import flash_attn_3

    assert flash_attn_3.flash_attn_interface.flash_attn_func is fa3.flash_attn_func
    with pytest.raises(ModuleNotFoundError, match=r"flash_attn_3\._C"):
        importlib.import_module("flash_attn_3._C")
    fa.install()
    assert "flash_attn_3" not in sys.modules and "flash_attn_3.flash_attn_interface" not in sys.modules


def test_a_real_version_3_is_not_replaced_unasked(clean_modules, monkeypatch):
    real = type(sys)("flash_attn_3")
    monkeypatch.setitem(sys.modules, "flash_attn_3", real)
    fa.install()
    with pytest.raises(FmhaError, match="flash_attn_3 was imported already"):
        fa.install(fa3=True)
    fa.install(fa3=True, force=True)
    fa.uninstall()
    assert sys.modules["flash_attn_3"] is real


def test_sm_margin_is_refused_by_name():
    q, k, v = tensors("cpu")
    cu = ints(0, 37, 74)
    flat = [x.flatten(0, 1) for x in (q, k[:, :37], v[:, :37])]
    qkv = torch.randn(2, 9, 3, 4, 64).to(BF16)
    for call in (
        lambda **o: fa3.flash_attn_func(q, k, v, **o),
        lambda **o: fa3.flash_attn_qkvpacked_func(qkv, **o),
        lambda **o: fa3.flash_attn_varlen_func(*flat, cu, cu, 37, 37, **o),
        lambda **o: fa3.flash_attn_with_kvcache(q, k, v, **o),
        lambda **o: fa.flash_attn_func(q, k, v, **o),
    ):
        with pytest.raises(UnsupportedProblem, match=r"sm_margin is 8 .*Pass sm_margin=0"):
            call(sm_margin=8)
        call(sm_margin=0)


def test_scales_mean_nothing_beside_16_bits():
    """There, they are read for FP8 tensors only; vLLM always passes them."""
    q, k, v = tensors("cpu")
    scales = {f"{x}_descale": torch.full((2, 2), 3.0) for x in "qkv"}
    assert torch.equal(fa3.flash_attn_func(q, k, v, **scales), fa3.flash_attn_func(q, k, v))


@CPU_AND_GPU
def test_version_3_takes_packed_queries_over_a_dense_cache(device):
    q, k, v = tensors(device, 2, 12, 53)
    cu, used = ints(0, 12, 24, device=device), ints(53, 20, device=device)
    out = fa3.flash_attn_varlen_func(q.flatten(0, 1), k, v, cu, None, 12, 53, seqused_k=used, causal=True)
    want, _ = batched(q, [k[0], k[1, :20]], [v[0], v[1, :20]], causal=True)
    close(out, torch.cat(want))


# --- vLLM's form of flash_attn_varlen_func ---


@CPU_AND_GPU
@pytest.mark.parametrize("d", [64, 100, 112])
@pytest.mark.parametrize("fa_version", [None, 2, 3])
def test_vllms_call_over_pages(device, d, fa_version):
    """As vllm/v1/attention/backends/flash_attn.py calls it: mixed prefill and decoding, rows for padding behind."""
    q_lens, k_lens = [1, 7, 1], [33, 7, 64]
    cu = [0, 1, 8, 9]
    q = torch.randn(12, 4, d).to(device, BF16)
    k, v = (torch.randn(3, 64, 2, d).to(device, BF16) for _ in range(2))
    (keys, table), (values, _) = pool(k, 16, device), pool(v, 16, device)
    table[0, 3] = table[1, 1:] = 7777  # behind the lengths
    output = torch.full((12, 4, d), 7.0).to(device, BF16)
    options = {} if fa_version is None else {"fa_version": fa_version}
    found = fa.flash_attn_varlen_func(
        q=q[:9], k=keys, v=values, out=output[:9], cu_seqlens_q=ints(*cu, device=device), max_seqlen_q=max(q_lens),
        seqused_k=ints(*k_lens, device=device), max_seqlen_k=64, softmax_scale=d**-0.5, causal=True, alibi_slopes=None,
        window_size=[-1, -1], block_table=table, softcap=0, scheduler_metadata=None, q_descale=None,
        k_descale=torch.ones(3, 2, device=device), v_descale=torch.ones(3, 2, device=device), num_splits=0, s_aux=None,
        **options,
    )  # fmt: skip
    assert found.data_ptr() == output.data_ptr()
    seen = [[x[i, :n] for i, n in enumerate(k_lens)] for x in (k, v)]
    close(output[:9], torch.cat(batched(split(q, cu), *seen, causal=True)[0]))
    assert (output[9:] == 7).all(), "rows behind are not ours"


@CPU_AND_GPU
def test_vllms_other_keywords(device):
    q, k, v = (x[0] for x in tensors(device, 1, 24, 24))
    cu = ints(0, 5, 24, device=device)
    sinks = torch.randn(4, device=device).to(BF16)
    call = {
        "cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 19, "max_seqlen_k": 19, "causal": True, "s_aux": sinks,
    }  # fmt: skip
    out, lse = fa.flash_attn_varlen_func(q, k, v, return_softmax_lse=True, **call)
    parts = [split(x, [0, 5, 24]) for x in (q, k, v)]
    want, plain = batched(*parts, causal=True)
    want_lse = [torch.logaddexp(x, sinks.double()[:, None].expand_as(x)) for x in plain]
    scaled = [o * (a - b).exp().T[..., None] for o, a, b in zip(want, plain, want_lse, strict=True)]
    close(out, torch.cat(scaled))
    close(lse, torch.cat(want_lse, 1))
    room = torch.zeros(24, 4, 64, device=device, dtype=BF16)
    again = fa.flash_attn_varlen_func(q, k, v, out=room, return_attn_probs=True, **call)
    assert again[0] is room and torch.equal(room, out) and len(again) == 3
    dense = tensors(device, 2, 9, 9)
    room = torch.zeros(2, 9, 4, 64, device=device, dtype=BF16)
    assert fa.flash_attn_func(*dense, out=room) is room
    assert torch.equal(room, fa.flash_attn_func(*dense))
    room = torch.zeros(2, 9, 4, 64, device=device, dtype=BF16)
    assert fa.flash_attn_with_kvcache(*dense, out=room) is room
    assert torch.equal(room, fa.flash_attn_with_kvcache(*dense))


def test_what_vllm_asks_and_no_kernel_computes():
    q, k, v = (x[0] for x in tensors("cpu", 1, 24, 24))
    cu = ints(0, 5, 24)
    call = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 19, "max_seqlen_k": 19}
    for options, error, what in (
        ({"q_v": q}, UnsupportedProblem, "q_v="),
        ({"cp_world_size": 2}, UnsupportedProblem, "cp_world_size is 2"),
        ({"output_scale": q}, UnsupportedProblem, "an FP8 output"),
        ({"mask_mod": len}, UnsupportedProblem, "mask_mod="),
        ({"fa_version": 5}, InputError, "fa_version is 5"),
        ({"out": q[:9]}, InputError, "this call needs"),
        ({"kv_cache": q}, TypeError, "'kv_cache'"),
    ):
        with pytest.raises(error, match=what):
            fa.flash_attn_varlen_func(q, k, v, **{**call, **options})
    nothing = {"cp_world_size": 1, "cp_rank": 0, "cp_tot_seqused_k": None, "mask_mod": None, "dynamic_causal": None}
    fa.flash_attn_varlen_func(q, k, v, **call, **nothing)
    with pytest.raises(InputError, match=r"cu_seqlens_q is 19, an int: vLLM's.*by name"):
        fa.flash_attn_varlen_func(q, k, v, 19, cu, 19, cu)
    with pytest.raises(InputError, match="max_seqlen_k is None"):
        fa.flash_attn_varlen_func(q, k, v, cu, cu, 19)
    with pytest.raises(InputError, match="without cu_seqlens_k a cache"):
        fa.flash_attn_varlen_func(q, k, v, cu, max_seqlen_q=19, max_seqlen_k=19, seqused_k=ints(5, 19))
    pages = torch.zeros(4, 16, 2, 64).to(BF16)
    with pytest.raises(InputError, match="block_table needs the lengths"):
        fa.flash_attn_varlen_func(q, pages, pages, cu, max_seqlen_q=19, block_table=torch.zeros(2, 2, dtype=INT))
    with pytest.raises(InputError, match=r"out is .*; this call needs"):
        wrong = torch.zeros(24, 4, 64, dtype=BF16)
        q, k, v = (torch.randn(24, n, 36).to(BF16) for n in (4, 2, 2))
        fa.flash_attn_varlen_func(q, k, v, out=wrong, **call)


def test_lengths_may_be_tensors_and_numbers_of_numpy():
    q, k, v = (x[0] for x in tensors("cpu", 1, 24, 24))
    cu = ints(0, 5, 24)
    want = fa.flash_attn_varlen_func(q, k, v, cu, cu, 19, 19)
    for longest in (cu.diff().max(), np.int64(19)):
        assert torch.equal(fa.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest), want)
    with pytest.raises(InputError, match=r"max_seqlen_q is 19\.5"):
        fa.flash_attn_varlen_func(q, k, v, cu, cu, 19.5, 19)


def test_parts_of_version_3_are_combined():
    q, k, v = (torch.randn(2, n, 4, 64).bfloat16() for n in (5, 60, 60))
    whole, lse = attention(q, k, v, return_lse=True)
    parts = [attention(q, k[:, i : i + 20], v[:, i : i + 20], return_lse=True) for i in (0, 20, 40)]
    outs, lses = torch.stack([out.float() for out, _ in parts]), torch.stack([x.transpose(1, 2) for _, x in parts])
    out, found = fa3.flash_attn_combine(outs, lses, out_dtype=torch.bfloat16)
    assert out.dtype is torch.bfloat16 and found.shape == (2, 5, 4)
    assert (out.float() - whole.float()).norm() < 1e-2 * whole.float().norm()
    assert (found.transpose(1, 2) - lse).abs().max() < 1e-3
    own = torch.empty(10, 4, 64)
    got, _ = fa3.flash_attn_combine(outs.flatten(1, 2), lses.flatten(1, 2), own)
    assert got is own and (own.view(2, 5, 4, 64) - whole.float()).norm() < 1e-2 * whole.float().norm()
    for bad in ((outs[0, 0], lses), (outs, lses[:2]), (outs[:0], lses[:0])):
        with pytest.raises(InputError, match="are needed"):
            fa3.flash_attn_combine(*bad)
    with pytest.raises(InputError, match=r"out is torch\.float32"):
        fa3.flash_attn_combine(outs, lses, torch.empty(3))


def test_metadata_of_version_3():
    lengths = torch.tensor([60, 3], dtype=torch.int32)
    made = fa3.get_scheduler_metadata(2, 1, 60, 8, 2, 64, lengths, causal=True, num_splits=4)
    q, k = torch.randn(2, 1, 8, 64).bfloat16(), torch.randn(2, 60, 2, 64).bfloat16()
    out = fa3.flash_attn_with_kvcache(q, k, k, cache_seqlens=lengths, scheduler_metadata=made, num_splits=4)
    assert torch.equal(out, fa3.flash_attn_with_kvcache(q, k, k, cache_seqlens=lengths))
    with pytest.raises(InputError, match=r"cache_seqlens is .*\[3\] on"):
        fa3.get_scheduler_metadata(3, 1, 60, 8, 2, 64, lengths)
    with pytest.raises(InputError, match="num_splits is -1"):
        fa3.get_scheduler_metadata(2, 1, 60, 8, 2, 64, lengths, num_splits=-1)
    with pytest.raises(UnsupportedProblem, match="sm_margin"):
        fa3.get_scheduler_metadata(2, 1, 60, 8, 2, 64, lengths, sm_margin=8)

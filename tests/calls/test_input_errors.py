# SPDX-License-Identifier: Apache-2.0
"""Bad input gets an InputError that names the rule, the offender and what to do."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import fmha_runtime as fmha  # noqa: E402


def qkv(**change):
    tensors = {n: torch.randn(2, 8, 4, 64).half() for n in "qkv"}
    tensors.update(change)
    return tensors


def half(*shape):
    return torch.randn(*shape).half()


CASES = {
    "dtype": (qkv(q=torch.randn(2, 8, 4, 64)), {}, r"q has dtype torch.float32.*torch.bfloat16"),
    "dtypes differ": (qkv(k=half(2, 8, 4, 64).bfloat16()), {}, "k has dtype torch.bfloat16, q has torch.float16"),
    "not a tensor": (qkv(q=[1.0]), {}, "q is a list"),
    "rank": (qkv(q=half(8, 4, 64)), {}, r"\[batch, seq, heads, head_dim\] is needed.*attention_varlen"),
    "head dim strided": (qkv(v=half(2, 8, 4, 128)[..., ::2]), {}, "head dim of v must be contiguous"),
    "row stride": (qkv(k=half(2, 8, 4, 68)[..., :64]), {}, "multiples of 16 bytes"),
    "misaligned": (qkv(q=half(2, 8, 4, 72)[..., 4:68]), {}, r"multiple of 16 bytes \(storage offset 4"),
    "head dims": (qkv(k=half(2, 8, 4, 72)), {}, "q has head dim 64, k has 72"),
    "k and v": (qkv(v=half(2, 9, 4, 64)), {}, "all but the head dim must be equal"),
    "gqa": (qkv(k=half(2, 8, 3, 64), v=half(2, 8, 3, 64)), {}, "4 query heads cannot share 3"),
    "batch": (qkv(k=half(3, 8, 4, 64), v=half(3, 8, 4, 64)), {}, "q has batch 2, k and v have 3"),
    "window shape": (qkv(), {"window": 5}, r"a pair \(left, right\)"),
    "window negative": (qkv(), {"window": (-2, 0)}, "left window bound is -2"),
    "window absurd": (qkv(), {"window": (0, 1 << 40)}, "right window bound is 1099511627776"),
    "window float": (qkv(), {"window": (1.5, 0)}, "an int or None"),
    "causal window": (qkv(), {"causal": True, "window": (0, 3)}, "contradict"),
    "causal type": (qkv(), {"causal": "yes"}, "True or False"),
    "scale": (qkv(), {"scale": 0.0}, "positive finite"),
    "scale nan": (qkv(), {"scale": float("nan")}, "positive finite"),
    "scale type": (qkv(), {"scale": "1"}, "Python float"),
    "softcap": (qkv(), {"softcap": -1.0}, "softcap is -1.0"),
    "slopes": (qkv(), {"alibi_slopes": torch.zeros(3)}, r"shape \(4,\) or \(2, 4\)"),
    "slopes dtype": (qkv(), {"alibi_slopes": torch.zeros(4).half()}, "torch.float32 on cpu is needed"),
    "slopes strided": (qkv(), {"alibi_slopes": torch.zeros(8)[::2]}, "must be contiguous"),
    "sinks": (qkv(), {"sinks": torch.zeros(2, 4)}, r"sinks is \(2, 4\); a tensor of shape \(4,\)"),
    "chunk": (qkv(), {"attention_chunk": -1}, "attention_chunk is -1"),
    "out shape": (qkv(), {"out": half(2, 8, 4, 128)}, r"this call needs torch.float16 \(2, 8, 4, 64\)"),
    "out overlaps": (qkv(), {"out": half(1, 8, 4, 64).expand(2, 8, 4, 64)}, "stride of 0"),
    "seqused dtype": (qkv(), {"seqused_k": torch.tensor([1, 2])}, r"seqused_k has dtype torch.int64"),
    "seqused length": (qkv(), {"seqused_k": torch.ones(3, dtype=torch.int32)}, r"\[2\] is needed"),
    "fallback": (qkv(), {"fallback": "cudnn"}, "None or 'torch'"),
    "device": (qkv(), {"device": "cuda:0"}, "'emulator'"),
    "emulated arch": (qkv(), {"device": "emulator:sm75"}, "sm80, sm86"),
}


@pytest.mark.parametrize("name", CASES)
def test_dense(name):
    tensors, options, message = CASES[name]
    options = {"device": "emulator", **options}
    with pytest.raises(fmha.InputError, match=message):
        fmha.attention(tensors["q"], tensors["k"], tensors["v"], **options)


def cu(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


VARLEN = {
    "int64": ((cu(0, 8, dtype=torch.int64), cu(0, 8), 8, 8), "torch.int32 is needed"),
    "lengths": ((cu(0, 8), cu(0, 4, 8), 8, 8), r"cu_seqlens_k has shape \(3,\); \[2\]"),
    "one missing": ((cu(0, 8), None, 8, 8), "needs cu_seqlens_q and cu_seqlens_k"),
    "not a tensor": (([0, 8], cu(0, 8), 8, 8), "cu_seqlens_q must be an int32 tensor"),
    "max_seqlen": ((cu(0, 8), cu(0, 8), None, 8), "max_seqlen_q is None"),
    "max_seqlen negative": ((cu(0, 8), cu(0, 8), 8, -1), "max_seqlen_k is -1"),
}


@pytest.mark.parametrize("name", VARLEN)
def test_varlen(name):
    arguments, message = VARLEN[name]
    q = half(8, 4, 64)
    with pytest.raises(fmha.InputError, match=message):
        fmha.attention_varlen(q, q, q, *arguments, device="emulator")


def test_softcap_with_alibi_is_refused_by_name():
    t = qkv()
    with pytest.raises(fmha.UnsupportedProblem, match="softcap and alibi_slopes together"):
        fmha.attention(t["q"], t["k"], t["v"], softcap=3.0, alibi_slopes=torch.zeros(4))


def test_input_errors_are_value_errors():
    with pytest.raises(ValueError):
        fmha.attention(None, None, None)


def test_no_driver_says_what_still_works(monkeypatch):
    from fmha_runtime.device import driver

    if driver.available():
        pytest.skip("this machine has a driver")
    with pytest.raises(fmha.DriverError, match="emulator"):
        driver.device_info(0)


def test_missing_kernel_names_the_command(monkeypatch, tmp_path):
    from fmha_runtime.kernels.spec import KernelSpec
    from fmha_runtime.ops import obtain

    monkeypatch.setenv("FMHA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FMHA_BUILD_ON_DEMAND", raising=False)
    monkeypatch.setattr(obtain.store, "find", lambda spec: None)
    spec = KernelSpec.parse("fmha_fwd_sm90_bf16_d128")
    with pytest.raises(fmha.KernelNotBuilt, match="fmha build fmha_fwd_sm90_bf16_d128") as caught:
        obtain.kernel(spec, device="cuda:0")
    assert caught.value.command == "fmha build fmha_fwd_sm90_bf16_d128"
    assert str(caught.value).count("fmha build") == 1 and "FMHA_BUILD_ON_DEMAND=1" in str(caught.value)


@pytest.mark.parametrize("d", [1, 12, 100, 300])
def test_a_head_dim_without_kernels_is_no_question_of_strides(d):
    """Rows of 12 or 100 elements are not aligned however they lie; what is wrong is that no kernel has them."""
    q, k, v = (half(1, 8, 2, d) for _ in range(3))
    with pytest.raises(fmha.UnsupportedProblem, match=rf"head dim {d},.*Head dims on"):
        fmha.attention(q, k, v, device="emulator")
    with pytest.raises(fmha.UnsupportedProblem, match=rf"head dims {d} of q and k.*multiples of 8 from 8 to 256"):
        fmha.attention(q, k, v)  # in plain torch, but one answer everywhere
    in_torch = fmha.attention(q, k, v, fallback="torch")
    assert torch.equal(fmha.attention(q, k, v, device="emulator", fallback="torch"), in_torch)
    with pytest.raises(fmha.UnsupportedProblem, match=f"head dim {d}x64"):
        fmha.attention(q, k, half(1, 8, 2, 64), device="emulator")


def test_a_failed_build_on_demand_shows_the_compilers_error(monkeypatch, tmp_path):
    from types import SimpleNamespace

    from fmha_runtime.kernels.spec import KernelSpec
    from fmha_runtime.ops import obtain

    error = fmha.BuildError("nvcc exited with 1", command="nvcc", log="boom")
    monkeypatch.setenv("FMHA_BUILD_ON_DEMAND", "1")
    monkeypatch.setattr(obtain.store, "find", lambda spec: None)
    monkeypatch.setattr(obtain.build, "build", lambda specs: [SimpleNamespace(error=error)])
    with pytest.raises(fmha.BuildError, match="nvcc exited with 1"):
        obtain.kernel(KernelSpec.parse("fmha_fwd_sm90_bf16_d128"), device="cuda:0")


def test_a_gpu_without_kernels_is_told_which_have_some(monkeypatch):
    from fmha_runtime.calls import route

    monkeypatch.setattr(route.driver, "capability", lambda index: (10, 0))
    with pytest.raises(fmha.UnsupportedProblem, match=r"8\.0, 8\.6, 8\.9, 9\.0, 12\.0\. fallback='torch'"):
        route.arch_of(0)


@pytest.mark.parametrize("which", ["k", "v", "out", "sinks", "alibi_slopes", "seqused_k"])
@pytest.mark.parametrize("device", [None, "emulator"])
def test_a_tensor_on_another_device_is_named(which, device):
    """The device "meta" is one that every machine has."""
    given = {name: half(1, 8, 2, 64) for name in ("q", "k", "v", "out")}
    given |= {"sinks": torch.zeros(2), "seqused_k": torch.tensor([8], dtype=torch.int32)}
    given |= {"alibi_slopes": torch.zeros(2)}
    given[which] = given[which].to("meta")
    with pytest.raises(fmha.InputError, match=rf"{which} is .*meta.*cpu"):
        fmha.attention(**given, device=device)


@pytest.mark.parametrize("packed", [False, True])
def test_prepare_loads_all_that_a_call_may_need(monkeypatch, packed):
    """The kernel of the problem, those of its smaller calls, and for a packed mask the one that packs."""
    from fmha_runtime.calls import api
    from fmha_runtime.kernels.spec import Mask
    from fmha_runtime.ops.pack import packer
    from fmha_runtime.problem import dispatch

    loaded, packers = [], []
    monkeypatch.setattr(api.obtain, "kernel", lambda spec, device: loaded.append((spec, device)))
    monkeypatch.setattr(packer, "prepare", packers.append)
    mask = Mask.PACKED if packed else Mask.BAND
    problem = fmha.Problem(arch=fmha.Arch.SM90, dtype=fmha.DType.BF16, head_dim=64, head_dim_v=64, mask=mask)
    fmha.prepare(problem, device=2)
    assert loaded == [(spec, "cuda:2") for spec in dispatch.kernels(problem)] and loaded
    assert packers == ([2] if packed else [])

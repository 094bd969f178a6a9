# SPDX-License-Identifier: Apache-2.0
"""The plug-in of torch's flash registry: numbers, what goes to torch's own kernel and why, and the way back.

On the CPU torch has no kernel of these two operators, so that a stub can stand for "torch's own" there.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch.nn.attention._registry", reason="this torch has no registry of flash attentions")

from torch.nn.functional import scaled_dot_product_attention as sdpa  # noqa: E402

import fmha_runtime as fmha  # noqa: E402
from fmha_runtime.integrations import torch_sdpa  # noqa: E402

registry = torch.nn.attention
aten = torch.ops.aten


class Own:
    """Stands for torch's own kernel of one operator."""

    def __init__(self):
        self.got = []

    def call_boxed(self, keys, *args, **kwargs):
        self.got.append((args, kwargs))
        q = args[0]
        lse, seed = torch.zeros(q.shape[:-1]), torch.empty(2, dtype=torch.uint64)
        if len(args) > 6:  # _flash_attention_forward
            return torch.full_like(q, 7), lse, seed, seed[0], q.new_empty(0)
        return torch.full_like(q, 7), lse, None, None, q.shape[2], q.shape[2], seed, seed[0], q.new_empty(0)


@pytest.fixture
def own(monkeypatch):
    """torch's own kernels by operator."""
    kernels = {}
    monkeypatch.setattr(torch_sdpa, "KEY", "CPU")
    monkeypatch.setattr(torch.library, "get_kernel", lambda op, key: kernels.setdefault(op, Own()))
    return kernels


@pytest.fixture
def active(own):
    registration = torch_sdpa.register()
    registration.activate()
    yield registration
    registration.remove()


def bhsd(b=2, h=4, s=40, d=64, dtype=torch.bfloat16, device="cpu"):
    """As models have them: [B, S, H, D] in memory, seen as [B, H, S, D]."""
    return torch.randn(b, s, h, d, device=device).to(dtype).transpose(1, 2)


def qkv(**shape):
    return [bhsd(**shape) for _ in range(3)]


def flash(q, k, v, *args, **kwargs):
    return aten._scaled_dot_product_flash_attention(q, k, v, *args, **kwargs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
def test_numbers_and_layout(active, causal, contiguous):
    q, k, v = qkv()
    if contiguous:
        q, k, v = (t.contiguous() for t in (q, k, v))
    out, lse, *rest = flash(q, k, v, 0.0, causal, scale=0.2)
    want = sdpa(q.float(), k.float(), v.float(), is_causal=causal, scale=0.2)
    assert (out.float() - want).abs().max() < 2e-2
    assert out.stride() == torch.empty_like(q).stride() and out.dtype is q.dtype
    scores = 0.2 * q.float() @ k.float().transpose(-1, -2)
    if causal:
        scores = scores.masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), -torch.inf)
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-3
    assert rest[2:4] == [40, 40] and [t.dtype for t in rest[4:]] == [torch.uint64, torch.uint64, q.dtype]
    assert active.calls == 1 and not active.passed_on


def test_results_have_the_form_that_torch_traces_with(active):
    """torch.compile believes the meta kernel of the operator: shapes, strides and dtypes must be its."""
    q, k, v = qkv()
    packed = torch.randn(2, 40, 3, 4, 64).bfloat16().unbind(2)
    for tensors in ((q, k, v), [t.contiguous() for t in (q, k, v)], [t.transpose(1, 2) for t in packed]):
        real = flash(*tensors, 0.0, True)
        meta = flash(*(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors))
        for ours, traced in zip(real, meta, strict=True):
            if isinstance(ours, torch.Tensor):
                assert (ours.shape, ours.stride(), ours.dtype) == (traced.shape, traced.stride(), traced.dtype)
            else:
                assert ours == traced


def test_fewer_heads_of_keys(active):
    q, k, v = bhsd(h=4), bhsd(h=2), bhsd(h=2)
    want = sdpa(q.float(), k.float(), v.float(), enable_gqa=True)
    assert (flash(q, k, v)[0].float() - want).abs().max() < 2e-2


def grad(t):
    return t.clone().requires_grad_()


PASSED_ON = {
    "dropout": (lambda: qkv(), (0.1,), "dropout"),
    "gradient": (lambda: [bhsd(), grad(bhsd()), bhsd()], (), "a gradient is needed"),
    "fp32": (lambda: qkv(dtype=torch.float32), (), "torch.float32"),
    "debug mask": (lambda: qkv(), (0.0, False, True), "a debug mask"),
    "lengths": (lambda: [bhsd(s=3), bhsd(), bhsd()], (0.0, True), "causal with different lengths"),
    "head dims": (lambda: [bhsd(), bhsd(), bhsd(d=32)], (), "head dims of K and V differ"),
    "empty": (lambda: [bhsd(s=0), bhsd(), bhsd()], (), "an empty tensor"),
    "alignment": (lambda: [bhsd(d=72)[..., 4:68], bhsd(), bhsd()], (), "16 bytes"),
}


@pytest.mark.parametrize("name", PASSED_ON)
def test_what_is_not_computed_goes_to_torch(active, own, name):
    make, args, why = PASSED_ON[name]
    tensors = make()
    for i in range(1, 4):
        out = flash(*tensors, *args)[0]
        assert (out == 7).all() and out.shape == tensors[0].shape
        got, _ = own["aten::_scaled_dot_product_flash_attention"].got[-1]
        assert all(torch.equal(a, b) for a, b in zip(got, tensors, strict=False))
        assert len(active.passed_on) == 1 and active.passed_on.total() == i
    (reason,) = active.passed_on
    assert why in reason and active.calls == 0


def test_a_gradient_is_not_needed_without_grad_mode(active):
    q, k, v = qkv()
    with torch.no_grad():
        flash(grad(q), k, v)
    assert active.calls == 1


def test_a_refusal_is_remembered_for_the_same_question_only(active, monkeypatch):
    tried = []
    real = fmha.attention
    monkeypatch.setattr(fmha, "attention", lambda *a, **k: (tried.append(1), real(*a, **k))[1])
    for _ in range(3):
        flash(*qkv(dtype=torch.float32))
    assert len(tried) == 1
    flash(*qkv())
    flash(*qkv(dtype=torch.float32, s=41))
    assert len(tried) == 3 and active.calls == 1


def test_a_call_that_was_passed_on_stays_passed_on(active, own, monkeypatch):
    """torch's own SDPA kernel calls the other operator, which is replaced as well."""

    theirs = own["aten::_scaled_dot_product_flash_attention"]
    plain = theirs.call_boxed

    def nested(keys, q, k, v, *args, **kwargs):
        aten._flash_attention_forward(q, k, v, None, None, 40, 40, 0.0, False, False)
        return plain(keys, q, k, v, *args, **kwargs)

    monkeypatch.setattr(theirs, "call_boxed", nested)
    flash(*qkv(), 0.1)
    assert len(own["aten::_flash_attention_forward"].got) == 1
    assert active.calls == 0 and active.passed_on == {"dropout": 1}
    flash(*qkv())
    assert active.calls == 1


def test_a_kernel_that_was_not_built_is_an_error(active, monkeypatch):
    def missing(*args, **kwargs):
        raise fmha.KernelNotBuilt("fmha build it", name="it", command="fmha build it")

    monkeypatch.setattr(fmha, "attention", missing)
    with pytest.raises(fmha.KernelNotBuilt, match="fmha build it"):
        flash(*qkv())


def test_forward_dense_and_with_offsets(active, own):
    q, k, v = (torch.randn(2, 30, 4, 64).half() for _ in range(3))
    options = {"scale": 0.3, "window_size_left": 5, "window_size_right": -1}
    out, lse, seed, offset, debug = aten._flash_attention_forward(q, k, v, None, None, 30, 30, 0.0, False, False, **options)  # fmt: skip # noqa: E501
    want, want_lse = fmha.attention(q, k, v, scale=0.3, window=(5, None), return_lse=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert (seed.dtype, offset.dtype, debug.numel()) == (torch.uint64, torch.uint64, 0)

    cu_q, cu_k = torch.tensor([0, 20, 60], dtype=torch.int32), torch.tensor([0, 5, 60], dtype=torch.int32)
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    out, lse, *_ = aten._flash_attention_forward(q, k, v, cu_q, cu_k, 40, 55, 0.0, True, False)
    want, want_lse = fmha.attention_varlen(q, k, v, cu_q, cu_k, 40, 55, causal=True, return_lse=True)
    assert torch.equal(out, want)
    assert want_lse[:, :15].isneginf().all() and lse[:, :15].isposinf().all(), "torch's mark of a row without keys"
    assert torch.equal(lse[:, 15:], want_lse[:, 15:])
    assert active.calls == 2

    slopes = torch.rand(4)
    out, *_ = aten._flash_attention_forward(q, k, v, cu_q, cu_k, 40, 55, 0.0, True, False, alibi_slopes=slopes)
    assert (out == 7).all() and active.passed_on == {"ALiBi slopes": 1}
    assert own["aten::_flash_attention_forward"].got[0][1]["alibi_slopes"] is not None


def test_registering_changes_nothing_and_removing_restores(own):
    registration = torch_sdpa.register("fmha_test")
    assert "fmha_test" in registry.list_flash_attention_impls()
    assert registry.current_flash_attention_impl() is None and not registration.active
    with pytest.raises(NotImplementedError):
        flash(*qkv())
    registry.activate_flash_attention_impl("fmha_test")
    flash(*qkv())
    assert registration.active and registration.calls == 1
    registration.remove()
    assert "fmha_test" not in registry.list_flash_attention_impls()
    assert registry.current_flash_attention_impl() is None and not registration.active
    with pytest.raises(NotImplementedError):
        flash(*qkv())
    registration.remove()


def test_torch_itself_can_take_it_back_and_give_it_again(active):
    registry.restore_flash_attention_impl()
    assert not active.active
    with pytest.raises(NotImplementedError):
        flash(*qkv())
    active.activate()
    active.activate()
    flash(*qkv())
    assert active.calls == 1


def test_a_name_belongs_to_one(active):
    with pytest.raises(fmha.InputError, match="named 'fmha' already"):
        torch_sdpa.register()
    with pytest.raises(fmha.InputError, match="named 'FA4' already"):
        torch_sdpa.register("FA4")


def test_a_torch_without_a_registry_is_told_so(monkeypatch):
    monkeypatch.delattr(registry, "register_flash_attention_impl")
    with pytest.raises(fmha.UnsupportedProblem, match="no registry of flash attentions"):
        torch_sdpa.register()


def test_a_torch_without_cuda_kernels_is_told_so():
    if torch.version.cuda:
        pytest.skip("this torch has them")
    registration = torch_sdpa.register("fmha_test")
    try:
        with pytest.raises(fmha.UnsupportedProblem, match="no CUDA flash attention to stand in for"):
            registration.activate()
        assert registry.current_flash_attention_impl() is None
    finally:
        registration.remove()


# --- on the GPU, with torch's real kernels behind ---


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setenv("FMHA_BUILD_ON_DEMAND", "1")
    registration = torch_sdpa.register()
    registration.activate()
    with registry.sdpa_kernel(registry.SDPBackend.FLASH_ATTENTION):
        yield registration
    registration.remove()


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 72, 100, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_on_the_gpu(on_gpu, d, causal):
    q, k, v = qkv(s=300, d=d, device="cuda")
    out = sdpa(q, k, v, is_causal=causal)
    on_gpu.remove()
    theirs = sdpa(q, k, v, is_causal=causal)
    assert on_gpu.calls == 1, on_gpu.passed_on
    assert out.stride() == theirs.stride()
    assert (out.float() - theirs.float()).norm() / theirs.float().norm() < 5e-3


@pytest.mark.gpu
def test_what_goes_to_torch_on_the_gpu_is_what_torch_computes(on_gpu):
    q, k, v = qkv(device="cuda")
    torch.manual_seed(1)
    dropped = sdpa(q, k, v, dropout_p=0.5)
    own = [grad(t) for t in (q, k, v)]
    loss = sdpa(*own, is_causal=True)
    loss.sum().backward()
    assert on_gpu.calls == 0 and on_gpu.passed_on == {"dropout": 1, "a gradient is needed": 1}
    on_gpu.remove()
    torch.manual_seed(1)
    assert torch.equal(dropped, sdpa(q, k, v, dropout_p=0.5))
    assert torch.equal(loss, sdpa(q, k, v, is_causal=True))
    assert all(t.grad is not None and t.grad.isfinite().all() for t in own)


@pytest.mark.gpu
def test_a_compiled_training_step_mixes_our_forward_with_torchs_backward(on_gpu):
    """Under torch.compile the forward graph runs without grad mode: our output and LSE meet torch's backward."""
    tensors = qkv(s=200, device="cuda")

    def step(q, k, v):
        return (sdpa(q, k, v, is_causal=True).float() ** 2).sum()

    grads = []
    for run in (torch.compile(step), step):
        own = [grad(t) for t in tensors]
        run(*own).backward()
        grads.append([t.grad for t in own])
    assert on_gpu.calls >= 1 and on_gpu.passed_on == {"a gradient is needed": 1}
    for compiled, eager in zip(*grads, strict=True):
        assert (compiled - eager).float().norm() / eager.float().norm() < 2e-2


@pytest.mark.gpu
def test_varlen_attn_on_the_gpu(on_gpu):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    q, k, v = (torch.randn(60, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    cu = torch.tensor([0, 20, 60], device="cuda", dtype=torch.int32)
    out = varlen.varlen_attn(q, k, v, cu, cu, 40, 40)
    assert on_gpu.calls == 1, on_gpu.passed_on
    on_gpu.remove()
    theirs = varlen.varlen_attn(q, k, v, cu, cu, 40, 40)
    assert (out.float() - theirs.float()).norm() / theirs.float().norm() < 5e-3

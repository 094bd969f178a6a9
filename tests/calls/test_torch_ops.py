# SPDX-License-Identifier: Apache-2.0
"""The calls under torch.compile and other tracers: one graph, no recompiles, the same numbers, nothing detached."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from helpers.traced import flat, same  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

import fmha_runtime as fmha  # noqa: E402
from fmha_runtime.calls import route, torch_ops  # noqa: E402

ROOT = Path(fmha.__file__).resolve().parent.parent
H, HK, D, S = 4, 2, 64, 17


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    fmha.register_torch_ops()


def half(*shape, device="cpu"):
    return torch.randn(*shape, device=device).to(torch.bfloat16)


def ints(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


# Each takes a batch (no size that another dimension has) and gives the call's tensors, all of them graph inputs.


def dense(b, device="cpu"):
    return half(b, S, H, D, device=device), half(b, S, HK, D, device=device), half(b, S, HK, D, device=device)


def varlen(b, device="cpu"):
    cu = ints(*(S * i for i in range(b + 1)), device=device)
    return (*(half(b * S, n, D, device=device) for n in (H, HK, HK)), cu)


def cached(b, device="cpu"):
    return (*dense(b, device), ints(*(i % S + 1 for i in range(b)), device=device))


def paged(b, device="cpu"):
    table = torch.arange(3 * b, dtype=torch.int32, device=device).flip(0).view(b, 3)
    pool = half(3 * b, 8, HK, D, device=device)
    return half(b, S, H, D, device=device), pool, pool.clone(), table, ints(*(20 for _ in range(b)), device=device)


def ragged(b, device="cpu"):
    cu = ints(*(S * i for i in range(b + 1)), device=device)
    lengths = ints(*(S for _ in range(b)), device=device)
    return half(b * S, H, D, device=device), *dense(b, device)[1:], lengths, cu


def parts(b, device="cpu"):
    outs = [half(b, S, H, D, device=device) for _ in range(2)]
    return (*outs, *(torch.randn(b, H, S, device=device) for _ in range(2)))


def call_paged(q, k, v, table, used):
    return fmha.attention_with_kvcache(q, k, v, cache_seqlens=used, page_table=table, causal=True, return_lse=True)


def call_ragged(q, k, v, used, cu):
    return fmha.attention_with_kvcache(q, k, v, cache_seqlens=used, cu_seqlens_q=cu, max_seqlen_q=S, return_lse=True)


CALLS = {
    "attention": (dense, lambda q, k, v: fmha.attention(q, k, v, causal=True)),
    "attention lse": (dense, lambda q, k, v: fmha.attention(q, k, v, window=(5, -1), scale=0.2, return_lse=True)),
    "softcap chunk": (dense, lambda q, k, v: fmha.attention(q, k, v, softcap=9.0, attention_chunk=7)),
    "varlen": (varlen, lambda q, k, v, cu: fmha.attention_varlen(q, k, v, cu, cu, S, S)),
    "varlen lse": (varlen, lambda q, k, v, cu: fmha.attention_varlen(q, k, v, cu, cu, S, S, return_lse=True)),
    "kvcache": (cached, lambda q, k, v, n: fmha.attention_with_kvcache(q, k, v, cache_seqlens=n)),
    "kvcache int": (dense, lambda q, k, v: fmha.attention_with_kvcache(q, k, v, cache_seqlens=9, causal=True)),
    "paged": (paged, call_paged),
    "ragged": (ragged, call_ragged),
    "merge": (parts, lambda a, b, m, n: fmha.merge_states([a, b], [m, n])),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_graph_serves_all_batch_sizes(name):
    make, call = CALLS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    tensors = make(5)
    assert same(compiled(*tensors), call(*tensors))
    compilations = counter.frame_count
    for batch in (6, 11):
        tensors = make(batch)
        assert same(compiled(*tensors), call(*tensors))
    assert counter.frame_count == compilations
    ops = [str(node.target) for node in counter.graphs[-1].graph.nodes if "fmha" in str(node.target)]
    assert len(ops) == 1 and ops[0].startswith("fmha."), ops


def test_a_marked_batch_is_dynamic_too():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fmha.attention, fullgraph=True, backend=counter)
    for batch in (5, 6, 11):
        tensors = dense(batch)
        for t in tensors:
            torch._dynamo.mark_dynamic(t, 0)
        assert same(compiled(*tensors), fmha.attention(*tensors))
    assert counter.frame_count == 1


def test_the_first_call_of_a_process_may_be_a_compiled_one():
    code = """
import torch, fmha_runtime as fmha
q = torch.randn(2, 8, 4, 64).half()
out = torch.compile(fmha.attention, fullgraph=True, backend="eager")(q, q, q)
assert torch.equal(out, fmha.attention(q, q, q))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_defines_nothing():
    code = """
import torch, fmha_runtime, fmha_runtime.calls.api, fmha_runtime.calls.torch_ops
assert not hasattr(torch.ops.fmha, "fwd")
fmha_runtime.register_torch_ops()
fmha_runtime.register_torch_ops()
assert hasattr(torch.ops.fmha, "fwd")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_optional_tensors_go_through_the_graph():
    q, k, v = dense(3)
    slopes, sinks, used = torch.rand(H), torch.rand(H), ints(3, 17, 0)
    boolean = torch.rand(S, S) > 0.3
    for options in (
        {"alibi_slopes": slopes},
        {"sinks": sinks, "seqused_k": used},
        {"mask": boolean},
        {"mask": fmha.pack_mask(boolean)},
    ):
        compiled = torch.compile(fmha.attention, fullgraph=True, backend="aot_eager")
        assert same(compiled(q, k, v, **options), fmha.attention(q, k, v, **options)), options
        assert not same(fmha.attention(q, k, v), fmha.attention(q, k, v, **options)), options


def test_a_packed_varlen_mask_goes_through_the_graph():
    q, k, v, cu = varlen(3)
    mask = fmha.pack_mask(torch.rand(3 * S, S) > 0.3, cu_seqlens_q=cu)

    def call(q, k, v, cu, mask):
        return fmha.attention_varlen(q, k, v, cu, cu, S, S, mask=mask)

    assert same(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v, cu, mask), call(q, k, v, cu, mask))


@pytest.mark.parametrize("return_lse", [False, True])
def test_out_is_written_in_place(return_lse):
    def call(q, k, v, out):
        before = out.clone()
        result = fmha.attention(q, k, v, out=out, return_lse=return_lse)
        return before, result, out + 1

    q, k, v = dense(3)
    room = torch.zeros(3, S, H, 2 * D, dtype=torch.bfloat16)
    out = room[..., :D]
    before, result, after = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v, out)
    want = fmha.attention(q, k, v, return_lse=return_lse)
    assert (before == 0).all(), "written too early"
    assert same(result, want) and torch.equal(out, flat(want)[0]) and torch.equal(after, out + 1)
    assert (room[..., D:] == 0).all()


@pytest.mark.emulator
def test_compiled_calls_run_on_the_emulator():
    q, k, v = dense(1)
    compiled = torch.compile(fmha.attention, fullgraph=True, backend="aot_eager")
    got = compiled(q, k, v, causal=True, device="emulator", return_lse=True)
    assert same(got, fmha.attention(q, k, v, causal=True, device="emulator", return_lse=True))


OP_CASES = {
    "fwd": lambda: (dense(2), {"causal": True}),
    "fwd lse": lambda: (dense(2), {"return_lse": True, "alibi_slopes": torch.rand(H), "window_left": 4}),
    "fwd mask": lambda: (dense(2), {"mask": torch.rand(S, S) > 0.5, "sinks": torch.rand(H)}),
    "fwd packed": lambda: (dense(2), torch_ops.mask_arguments(fmha.pack_mask(torch.rand(S, S) > 0.5))),
    "fwd_out": lambda: (dense(2), {"into": half(2, S, H, D), "return_lse": True}),
    "fwd_varlen": lambda: ((*varlen(2), varlen(2)[3], S, S), {"return_lse": True}),
    "fwd_varlen_out": lambda: ((*varlen(2), varlen(2)[3], S, S), {"into": half(2 * S, H, D)}),
    "fwd_kvcache": lambda: (cached(2), {"return_lse": True}),
    "fwd_kvcache paged": lambda: ((*paged(2)[:3], paged(2)[4]), {"page_table": paged(2)[3]}),
    "fwd_kvcache_out": lambda: (cached(2), {"into": half(2, S, H, D)}),
    "merge": lambda: ((list(parts(2)[:2]), list(parts(2)[2:])), {}),
}


@pytest.mark.parametrize("name", OP_CASES)
def test_opcheck(name):
    args, kwargs = OP_CASES[name]()
    found = torch.library.opcheck(getattr(torch.ops.fmha, name.split()[0]).default, args, kwargs)
    assert set(found.values()) == {"SUCCESS"}


def test_each_op_has_a_case():
    names = {name.split()[0] for name in OP_CASES}
    assert names == {*torch_ops.OPS, *(f"{op}_out" for op in torch_ops.OPS), "merge"}


def test_schemas_say_what_is_written():
    for op in torch_ops.OPS:
        written = [a.name for a in getattr(torch.ops.fmha, op).default._schema.arguments if a.is_write]
        assert written == []
        written = [a.name for a in getattr(torch.ops.fmha, f"{op}_out").default._schema.arguments if a.is_write]
        assert written == ["into"]


def test_an_op_gives_what_the_call_gives():
    q, k, v = dense(2)
    out, lse = torch.ops.fmha.fwd(q, k, v, causal=True, return_lse=True)
    assert same((out, lse), fmha.attention(q, k, v, causal=True, return_lse=True))
    assert torch.ops.fmha.fwd(q, k, v)[1].numel() == 0
    q, k, v, n = cached(2)
    want = fmha.attention_with_kvcache(q, k, v, cache_seqlens=n, window=(3, 1))
    assert same(torch.ops.fmha.fwd_kvcache(q, k, v, n, window_left=3, window_right=1)[0], want)


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_gradients_are_refused_wherever_the_call_is_traced(which):
    q, k, v = dense(2)
    tensors = [q, k, v, torch.rand(H)]
    tensors[which].requires_grad_()

    def call(q, k, v, sinks):
        return fmha.attention(q, k, v, sinks=sinks)

    q, k, v, sinks = tensors
    with pytest.raises(fmha.UnsupportedProblem, match="no backward"):
        torch.ops.fmha.fwd(q, k, v, sinks=sinks)
    with pytest.raises(fmha.UnsupportedProblem, match="no backward"):
        torch.ops.fmha.fwd_out(q, k, v, into=half(2, S, H, D), sinks=sinks)
    for options in ({"fullgraph": True}, {}):
        with pytest.raises(Exception, match="no backward"):
            torch.compile(call, backend="aot_eager", **options)(*tensors)
        torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors)
        assert same(got, call(*tensors))
    with torch.inference_mode():
        assert same(torch.ops.fmha.fwd(q, k, v, sinks=sinks)[0], got)


def test_merge_has_a_gradient_compiled_and_not():
    def loss(a, b, m, n):
        out, lse = fmha.merge_states([a, b], [m, n])
        return (out * torch.linspace(-1, 1, D)).sum() + (lse * torch.linspace(-1, 2, S)).sum()

    tensors = [t.float() for t in parts(2)]
    tensors[2][0, 0, 3] = tensors[3][0, 0, 3] = -torch.inf  # a row without keys in either part
    tensors[2][0, 1, 4] = -torch.inf
    grads = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        own = [t.clone().requires_grad_() for t in tensors]
        run(*own).backward()
        grads.append([t.grad for t in own])
    for plain, compiled in zip(*grads, strict=True):
        assert torch.allclose(plain.nan_to_num(0), compiled, atol=1e-5)
        assert compiled.isfinite().all() and (compiled != 0).any()


def test_fake_tensors_give_fake_results():
    with FakeTensorMode():
        q = torch.empty(2, 300, 8, 64, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(2, 500, 2, 64, dtype=torch.bfloat16, device="cuda")
        v = torch.empty(2, 500, 2, 32, dtype=torch.bfloat16, device="cuda")
        inside = fmha.attention(q, k, v, return_lse=True)
    outside = fmha.attention(q, k, v, return_lse=True)  # the mode is over, the tensors are still fake
    for out, lse in (inside, outside):
        assert (out.shape, out.dtype, out.device) == ((2, 300, 8, 32), torch.bfloat16, q.device)
        assert (lse.shape, lse.dtype, lse.device) == ((2, 8, 300), torch.float32, q.device)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_writes_the_op_down(mode):
    tensors = dense(3)
    graph = make_fx(lambda q, k, v: fmha.attention(q, k, v, causal=True), tracing_mode=mode)(*tensors)
    assert sum(node.target is torch.ops.fmha.fwd.default for node in graph.graph.nodes) == 1
    assert same(graph(*tensors), fmha.attention(*tensors, causal=True))


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return fmha.attention(q, k, v, causal=True)

    tensors = dense(5)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Layer(), tensors, dynamic_shapes=[{0: batch}] * 3)
    for b in (5, 7):
        tensors = dense(b)
        assert same(program.module()(*tensors), fmha.attention(*tensors, causal=True))


def test_eager_calls_go_past_the_dispatcher(monkeypatch):
    monkeypatch.setattr(route, "_trace", lambda *_: pytest.fail("an eager call was traced"))
    fmha.attention(*dense(2))
    fmha.attention(torch.nn.Parameter(dense(2)[0], requires_grad=False), *dense(2)[1:])
    fmha.attention_varlen(*varlen(2), varlen(2)[3], S, S)


def test_a_stream_cannot_be_traced():
    q, k, v = dense(2)
    with pytest.raises(Exception, match="traced code runs on the current stream"):
        torch.compile(fmha.attention, fullgraph=True, backend="eager")(q, k, v, stream=3)


def test_bad_input_is_refused_when_a_compiled_call_runs():
    q, k, v = dense(2)
    compiled = torch.compile(fmha.attention, fullgraph=True, backend="aot_eager")
    for bad, options, message in (
        ((q.float(), k.float(), v.float()), {}, "torch.float32"),
        ((q, k[:, :, :1], v), {}, "all but the head dim must be equal"),
        ((q, k, v), {"window": (-7, 0)}, "window bound is -7"),
        ((q, k, v), {"sinks": torch.rand(3)}, "sinks is"),
    ):
        with pytest.raises(fmha.InputError, match=message):
            compiled(*bad, **options)


def test_a_mask_survives_its_way_through_the_arguments():
    packed = fmha.pack_mask(torch.rand(3 * S, S) > 0.3, cu_seqlens_q=ints(0, S, 3 * S))
    again = torch_ops.mask_of(torch_ops.mask_arguments(packed))
    assert (again.words is packed.words, again.any is packed.any) == (True, True)
    assert again.key == packed.key
    plain = torch.ones(2, 2)
    assert torch_ops.mask_of(torch_ops.mask_arguments(plain)) is plain
    assert torch_ops.mask_of(torch_ops.mask_arguments(None)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", CALLS)
def test_inductor_on_the_gpu(name, mode, monkeypatch):
    monkeypatch.setenv("FMHA_BUILD_ON_DEMAND", "1")
    make, call = CALLS[name]
    compiled = torch.compile(call, fullgraph=True, mode=mode)
    for _ in range(3):  # warm-up, recording, replay
        tensors = make(5, "cuda")
        got = [t.clone() for t in flat(compiled(*tensors))]
        for ours, plain in zip(got, flat(call(*tensors)), strict=True):
            assert torch.allclose(ours.float(), plain.float(), atol=1e-2 if name == "merge" else 0, equal_nan=True)

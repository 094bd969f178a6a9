# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can prove about the runtime: streams, graphs, threads, large strides, loading rules."""

from __future__ import annotations

import threading

import pytest

torch = pytest.importorskip("torch")

import fmha_runtime as fmha  # noqa: E402
from fmha_runtime.device import driver  # noqa: E402
from fmha_runtime.errors import ArtifactError, DriverError, InputError  # noqa: E402
from fmha_runtime.kernels import catalog, manifest  # noqa: E402
from fmha_runtime.ops import obtain  # noqa: E402
from fmha_runtime.ops.forward import direct, reference  # noqa: E402
from fmha_runtime.problem import dispatch  # noqa: E402
from fmha_runtime.toolchain import nvcc  # noqa: E402


def qkv(b=2, sq=300, sk=300, h=4, hk=2, d=64, dtype=torch.bfloat16):
    shapes = ((b, sq, h, d), (b, sk, hk, d), (b, sk, hk, d))
    return [torch.randn(s, device="cuda", dtype=dtype) for s in shapes]


def error(out, ref):
    return ((out.double() - ref).norm() / ref.norm()).item()


def spec_of(q):
    return fmha.explain(q, q, q).chosen


@pytest.mark.parametrize("d", [32, 40, 64, 104, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_numbers(d, causal):
    q, k, v = qkv(d=d)
    out, lse = fmha.attention(q, k, v, causal=causal, return_lse=True)
    ref, ref_lse = reference.attention(q, k, v, causal=causal)
    assert error(out, ref) < 3e-3
    assert (lse - ref_lse).abs().max() < 1e-3
    assert torch.equal(out, fmha.attention(q, k, v, causal=causal))


def test_emulator_and_gpu_agree():
    q, k, v = qkv(b=1, sq=70, sk=90)
    gpu = fmha.attention(q, k, v, causal=True, return_lse=True)
    cpu = fmha.attention(q.cpu(), k.cpu(), v.cpu(), causal=True, return_lse=True, device="emulator:sm90")
    assert (gpu[0].cpu().float() - cpu[0].float()).abs().max() < 1e-2
    assert (gpu[1].cpu() - cpu[1]).abs().max() < 1e-4


def test_current_stream_and_explicit_stream():
    q, k, v = qkv()
    want = fmha.attention(q, k, v)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        delayed = q * 2  # the kernel must wait for this
        got = fmha.attention(delayed / 2, k, v)
    side.synchronize()
    assert torch.equal(got, want)
    out = torch.empty_like(want)
    fmha.attention(q, k, v, out=out, stream=side.cuda_stream)
    side.synchronize()
    assert torch.equal(out, want)


def test_graph_replays_with_changed_contents():
    q, k, v = qkv()
    used = torch.tensor([300, 300], device="cuda", dtype=torch.int32)
    plan = fmha.plan(q, k, v, causal=True, seqused_k=used)
    out = torch.empty_like(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fmha.attention(q, k, v, causal=True, seqused_k=used, out=out)
    for i in range(20):
        q.copy_(torch.randn_like(q))
        used.fill_(300 - 10 * i)
        graph.replay()
        assert torch.equal(out, plan.run(q, k, v, seqused_k=used))


def test_loading_during_capture_is_refused_with_the_remedy():
    q, k, v = qkv()
    image = manifest.load_image(obtain._built(spec_of(q)))
    # The same kernel under another image hash: certainly not loaded yet.
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    smem = catalog.smem_bytes(spec_of(q), catalog.tile(spec_of(q)))
    fmha.attention(q, k, v)
    with torch.cuda.stream(side):
        graph.capture_begin()
        try:
            with pytest.raises(DriverError, match="prepare"):
                driver.load(image + b"\0", spec_of(q).name, 0, smem, None, torch.cuda.current_stream().cuda_stream)
        finally:
            q.add_(0)
            graph.capture_end()
    torch.cuda.synchronize()


def test_prepare_loads_ahead():
    q, k, v = qkv(d=96)
    fmha.prepare(fmha.explain(q, k, v).problem)
    out = torch.empty_like(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fmha.attention(q, k, v, out=out)
    graph.replay()
    assert error(out, reference.attention(q, k, v)[0]) < 3e-3


def test_threads_share_plans():
    q, k, v = qkv()
    want = fmha.attention(q, k, v)
    plan = fmha.plan(q, k, v)
    wrong = []

    def work():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for i in range(200):
                got = plan.run(q, k, v) if i % 2 else fmha.attention(q, k, v)
                stream.synchronize()
                if not torch.equal(got, want):
                    wrong.append(i)
        stream.synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_first_call_in_a_fresh_thread_with_out():
    q, k, v = qkv()
    want = fmha.attention(q, k, v)
    out = torch.empty_like(want)
    torch.cuda.synchronize()
    failed = []

    def work():
        try:
            fmha.attention(q, k, v, out=out)
        except Exception as problem:
            failed.append(problem)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert not failed
    assert torch.equal(out, want)


def test_offsets_past_two_to_the_31():
    rows, d = 64, 64
    stride = (1 << 31) // 32 + 64  # elements between rows: the last row starts near 2^32
    room = torch.empty(rows * stride, device="cuda", dtype=torch.bfloat16)
    k = room.as_strided((1, rows, 1, d), (0, stride, d, 1))
    k.copy_(torch.randn(1, rows, 1, d))
    q = torch.randn(1, rows, 1, d, device="cuda", dtype=torch.bfloat16)
    out = fmha.attention(q, k, k)
    assert error(out, reference.attention(q, k.contiguous(), k.contiguous())[0]) < 3e-3


def test_mixed_devices_are_refused():
    q, k, v = qkv()
    with pytest.raises(InputError, match="all tensors of a call are on one device"):
        fmha.attention(q, k.cpu(), v)
    with pytest.raises(InputError, match="emulator runs CPU tensors"):
        fmha.attention(q, k, v, device="emulator")


def test_truncated_cubin_and_wrong_abi_are_artifact_errors():
    q, _, _ = qkv()
    spec = spec_of(q)
    row = obtain._built(spec)
    image = manifest.load_image(row)
    smem = catalog.smem_bytes(spec, catalog.tile(spec))
    with pytest.raises(ArtifactError, match="truncated"):
        driver.load(image[: len(image) // 2], spec.name, 0, smem)
    with pytest.raises(ArtifactError, match="bytes of parameters"):
        driver.load(image + b"\0\0", spec.name, 0, smem, params_size=4)


def test_ptx_of_an_older_arch_runs():
    q, k, v = qkv()
    spec = fmha.KernelSpec.parse("fmha_fwd_sm80_bf16_d64")
    kernel = obtain.kernel(spec, device="cuda:0", via="ptx")
    out = direct.run(kernel, spec, q, k, v, causal=True)
    assert error(out, reference.attention(q, k, v, causal=True)[0]) < 3e-3


def test_fallback_in_torch_on_the_gpu():
    q, k, v = qkv(d=60)
    with pytest.raises(fmha.UnsupportedProblem, match="no kernel computes this"):
        fmha.attention(q, k, v)
    out = fmha.attention(q, k, v, fallback="torch")
    assert error(out, reference.attention(q, k, v)[0]) < 5e-3


def test_build_reports_the_registers_that_the_driver_sees():
    q, _, _ = qkv()
    spec = spec_of(q)
    row = obtain._built(spec)
    assert driver.registers(obtain.kernel(spec)) == row.registers
    assert dispatch.choose(fmha.explain(q, q, q).problem).spec == spec
    assert nvcc.find_nvcc().version

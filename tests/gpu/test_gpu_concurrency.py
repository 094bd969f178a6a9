# SPDX-License-Identifier: Apache-2.0
"""Several GPUs in one process, several streams, many threads, forked children: on real devices.

Inputs are prepared late on purpose (a sleeping kernel runs before them), so that a launch on a wrong stream or device
reads what was there before. The tests that need two GPUs skip on one.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.threads import at_once

torch = pytest.importorskip("torch")

import fmha_runtime as fmha  # noqa: E402
from fmha_runtime.calls import route  # noqa: E402
from fmha_runtime.device import driver  # noqa: E402
from fmha_runtime.errors import InputError  # noqa: E402
from fmha_runtime.ops import obtain  # noqa: E402
from fmha_runtime.ops.forward import reference  # noqa: E402

ROOT = Path(fmha.__file__).resolve().parent.parent
LONG = 50_000_000  # cycles: tens of milliseconds


@pytest.fixture
def two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


def qkv(device="cuda:0", b=2, sq=300, sk=300, h=4, hk=2, d=64, dtype=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((b, sq, h, d), (b, sk, hk, d), (b, sk, hk, d))
    return [torch.randn(s, generator=g).to(device, dtype) for s in shapes]


def right(out, q, k, v, **options):
    ref = reference.attention(q, k, v, **options)[0]
    assert ((out.double() - ref).norm() / ref.norm()).item() < 3e-3


def synchronize():
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


def forget():
    """As in a fresh process: no plan is made and no kernel is loaded."""
    synchronize()
    route._forget()
    obtain._loaded.clear()
    driver._kernels.clear()


# ---- several GPUs


def test_tensors_on_a_gpu_that_is_not_current(two_gpus):
    assert torch.cuda.current_device() == 0
    forget()
    near, far = qkv("cuda:0"), qkv("cuda:1")
    want = fmha.attention(*near, causal=True, return_lse=True)
    got = fmha.attention(*far, causal=True, return_lse=True)
    assert torch.cuda.current_device() == 0
    for x, y in zip(got, want, strict=True):
        assert x.device.index == 1
        assert torch.equal(x.cpu(), y.cpu())
    out = torch.zeros_like(far[0])
    assert fmha.attention(*far, causal=True, out=out) is out
    assert torch.equal(out.cpu(), want[0].cpu())
    with torch.cuda.device(1):  # and the other way round
        again = fmha.attention(*near, causal=True)
        assert torch.cuda.current_device() == 1
    assert again.device.index == 0 and torch.equal(again, want[0])


def test_each_gpu_has_its_own_current_stream(two_gpus):
    want = fmha.attention(*qkv("cuda:0"))
    q, k, v = qkv("cuda:1")
    late, side = torch.zeros_like(q), torch.cuda.Stream(1)
    synchronize()
    with torch.cuda.stream(side), torch.cuda.device(0):  # device 0 is current; device 1's current stream is ``side``
        assert torch.cuda.current_device() == 0
        with torch.cuda.device(1):
            torch.cuda._sleep(LONG)
            late.copy_(q)
        out = fmha.attention(late, k, v)
        assert torch.cuda.current_device() == 0
    side.synchronize()
    assert torch.equal(out.cpu(), want.cpu())


def test_an_explicit_stream_of_another_gpu(two_gpus):
    want = fmha.attention(*qkv("cuda:0"))
    q, k, v = qkv("cuda:1")
    late, side, out = torch.zeros_like(q), torch.cuda.Stream(1), torch.zeros_like(q)
    synchronize()
    with torch.cuda.device(1), torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        late.copy_(q)
    fmha.attention(late, k, v, out=out, stream=side.cuda_stream)
    side.synchronize()
    assert torch.equal(out.cpu(), want.cpu())


def test_a_plan_is_of_one_gpu(two_gpus):
    near, far = qkv("cuda:0"), qkv("cuda:1")
    plan = fmha.plan(*far, causal=True)
    assert torch.equal(plan.run(*far).cpu(), fmha.attention(*near, causal=True).cpu())
    with pytest.raises(InputError, match="this plan was made for"):
        plan.run(*near)
    with pytest.raises(InputError, match="all tensors of a call are on one device"):
        fmha.attention(near[0], *far[1:])


def test_prepare_for_the_second_gpu(two_gpus):
    forget()
    far = qkv("cuda:1", d=96)
    fmha.prepare(fmha.explain(*far).problem, device=1)
    loaded = dict(driver._kernels)
    fmha.attention(*far)
    assert driver._kernels == loaded, "the first call found its kernel loaded"
    assert {device for _, device, _ in loaded} == {1}


def test_varlen_and_caches_on_the_second_gpu(two_gpus):
    q, k, v = (x.flatten(0, 1) for x in qkv("cuda:1"))
    cu = torch.tensor([0, 100, 600], dtype=torch.int32)
    out = fmha.attention_varlen(q, k, v, cu.to("cuda:1"), cu.to("cuda:1"), 500, 500, causal=True)
    ref = reference.attention_varlen(q, k, v, cu, cu, causal=True)[0]
    assert ((out.double() - ref).norm() / ref.norm()).item() < 3e-3
    pool, values = (torch.randn(20, 16, 2, 64, device="cuda:1", dtype=torch.bfloat16) for _ in range(2))
    table = torch.randperm(20)[:18].view(2, 9).int().to("cuda:1")
    q, used = qkv("cuda:1", sq=3)[0], torch.tensor([140, 9], dtype=torch.int32, device="cuda:1")
    out = fmha.attention_with_kvcache(q, pool, values, cache_seqlens=used, page_table=table, causal=True)
    right(out, q, pool, values, seqused_k=used, page_table=table, causal=True)


def test_a_graph_on_the_second_gpu(two_gpus):
    q, k, v = qkv("cuda:1")
    out = torch.zeros_like(q)
    fmha.attention(q, k, v, out=out)
    with torch.cuda.device(1):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fmha.attention(q, k, v, out=out)
        q.copy_(torch.randn_like(q))
        graph.replay()
    torch.cuda.synchronize(1)
    right(out, q, k, v)


def test_threads_with_a_gpu_each(two_gpus):
    """A thread that works on device 1 and one on device 0, neither has touched CUDA before; first calls included."""
    inputs = {index: qkv(f"cuda:{index}") for index in range(2)}
    want = fmha.attention(*qkv(), causal=True).cpu()
    forget()

    def work(i):
        index = i % 2
        outs = [fmha.attention(*inputs[index], causal=True) for _ in range(100)]
        torch.cuda.synchronize(index)
        return [out.cpu() for out in outs]

    for outs in at_once(work, 6):
        assert all(torch.equal(out, want) for out in outs)
    assert {device for _, device, _ in driver._kernels} == {0, 1}


def test_both_gpus_work_at_the_same_time(two_gpus):
    """A launch on one GPU does not wait for the other."""
    near, far = qkv("cuda:0"), qkv("cuda:1")
    want = fmha.attention(*far)
    fmha.attention(*near)
    synchronize()
    torch.cuda._sleep(20 * LONG)  # on device 0
    busy, out = fmha.attention(*near), fmha.attention(*far)
    torch.cuda.synchronize(1)
    assert not torch.cuda.current_stream(0).query(), "device 0 should still be asleep"
    assert torch.equal(out, want)
    torch.cuda.synchronize(0)
    assert torch.equal(busy.cpu(), want.cpu())


# ---- several streams


def test_many_streams_one_plan():
    """Every stream has inputs of its own that come late; parameters are taken at the launch, not when it runs."""
    plan = fmha.plan(*qkv(), causal=True)
    inputs = [qkv(seed=i) for i in range(8)]
    want = [fmha.attention(*x, causal=True) for x in inputs]
    late = [[torch.zeros_like(t) for t in x] for x in inputs]
    outs, streams = [], [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for i, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG)
            for to, x in zip(late[i], inputs[i], strict=True):
                to.copy_(x)
            call = plan.run if i % 2 else lambda *x: fmha.attention(*x, causal=True)
            outs.append(call(*late[i]))
    torch.cuda.synchronize()
    for out, expected in zip(outs, want, strict=True):
        assert torch.equal(out, expected)


def test_a_consumer_on_another_stream_waits_by_an_event():
    q, k, v = qkv()
    want = fmha.attention(q, k, v)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        torch.cuda._sleep(LONG)
        out = fmha.attention(q, k, v)
        event = first.record_event()
    with torch.cuda.stream(second):
        second.wait_event(event)
        got = out * 1
    second.synchronize()
    assert torch.equal(got, want)


def test_the_stream_of_a_call_is_where_its_kernel_runs():
    """An idle stream finishes at once although another one sleeps."""
    q, k, v = qkv()
    out = fmha.attention(q, k, v)
    sleepy, idle = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(sleepy):
        torch.cuda._sleep(20 * LONG)
        fmha.attention(q, k, v, out=out, stream=idle.cuda_stream)
    idle.synchronize()
    assert not sleepy.query()
    torch.cuda.synchronize()


# ---- threads


def test_first_calls_of_many_threads():
    """Nothing is loaded and no plan exists; all threads ask at once, for two kernels."""
    inputs = {d: qkv(d=d) for d in (64, 128)}
    want = {d: fmha.attention(*x, causal=True) for d, x in inputs.items()}
    forget()

    def work(i):
        d = 64 if i % 2 else 128
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            out = fmha.attention(*inputs[d], causal=True)
        stream.synchronize()
        return d, out

    for d, out in at_once(work, 8):
        assert torch.equal(out, want[d])
    assert len(driver._kernels) == 2, "each kernel was loaded once"


def test_threads_with_tensors_of_their_own():
    inputs = [qkv(seed=i, sq=100 + i) for i in range(6)]
    want = [fmha.attention(*x, causal=True, return_lse=True) for x in inputs]
    torch.cuda.synchronize()

    def work(i):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(100):
                found = fmha.attention(*inputs[i], causal=True, return_lse=True)
                stream.synchronize()
                if not all(torch.equal(x, y) for x, y in zip(found, want[i], strict=True)):
                    return False
        stream.synchronize()
        return True

    assert all(at_once(work, 6))


def test_a_capture_in_one_thread_and_calls_in_another():
    q, k, v = qkv()
    want, out = fmha.attention(q, k, v), torch.zeros_like(q)
    stop = threading.Event()
    torch.cuda.synchronize()

    def busy():
        stream, calls = torch.cuda.Stream(), 0
        while not stop.is_set():
            with torch.cuda.stream(stream):
                got = fmha.attention(q, k, v)
            stream.synchronize()
            assert torch.equal(got, want)
            calls += 1
        return calls

    def capture():
        try:
            graphs = []
            for _ in range(5):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                    fmha.attention(q, k, v, out=out)
                graphs.append(graph)
            for graph in graphs:
                out.zero_()
                graph.replay()
                torch.cuda.synchronize()
                assert torch.equal(out, want)
        finally:
            stop.set()

    calls, _ = at_once(lambda i: (busy, capture)[i](), 2)
    assert calls > 0


# ---- fork


def child(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


FORK = """
import os, sys, torch
import fmha_runtime as fmha
from fmha_runtime.device import driver
torch.set_num_threads(1)
cpu = torch.randn(1, 40, 2, 64).bfloat16()
{before}
pid = os.fork()
if pid == 0:
    code = 1
    try:
        {inside}
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_child_uses_the_gpu_when_its_parent_has_not():
    inside = "x = cpu.cuda(); print(fmha.attention(x, x, x).isfinite().all().item())"
    assert child(FORK.format(before="", inside=inside)) == "True\n"


def test_a_child_of_a_parent_that_used_cuda_is_told_so():
    """No hang, no crash, no wrong numbers: an error that names the fork; and the CPU still works."""
    before = "x = cpu.cuda(); want = fmha.attention(x, x, x); plan = fmha.plan(x, x, x); torch.cuda.synchronize()"
    inside = """
        for call in (lambda: fmha.attention(x, x, x), lambda: fmha.prepare(fmha.explain(x, x, x).problem),
                     driver.device_count):
            try:
                call()
            except fmha.DriverError as error:
                assert "forked" in str(error) and "spawn" in str(error), error
            else:
                raise SystemExit("not refused")
        try:
            plan.run(x, x, x)
        except (fmha.DriverError, RuntimeError) as error:
            print(type(error).__name__)
        else:
            raise SystemExit("a plan of the parent ran")
        print(fmha.attention(cpu, cpu, cpu).isfinite().all().item())
"""
    out = child(FORK.format(before=before, inside=inside.strip()))
    assert out.endswith("True\n"), out


def test_a_spawned_worker_computes(tmp_path):
    code = """
import multiprocessing, torch
import fmha_runtime as fmha
def work(q):
    x = q.cuda()
    return fmha.attention(x, x, x, causal=True).cpu()
if __name__ == "__main__":
    q = torch.randn(1, 40, 2, 64).bfloat16()
    want = work(q)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for got in pool.map(work, [q] * 4):
            assert torch.equal(got, want)
    print("fine")
"""
    path = tmp_path / "worker.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr

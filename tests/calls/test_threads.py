# SPDX-License-Identifier: Apache-2.0
"""Threads that call at once and processes that fork: what of it needs no GPU (the rest: test_gpu_concurrency.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.threads import at_once

torch = pytest.importorskip("torch")

import fmha_runtime as fmha  # noqa: E402
from fmha_runtime.calls import route  # noqa: E402, obtain
from fmha_runtime.kernels.spec import KernelSpec  # noqa: E402
from fmha_runtime.ops import obtain  # noqa: E402, obtain
from fmha_runtime.problem import dispatch  # noqa: E402, obtain

ROOT = Path(fmha.__file__).resolve().parent.parent


def qkv(seed, sq=17, sk=29):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(1, n, 2, 32, generator=g).bfloat16() for n in (sq, sk, sk)]


@pytest.mark.emulator
@pytest.mark.parametrize("device", [None, "emulator", "emulator:sm90"])
def test_first_calls_at_once(monkeypatch, device):
    """Nobody has planned anything yet, and all ask for the same few problems."""
    inputs = [qkv(i % 2) for i in range(8)]
    want = [fmha.attention(*qkv(i), causal=True, device=device) for i in range(2)]
    monkeypatch.setattr(route, "_plans", {})
    monkeypatch.setattr(route, "_bindings", {})
    monkeypatch.setattr(route, "_seen", {})
    monkeypatch.setattr(route, "_mine", route._Mine())
    dispatch._walk.cache_clear()
    results = at_once(lambda i: fmha.attention(*inputs[i], causal=True, device=device), 8)
    assert all(torch.equal(out, want[i % 2]) for i, out in enumerate(results))
    assert len(route._plans) == (device is not None)


@pytest.mark.emulator
@pytest.mark.parametrize("device", ["emulator", "emulator:sm90"])
def test_one_plan_for_many_threads(device):
    plan = fmha.plan(*qkv(0), device=device)
    inputs = [qkv(i) for i in range(6)]
    want = [fmha.attention(*x, device=device) for x in inputs]

    def work(i):
        return [plan.run(*inputs[i], return_lse=True)[0] for _ in range(5)]

    for out, right in zip(at_once(work, 6), want, strict=True):
        assert all(torch.equal(x, right) for x in out)


@pytest.mark.emulator
def test_a_full_plan_cache_does_not_disturb_other_threads(monkeypatch):
    monkeypatch.setattr(route, "_plans", {})
    monkeypatch.setattr(route, "_bindings", {})
    monkeypatch.setattr(route, "_seen", {})
    monkeypatch.setattr(route, "_mine", route._Mine())
    monkeypatch.setattr(route, "PLANS", 2)
    monkeypatch.setattr(route, "BINDINGS", 2)

    def call(sq):
        return fmha.attention(*qkv(1, sq), scale=sq / 10, device="emulator")

    want = {sq: call(sq) for sq in range(1, 7)}
    results = at_once(lambda i: [call(1 + (i + n) % 6) for n in range(12)], 4)
    assert len(route._plans) <= 2 + 4 and len(route._bindings) <= 2 + 4  # each thread may be one ahead
    for i, outs in enumerate(results):
        assert all(torch.equal(out, want[1 + (i + n) % 6]) for n, out in enumerate(outs))


@pytest.mark.emulator
def test_two_threads_compile_one_kernel(own_cache):
    spec = KernelSpec.parse("fmha_fwd_sm80_bf16_d32")
    kernels = at_once(lambda _: obtain.kernel(spec, device="emulator"), 2)
    assert [kernel.name for kernel in kernels] == [spec.name] * 2
    files = [path.name for path in (own_cache / "emulator").iterdir()]
    assert len(files) == 2, files  # the runtime and the kernel; no scratch folder is left


def child(code, **options):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FORK = """
import os, sys, threading, torch
import fmha_runtime as fmha
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
q = torch.randn(1, 40, 2, 32).bfloat16()
before = {before}
def inside():
    {inside}
sys.stdout.flush()
pid = os.fork()
if pid == 0:
    code = 1
    try:
        inside()
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.parametrize("used", [False, True], ids=["only imported", "used before"])
@pytest.mark.parametrize("device", [None, "emulator"])
def test_a_forked_child_computes(used, device):
    call = f"fmha.attention(q, q, q, causal=True, device={device!r})"
    inside = f"out = {call}; print(out.isfinite().all().item(), before is None or torch.equal(out, before))"
    assert child(FORK.format(before=call if used else None, inside=inside)) == "True True\n"


def test_a_child_of_a_busy_parent_computes():
    """Another thread of the parent holds the lock of a plan while the process forks."""
    busy = "from fmha_runtime.calls import route\n(plan,) = route._mine.rovers.values()\nplan.binding.lock.acquire()\n"
    code = FORK.replace("sys.stdout.flush()\npid", busy + "pid", 1)
    call = "fmha.attention(q, q, q, device='emulator')"
    assert child(code.format(before=call, inside=f"print(torch.equal({call}, before))")) == "True\n"


# A driver in Python: enough of it to be initialised, asked for devices and launched.
DRIVER = """
import sys, types
class Status(int):
    name = "CUDA_SUCCESS"
ok = Status(0)
class Attribute:
    def __getattr__(self, name):
        return name
api = types.ModuleType("driver")
api.cuInit = lambda flags: (ok,)
api.cuDeviceGetCount = lambda: (ok, 1)
api.cuDeviceGet = lambda index: (ok, index)
api.cuDeviceGetAttribute = lambda name, device: (ok, 9)
api.CUdevice_attribute = Attribute()
api.cuDriverGetVersion = lambda: (ok, 13000)
failing = Status(3)
failing.name = "CUDA_ERROR_NOT_INITIALIZED"
api.CUresult = lambda code: failing
api.cuLaunchKernel = lambda *_: (failing,)
bindings = types.ModuleType("cuda.bindings")
bindings.driver = api
sys.modules.update({"cuda": types.ModuleType("cuda"), "cuda.bindings": bindings, "cuda.bindings.driver": api})
from fmha_runtime.device import driver
"""


def test_cuda_is_refused_in_a_child_that_was_forked_after_it_was_initialised():
    inside = """
    kernel = driver.Kernel("some_kernel", 0, None, 0, 0)
    driver._launch_ex = lambda: lambda *_: 3
    start = kernel.bound(32, 0, 0)
    for call in (driver.device_count, lambda: driver.capability(0), lambda: driver.load(b"", "x", 0, 0),
                 lambda: kernel.launch(1, 32, 0, 0, 0), lambda: start(1, 0)):
        try:
            call()
        except fmha.DriverError as error:
            assert "forked after CUDA was initialised" in str(error) and "spawn" in str(error), error
        else:
            raise SystemExit("not refused")
    assert not driver.available()
    print("refused")
"""
    before = "(driver.device_count(), driver.capability(0), driver._lock.acquire())"
    assert child(DRIVER + FORK.format(before=before, inside=inside.strip())) == "refused\n"


def test_cuda_works_in_a_child_when_the_parent_has_not_touched_it():
    inside = "print(driver.device_count(), driver.capability(0))"
    assert child(DRIVER + FORK.format(before="None", inside=inside)) == "1 (9, 9)\n"

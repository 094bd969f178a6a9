# SPDX-License-Identifier: Apache-2.0
"""Calls with lengths that were not seen before: what they launch is right, touches no file, and stays short."""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
import tracemalloc

import pytest

torch = pytest.importorskip("torch")

from helpers import ROOT  # noqa: E402
from helpers.profiling import calls_of  # noqa: E402
from helpers.stub_device import StubDevice  # noqa: E402

import fmha_runtime as fmha  # noqa: E402
from fmha_runtime.calls import route  # noqa: E402
from fmha_runtime.device import tensor_map  # noqa: E402
from fmha_runtime.kernels.spec import Arch  # noqa: E402

POOL = {heads: torch.randn(2, 900, heads, 64).bfloat16() for heads in (2, 4, 8)}


@pytest.fixture(params=[Arch.SM90, Arch.SM80], ids=lambda arch: arch.value)
def stub(monkeypatch, request):
    return StubDevice(monkeypatch, request.param)


def a_call(rng):
    """Any call of any form, as a function without arguments."""
    form = rng.choice(["dense", "varlen", "pages", "packed"])
    heads, heads_k = rng.choice([(8, 8), (8, 2), (4, 4), (4, 2)])
    sq, sk, batch = rng.randint(1, 300), rng.randint(1, 900), rng.randint(1, 2)
    q, k, v = POOL[heads][:batch, :sq], POOL[heads_k][:batch, :sk], POOL[heads_k][:batch, 900 - sk :]
    if rng.random() < 0.5:
        q, k, v = (t.contiguous() for t in (q, k, v))
    options = {"causal": rng.random() < 0.5, "return_lse": rng.random() < 0.5}
    if form == "packed":
        mask = fmha.pack_mask(torch.rand(batch, 1, sq, sk) < 0.5)
        return lambda: fmha.attention(q, k, v, mask=mask, return_lse=options["return_lse"])
    if rng.random() < 0.2:
        options |= {"alibi_slopes": torch.ones(batch, heads)[rng.randint(0, 1) * (batch - 1)]}
    if form == "varlen":
        cu_q, cu_k = (torch.tensor([0, n // 2, n], dtype=torch.int32) for n in (sq, sk))
        return lambda: fmha.attention_varlen(q[0], k[0], v[0], cu_q, cu_k, sq, sk, **options)
    if form == "pages":
        size = rng.choice([16, 64])
        pool = POOL[heads_k][0, : 64 * (1 + sk // 64)].view(-1, size, heads_k, 64)
        table = torch.zeros(batch, 1 + sk // size, dtype=torch.int32)
        used = torch.full((batch,), sk, dtype=torch.int32)
        return lambda: fmha.attention_with_kvcache(q, pool, pool, cache_seqlens=used, page_table=table, **options)
    if rng.random() < 0.3:
        options |= {"out": torch.empty(batch, sq, 2 * heads, 64).bfloat16()[:, :, :heads]}
    return lambda: fmha.attention(q, k, v, **options)


def launched(stub, call):
    """Everything of the launch but addresses."""
    before = len(stub.encoded)
    call()
    launch = stub.launches[-1]
    block = getattr(launch.block, "tma", launch.block)
    fwd = getattr(block, "fwd", block)
    geometry = ctypes.string_at(ctypes.addressof(fwd) + 13 * 8, ctypes.sizeof(fwd) - 13 * 8)
    maps = [
        bytes(tensor_map._EmulatedMap.from_buffer(m))[16:]
        for name in ("q_map", "k_map", "v_map")
        if (m := getattr(block, name, None)) is not None
    ]
    return (launch.name, launch.grid, launch.threads, launch.smem, geometry, maps), stub.encoded[before:]


def test_a_new_geometry_launches_what_a_fresh_process_would(stub, monkeypatch):
    rng = random.Random(11)
    for _ in range(300):
        call = a_call(rng)
        got, _ = launched(stub, call)
        warm, encoded = launched(stub, call)
        assert warm == got and not encoded, "the second call has nothing to encode"
        with monkeypatch.context() as fresh:
            fresh.setattr(route, "_plans", {})
            fresh.setattr(route, "_bindings", {})
            fresh.setattr(route, "_seen", {})
            fresh.setattr(route, "_mine", route._Mine())
            assert launched(stub, call)[0] == got
    assert stub.bindings - 300 < 60, "kernels are bound by options, not by lengths"


def test_maps_are_those_of_the_checked_layout(monkeypatch):
    stub = StubDevice(monkeypatch)
    q, k, v = POOL[8][:, :70], POOL[2][:, :33], POOL[2][:, :33].transpose(1, 2).contiguous().transpose(1, 2)
    fmha.attention(q, k, v)
    rows = [layout.box[1] for layout in stub.encoded]
    assert stub.encoded == [
        tensor_map.layout(t.shape, t.stride(), tensor_map.DType.BF16, n, 64, tensor_map.Swizzle.B128)
        for t, n in zip((q, k, v), rows, strict=True)
    ]


def test_a_new_geometry_stays_short(monkeypatch):
    """The number of functions that one enters, as for a warm call in test_host_path.py; raise the limit only with a
    measurement (tools/host_time.py)."""
    stub = StubDevice(monkeypatch)
    monkeypatch.setattr(stub, "_encode", lambda *_: 0)
    q, k = POOL[8], POOL[8]
    fmha.attention(q[:, :5], k[:, :6], k[:, :6])
    given = q[:, :7], k[:, :9], k[:, 9:18]
    assert calls_of(lambda: fmha.attention(*given)) <= 140


def test_lengths_that_come_once_take_no_memory(monkeypatch):
    stub = StubDevice(monkeypatch)
    q = POOL[8]
    tracemalloc.start()
    try:
        for n in range(1, 900):
            fmha.attention(q[:, : 1 + n % 7], q[:, :n], q[:, :n])
            stub.launches.clear(), stub.encoded.clear()
            if n == 100:
                used = tracemalloc.get_traced_memory()[0]
        grown = tracemalloc.get_traced_memory()[0] - used
    finally:
        tracemalloc.stop()
    assert not route._plans and len(route._mine.rovers) == 2 and grown < 1 << 18  # a forward and a decode kernel's


def test_lengths_that_come_back_get_plans_of_their_own_and_old_ones_make_room(monkeypatch):
    StubDevice(monkeypatch)
    monkeypatch.setattr(route, "PLANS", 50)
    q = POOL[8]

    def call(n):
        fmha.attention(q[:, :5], q[:, :n], q[:, :n])

    call(20), call(20), call(20)
    assert not route._plans, "one geometry again and again, as the layers of a model have it"
    for n in range(30, 60):
        call(n), call(20)
    assert len(route._plans) == 1, "only 20 came back"
    for n in range(30, 60):
        call(n)
    assert len(route._plans) == 31
    for n in range(100, 200):
        call(n), call(n + 1000 - 200), call(n)
    assert len(route._plans) == 50, "one goes where one comes"


WATCHED = """
import sys, torch
import fmha_runtime as fmha
torch.set_num_threads(1)
x = torch.randn(2, 400, 4, 64).bfloat16()
mask = fmha.pack_mask(torch.rand(20, 30) < 0.5)
def calls(n, m):
    q, k = x[:, :n], x[:, :m]
    cu_q, cu_k = (torch.tensor([0, 1, i], dtype=torch.int32) for i in (n, m))
    table, used = torch.zeros(2, 1 + m // 16, dtype=torch.int32), torch.full((2,), m, dtype=torch.int32)
    pool = x[0].view(25, 16, 4, 64)
    for arch in ("sm80", "sm90"):
        where = dict(device="emulator:" + arch)
        fmha.attention(q, k, k, causal=True, **where)
        fmha.attention_varlen(q[0], k[0], k[0], cu_q, cu_k, n, m, **where)
        fmha.attention_with_kvcache(q, pool, pool, cache_seqlens=used, page_table=table, **where)
        fmha.attention(q[:1], k[:1], k[:1], mask=fmha.pack_mask(torch.rand(n, m) < 0.5), **where)
        fmha.attention(q, k, k, causal=True, scale=0.01 * m, **where)
calls(20, 30)
seen = []
sys.addaudithook(lambda event, arguments: seen.append((event, arguments)) if event in WATCHED else None)
WATCHED = {"open", "os.listdir", "os.scandir", "subprocess.Popen", "os.fork", "os.posix_spawn", "ctypes.dlopen"}
calls(7, 90), calls(33, 11)
print(seen)
"""


@pytest.mark.emulator
def test_a_new_geometry_touches_no_file():
    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_a_plan_says_that_it_cannot_be_copied(monkeypatch):
    import copy
    import pickle

    StubDevice(monkeypatch)
    plan = fmha.plan(POOL[8], POOL[8], POOL[8])
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"a Plan belongs to its process.*fmha_runtime\.plan"):
            attempt(plan)

# SPDX-License-Identifier: Apache-2.0
"""Arrays of other libraries: seen without a copy, results of the same kind, out= written in place, streams in order."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fmha_runtime as fmha  # noqa: E402
from fmha_runtime.calls import route  # noqa: E402
from fmha_runtime.errors import InputError  # noqa: E402
from fmha_runtime.problem import arrays  # noqa: E402


def numpy_qkv(b=2, sq=20, sk=33, h=4, hk=2, d=64, seed=0):
    g = np.random.default_rng(seed)
    return [g.standard_normal(s).astype(np.float16) for s in ((b, sq, h, d), (b, sk, hk, d), (b, sk, hk, d))]


def as_torch(*given):
    return [torch.from_numpy(x) for x in given]


def same(got, want):
    assert type(got) is np.ndarray
    assert np.array_equal(got, want.numpy())


@pytest.mark.emulator
@pytest.mark.parametrize("device", [None, "emulator"])
def test_numpy_in_numpy_out(device):
    q, k, v = numpy_qkv()
    want, want_lse = fmha.attention(*as_torch(q, k, v), causal=True, return_lse=True, device=device)
    out, lse = fmha.attention(q, k, v, causal=True, return_lse=True, device=device)
    same(out, want)
    same(lse, want_lse)
    out[0] = 0  # theirs to write


def test_views_share_memory():
    q = numpy_qkv()[0]
    assert arrays.view("q", q).data_ptr() == q.ctypes.data
    assert arrays.view("q", q[:, 3:, 1:]).data_ptr() == q[:, 3:, 1:].ctypes.data
    made = []
    result = arrays.call(lambda q: made.append(q.clone()) or made[0], {"q": q})
    assert result.ctypes.data == made[0].data_ptr()


@pytest.mark.emulator
@pytest.mark.parametrize("device", [None, "emulator"])
def test_out_is_written_and_returned(device):
    q, k, v = numpy_qkv()
    out = np.zeros((*q.shape[:3], 64), np.float16)
    assert fmha.attention(q, k, v, out=out, device=device) is out
    same(out, fmha.attention(*as_torch(q, k, v), device=device))
    again = np.zeros_like(out)
    first, lse = fmha.attention(*as_torch(q, k, v), out=again, return_lse=True, device=device)  # torch in, numpy out=
    assert first is again and isinstance(lse, torch.Tensor)
    assert np.array_equal(again, out)
    out.flags.writeable = False
    with pytest.raises(InputError, match="read-only"):
        fmha.attention(q, k, v, out=out)


def test_read_only_inputs_are_read():
    q, k, v = numpy_qkv()
    want = fmha.attention(*as_torch(q, k, v))
    for x in (q, k, v):
        x.flags.writeable = False
    same(fmha.attention(q, k, v), want)


@pytest.mark.emulator
def test_every_array_argument():
    q, k, v = numpy_qkv()
    slopes, sinks = np.linspace(0.1, 0.9, 4, dtype=np.float32), np.ones(4, np.float32)
    used, mask = np.array([33, 7], np.int32), np.tri(20, 33, 5, dtype=bool)
    for options in ({"alibi_slopes": slopes}, {"sinks": sinks}, {"seqused_k": used}, {"mask": mask}):
        t = {name: torch.from_numpy(x) for name, x in options.items()}
        want = fmha.attention(*as_torch(q, k, v), device="emulator", **t)
        same(fmha.attention(q, k, v, device="emulator", **options), want)
        mixed = fmha.attention(*as_torch(q, k, v), device="emulator", **options)
        assert torch.equal(mixed, want)
    assert str(fmha.explain(q, k, v, mask=mask)) == str(fmha.explain(*as_torch(q, k, v), mask=torch.tensor(mask)))
    assert fmha.is_supported(q, k, v) == []
    assert fmha.plan(q, k, v, device="emulator").shape == fmha.plan(*as_torch(q, k, v), device="emulator").shape


def test_mixed_kinds_give_the_kind_of_q():
    q, k, v = numpy_qkv()
    want = fmha.attention(*as_torch(q, k, v))
    same(fmha.attention(q, *as_torch(k), v), want)
    assert torch.equal(fmha.attention(*as_torch(q), k, v), want)


def test_varlen_and_masks_of_it():
    q, k, v = (x[0] for x in numpy_qkv(1, 50, 70))
    cu_q, cu_k = np.array([0, 20, 50], np.int32), np.array([0, 33, 70], np.int32)
    want = fmha.attention_varlen(*as_torch(q, k, v, cu_q, cu_k), 30, 37, causal=True)
    same(fmha.attention_varlen(q, k, v, cu_q, cu_k, 30, 37, causal=True), want)
    mask = np.random.default_rng(1).random((50, 37)) < 0.5
    want = fmha.attention_varlen(*as_torch(q, k, v, cu_q, cu_k), 30, 37, mask=torch.from_numpy(mask))
    same(fmha.attention_varlen(q, k, v, cu_q, cu_k, 30, 37, mask=mask), want)
    packed = fmha.pack_mask(mask, cu_seqlens_q=cu_q)
    same(fmha.attention_varlen(q, k, v, cu_q, cu_k, 30, 37, mask=packed), want)


def test_caches():
    q, k, v = numpy_qkv(2, 3, 48)
    want = fmha.attention_with_kvcache(*as_torch(q, k, v), cache_seqlens=31, causal=True)
    same(fmha.attention_with_kvcache(q, k, v, cache_seqlens=31, causal=True), want)
    pools = [x.reshape(6, 16, 2, 64) for x in (k, v)]
    table, lengths = np.arange(6, dtype=np.int32).reshape(2, 3), np.array([31, 31], np.int32)
    same(fmha.attention_with_kvcache(q, *pools, cache_seqlens=lengths, page_table=table, causal=True), want)


def test_merge_states():
    q, k, v = numpy_qkv()
    parts = [fmha.attention(q, k[:, c], v[:, c], return_lse=True) for c in (slice(0, 9), slice(9, None))]
    out, lse = fmha.merge_states(*zip(*parts, strict=True))
    want = fmha.merge_states(*([torch.from_numpy(x) for x in each] for each in zip(*parts, strict=True)))
    same(out, want[0])
    same(lse, want[1])


def test_what_cannot_be_seen_is_refused():
    q, k, v = numpy_qkv()

    class Closed:
        def __dlpack__(self, **_):
            raise BufferError("not today")

        def __dlpack_device__(self):
            return (1, 0)

    with pytest.raises(InputError, match=r"k, a .*Closed, cannot be seen.*not today"):
        fmha.attention(q, Closed(), v)
    with pytest.raises(InputError, match=r"q has dtype torch\.float32"):
        fmha.attention(q.astype(np.float32), k, v)
    Frozen = type("Array", (Closed,), {"__module__": "jaxlib._jax"})
    with pytest.raises(InputError, match="out is a jaxlib Array, which is immutable"):
        fmha.attention(q, k, v, out=Frozen())
    with pytest.raises(InputError, match="q is a list"):
        fmha.attention([1.0], k, v)


def test_a_library_without_from_dlpack():
    q, k, v = numpy_qkv()

    class Bare:
        def __init__(self, x):
            self.x = x

        def __dlpack__(self, **options):
            return self.x.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.x.__dlpack_device__()

    Bare.__module__ = "no_such_library"
    with pytest.raises(InputError, match="no from_dlpack for the result"):
        fmha.attention(Bare(q), k, v)
    assert torch.equal(fmha.attention(*as_torch(q), Bare(k), Bare(v)), fmha.attention(*as_torch(q, k, v)))


def test_no_argument_is_lost_on_the_way(monkeypatch):
    passed = []
    monkeypatch.setattr(arrays, "call", lambda function, arrays, stream: passed.append(set(arrays)))
    fmha.attention(*numpy_qkv())
    assert passed == [set(inspect.signature(route.run).parameters) - {"traced"}]
    q, k, v = numpy_qkv()
    monkeypatch.undo()
    with pytest.raises(InputError, match="tile"):
        fmha.attention(q, k, v, tile="no such tile", device="emulator")


@pytest.mark.emulator
def test_torch_calls_never_come_here(monkeypatch):
    q, k, v = as_torch(*numpy_qkv())
    fmha.attention(q, k, v, device="emulator")
    monkeypatch.setattr(arrays, "foreign", None)
    fmha.attention(q, k, v, device="emulator")


# ---- on a GPU


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setenv("FMHA_BUILD_ON_DEMAND", "1")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return [x.cuda() for x in as_torch(*numpy_qkv(2, 200, 300))]


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.gpu
def test_cupy(gpu):
    cupy = pytest.importorskip("cupy")
    want, want_lse = fmha.attention(*gpu, causal=True, return_lse=True)
    q, k, v = (cupy.from_dlpack(x) for x in gpu)
    out, lse = fmha.attention(q, k, v, causal=True, return_lse=True)
    assert isinstance(out, cupy.ndarray) and isinstance(lse, cupy.ndarray)
    assert torch.equal(torch.from_dlpack(out), want) and torch.equal(torch.from_dlpack(lse), want_lse)
    room = cupy.empty(out.shape, cupy.float16)
    address = room.data.ptr
    assert fmha.attention(q, k, v, causal=True, out=room) is room
    assert room.data.ptr == address and torch.equal(torch.from_dlpack(room), want)
    used = cupy.asarray([300, 7], dtype=cupy.int32)
    got = fmha.attention(q, k, v, seqused_k=used)
    assert torch.equal(torch.from_dlpack(got), fmha.attention(*gpu, seqused_k=torch.from_dlpack(used)))
    assert isinstance(fmha.attention_with_kvcache(q, k, v, cache_seqlens=100), cupy.ndarray)
    assert isinstance(fmha.attention(gpu[0], k, v), torch.Tensor)


@pytest.mark.gpu
@pytest.mark.parametrize("given", [False, True], ids=["result", "out="])
def test_streams_of_cupy_and_torch_are_ordered(gpu, given):
    """Slow producers on both sides: whoever forgets to wait reads what was there before."""
    cupy = pytest.importorskip("cupy")
    want = fmha.attention(*gpu)
    q, k, v = (cupy.from_dlpack(x) for x in gpu)
    late = cupy.zeros_like(q)
    room = cupy.zeros(q.shape, cupy.float16) if given else None
    cupy.cuda.Device().synchronize()
    torch.cuda.synchronize()
    theirs, ours = cupy.cuda.Stream(non_blocking=True), torch.cuda.Stream()
    with theirs:
        with torch.cuda.stream(torch.cuda.ExternalStream(theirs.ptr)):
            torch.cuda._sleep(50_000_000)
        late[...] = q
        with torch.cuda.stream(ours):
            torch.cuda._sleep(50_000_000)
            out = fmha.attention(late, k, v, out=room)
        copy = out.copy()  # on their stream: must come after our kernel
        late[...] = 0  # so must this
    theirs.synchronize()
    assert torch.equal(torch.from_dlpack(copy), want)
    torch.cuda.synchronize()
    assert torch.equal(torch.from_dlpack(out), want)


@pytest.mark.gpu
def test_cupy_with_an_explicit_stream(gpu):
    cupy = pytest.importorskip("cupy")
    want = fmha.attention(*gpu)
    q, k, v = (cupy.from_dlpack(x) for x in gpu)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
    out = fmha.attention(q, k, v, stream=side.cuda_stream)
    assert torch.equal(torch.from_dlpack(out.copy()), want)
    mask = cupy.tri(200, 300, 100, dtype=bool)
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
    out = fmha.attention(q, k, v, mask=mask, stream=side.cuda_stream)
    assert torch.equal(torch.from_dlpack(out.copy()), fmha.attention(*gpu, mask=torch.from_dlpack(mask)))


@pytest.mark.gpu
def test_cupy_on_the_second_gpu(gpu):
    cupy = pytest.importorskip("cupy")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    far = [x.to("cuda:1") for x in gpu]
    with torch.cuda.device(1):
        q, k, v = (cupy.from_dlpack(x) for x in far)
    out = fmha.attention(q, k, v)
    assert out.device.id == 1 and torch.cuda.current_device() == 0
    assert torch.equal(torch.from_dlpack(out), fmha.attention(*far))


@pytest.mark.gpu
def test_jax(gpu):
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("this jax has no GPU")
    jnp = jax.numpy
    half = [x.bfloat16() for x in gpu]
    want, want_lse = fmha.attention(*half, causal=True, return_lse=True)
    q, k, v = (jnp.asarray(x.float().cpu().numpy()).astype(jnp.bfloat16) for x in half)
    out, lse = fmha.attention(q, k, v, causal=True, return_lse=True)
    assert isinstance(out, jax.Array) and out.dtype == jnp.bfloat16 and isinstance(lse, jax.Array)
    assert error(torch.from_numpy(np.array(out.astype(jnp.float32))), want.cpu().float()) < 1e-6
    assert np.allclose(np.asarray(lse), want_lse.cpu().numpy(), atol=1e-4)
    for _ in range(20):  # JAX computes behind our back: producers and consumers of every call are still running
        big = jnp.ones((2048, 2048)) @ jnp.ones((2048, 2048))
        scaled = q * (big[0, 0] / 2048)
        got = fmha.attention(scaled.astype(jnp.bfloat16), k, v, causal=True)
        total = (got - out).astype(jnp.float32)
        assert float(jnp.abs(total).max()) == 0.0
    with pytest.raises(InputError, match="immutable"):
        fmha.attention(q, k, v, out=out)
    with pytest.raises(InputError):
        jax.jit(fmha.attention)(q, k, v)


@pytest.mark.gpu
def test_numba(gpu):
    cuda = pytest.importorskip("numba.cuda")
    want = fmha.attention(*gpu)
    q, k, v = (cuda.as_cuda_array(x) for x in gpu)
    out = fmha.attention(q, k, v)
    assert isinstance(out, torch.Tensor) and torch.equal(out, want)
    room = torch.zeros_like(want)
    theirs = cuda.as_cuda_array(room)
    assert fmha.attention(q, k, v, out=theirs) is theirs
    torch.cuda.synchronize()
    assert torch.equal(room, want)


@pytest.mark.gpu
def test_cuda_array_interface_alone(gpu):
    class Array:
        def __init__(self, tensor):
            self.tensor = tensor

        @property
        def __cuda_array_interface__(self):
            return {**self.tensor.__cuda_array_interface__, "version": 3, "stream": 1}

    want = fmha.attention(*gpu)
    out = fmha.attention(*(Array(x) for x in gpu))
    assert torch.equal(out, want)
    assert arrays.view("q", Array(gpu[0])).data_ptr() == gpu[0].data_ptr()

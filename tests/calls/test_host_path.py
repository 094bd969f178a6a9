# SPDX-License-Identifier: Apache-2.0
"""The short path of a warm call: what reaches the driver, what is still refused, and how little runs in between."""

from __future__ import annotations

import ctypes
import importlib
import runpy
import weakref
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from helpers import ROOT  # noqa: E402
from helpers.profiling import calls_of  # noqa: E402
from helpers.stub_device import QUEUE, STREAM, StubDevice  # noqa: E402

import fmha_runtime as fmha  # noqa: E402
from fmha_runtime.device import driver, tensor_map  # noqa: E402
from fmha_runtime.errors import DriverError  # noqa: E402
from fmha_runtime.kernels.forward import params  # noqa: E402
from fmha_runtime.kernels.spec import Arch  # noqa: E402
from fmha_runtime.ops.forward import plan as forward  # noqa: E402
from fmha_runtime.problem import tensors  # noqa: E402


@pytest.fixture
def stub(monkeypatch):
    return StubDevice(monkeypatch)


def qkv(b=1, s=128, h=8, d=128):
    return [torch.randn(b, s, h, d, dtype=torch.bfloat16) for _ in range(3)]


def addresses(block):
    """The addresses of a parameter block by name; null ones are left out."""
    block = block.tma.fwd if hasattr(block, "tma") else block
    names = [name for name, kind in params.FwdParams._fields_ if kind is ctypes.c_void_p]
    return {name: getattr(block, name) for name in names if getattr(block, name)}


def maps(block):
    return [tensor_map._EmulatedMap.from_buffer(m).address for m in (block.tma.q_map, block.tma.k_map, block.tma.v_map)]


def test_addresses_lie_first_in_the_order_in_which_they_are_written():
    fields = params.FwdParams._fields_
    names = [name for name, kind in fields if kind is ctypes.c_void_p]
    assert names == [name for name, _ in fields[:13]]
    block = params.FwdParams()
    params.write_all_addresses(block, 0, *range(1, 14))
    assert [getattr(block, name) for name in names] == list(range(1, 14))
    params.write_addresses(block, 0, *range(21, 29))
    assert [getattr(block, name) for name in names] == [*range(21, 29), *range(9, 14)]


@pytest.mark.parametrize("arch", [Arch.SM90, Arch.SM80])
def test_each_call_carries_its_own_addresses(monkeypatch, arch):
    stub = StubDevice(monkeypatch, arch)
    for return_lse in (True, False, True):
        q, k, v = qkv()
        got = fmha.attention(q, k, v, return_lse=return_lse)
        out, lse = got if return_lse else (got, None)
        want = {"q": q, "k": k, "v": v, "o": out} | ({"lse": lse} if return_lse else {})
        launch = stub.launches[-1]
        assert addresses(launch.block) == {name: t.data_ptr() for name, t in want.items()}
        if arch is Arch.SM90:
            assert maps(launch.block) == [t.data_ptr() for t in (q, k, v)]
        assert launch.stream == STREAM
        assert out.shape == (1, 128, 8, 128) and out.dtype is torch.bfloat16 and out.is_contiguous()
        assert lse is None or (lse.shape == (1, 8, 128) and lse.dtype is torch.float32 and lse.is_contiguous())


def test_optional_tensors_reach_their_fields(stub):
    q, k, v = qkv(b=2, s=64)
    used, sinks, slopes = torch.tensor([64, 5], dtype=torch.int32), torch.zeros(8), torch.ones(8)
    fmha.attention(q, k, v, seqused_k=used, sinks=sinks)
    got = addresses(stub.launches[-1].block)
    assert (got["seqused_k"], got["sinks"]) == (used.data_ptr(), sinks.data_ptr())
    assert not {"alibi_slopes", "mask", "page_table", "cu_seqlens_q", "lse"} & got.keys()
    fmha.attention(q, k, v, alibi_slopes=slopes)
    got = addresses(stub.launches[-1].block)
    assert got["alibi_slopes"] == slopes.data_ptr() and not {"sinks", "seqused_k"} & got.keys()
    mask = fmha.pack_mask(torch.ones(64, 64, dtype=torch.bool))
    fmha.attention(q, k, v, mask=mask)
    got = addresses(stub.launches[-1].block)
    assert (got["mask"], got["mask_any"]) == (mask.words.data_ptr(), mask.any.data_ptr())
    table = torch.tensor([[1], [0]], dtype=torch.int32)
    fmha.attention_with_kvcache(q, k, v, cache_seqlens=used, page_table=table)
    assert addresses(stub.launches[-1].block)["page_table"] == table.data_ptr()
    cu = torch.tensor([0, 4, 64], dtype=torch.int32)
    fmha.attention_varlen(q[0], k[0], v[0], cu, cu, 60, 60)
    got = addresses(stub.launches[-1].block)
    assert got["cu_seqlens_q"] == got["cu_seqlens_k"] == cu.data_ptr()


def test_a_driver_that_hides_the_address_is_asked_every_time(stub, monkeypatch):
    asked = []

    def replace(slot, address):
        asked.append(address)
        words = (ctypes.c_uint64 * 16).from_address(slot)
        words[0] = words[1] = address  # two words follow: none of them is "the address and nothing else"

    monkeypatch.setattr(tensor_map, "replace_address", replace)
    q, k, v = qkv()
    plan = fmha.plan(q, k, v)
    asked.clear()
    plan.run(q, k, v)
    assert asked == [t.data_ptr() for t in (q, k, v)]


def test_the_word_of_the_address_is_found_and_the_map_left_as_it_was():
    room = ctypes.create_string_buffer(128 + 64)
    slot = -(-ctypes.addressof(room) // 64) * 64
    layout = tensor_map.layout((1, 8, 1, 64), (512, 64, 64, 1), tensor_map.DType.BF16, 8, 64, tensor_map.Swizzle.B128)
    tensor_map.encode_emulated(layout, 0x123450, slot)
    before = ctypes.string_at(slot, 128)
    place = tensor_map.address_place(slot, tensor_map.replace_address_emulated)
    assert ctypes.string_at(slot, 128) == before
    word = ctypes.c_uint64.from_address(slot + 8 * place)
    assert word.value == 0x123450
    word.value = 0x555550
    assert tensor_map._EmulatedMap.from_address(slot).address == 0x555550

    def scrambled(slot, address):
        (ctypes.c_uint64 * 16).from_address(slot)[3] = address ^ 16

    def refused(slot, address):
        raise DriverError("no")

    assert tensor_map.address_place(slot, scrambled) is None
    assert tensor_map.address_place(slot, refused) is None


def test_another_current_device_is_left_as_it_was(stub):
    q, k, v = qkv()
    fmha.attention(q, k, v)
    stub.current = 1
    fmha.attention(q, k, v)
    assert stub.launches[-1].device == 0 and stub.launches[-1].stream == STREAM
    assert stub.current == 1


def test_a_thread_without_a_context_gets_one(stub):
    q, k, v = qkv()
    fmha.attention(q, k, v)
    stub.refusals.append(DriverError("no context", code=driver.INVALID_CONTEXT))
    fmha.attention(q, k, v)
    assert stub.bound == [0] and len(stub.launches) == 2
    stub.refusals.append(DriverError("out of memory", code=2))
    with pytest.raises(DriverError, match="out of memory"):
        fmha.attention(q, k, v)


def test_maps_are_encoded_in_a_context_which_only_a_thread_without_one_asks_for(stub):
    q, k, v = qkv()
    stub.encode_refusals.append(driver.INVALID_CONTEXT)
    for _ in range(3):
        fmha.attention(q, k, v)
    assert stub.bound == [0] and len(stub.launches) == 3
    stub.encode_refusals.append(1)
    with pytest.raises(DriverError, match="cuTensorMapEncodeTiled failed: CUresult 1"):
        fmha.attention(q, k[:, :5], v[:, :5])


def test_an_explicit_stream_is_taken(stub):
    q, k, v = qkv()
    fmha.attention(q, k, v, stream=7)
    assert stub.launches[-1].stream == 7


def test_a_queue_of_tiles_goes_with_the_stream(stub):
    q, k, v = qkv(b=64)  # more tiles than CTAs
    for stream in (5, 6):
        fmha.attention(q, k, v, stream=stream)
        assert stub.launches[-1].block.queue == QUEUE + 4 * stream
    fmha.attention(*qkv())
    assert not stub.launches[-1].block.queue


def other(t, kind):
    """A tensor that differs from t in one thing."""
    return {
        "shape": lambda: t[:, :64],
        "strides": lambda: t.transpose(1, 2).contiguous().transpose(1, 2),
        "dtype": lambda: t.half(),
        "device": lambda: t.to("meta"),
        "address": lambda: torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape),
    }[kind]()


@pytest.mark.parametrize("kind", ["shape", "strides", "dtype", "device", "address"])
@pytest.mark.parametrize("which", ["q", "k", "v", "out"])
def test_a_plan_refuses_what_it_was_not_made_for(stub, which, kind):
    given = dict(zip("qkv", qkv(), strict=True))
    given["out"] = torch.empty_like(given["q"])
    plan = fmha.plan(given["q"], given["k"], given["v"])
    plan.run(given["q"], given["k"], given["v"], out=given["out"])
    given[which] = other(given[which], kind)
    with pytest.raises(fmha.InputError, match=rf"^{which} (has|is|starts)"):
        plan.run(given["q"], given["k"], given["v"], out=given["out"])
    assert len(stub.launches) == 1


@pytest.mark.parametrize("kind", ["shape", "dtype", "address"])
@pytest.mark.parametrize("which", ["q", "k", "v", "out"])
def test_a_call_refuses_after_a_good_one(stub, which, kind):
    given = dict(zip("qkv", qkv(), strict=True))
    given["out"] = torch.empty_like(given["q"])
    fmha.attention(**given)
    given[which] = other(given[which], kind)
    with pytest.raises(fmha.InputError):
        fmha.attention(**given)
    assert len(stub.launches) == 1


def test_a_plan_wants_the_optional_tensors_that_it_was_made_with(stub):
    q, k, v = qkv()
    plan = fmha.plan(q, k, v, sinks=torch.zeros(8))
    plan.run(q, k, v, sinks=torch.ones(8))
    for wrong in ({}, {"sinks": torch.zeros(9)}, {"sinks": torch.zeros(8).half()}, {"alibi_slopes": torch.zeros(8)}):
        with pytest.raises(fmha.InputError, match=r"a plan is for one set of optional tensors.*sinks is"):
            plan.run(q, k, v, **wrong)


@pytest.mark.parametrize("which", ["q", "k", "v", "sinks", "alibi_slopes"])
def test_gradients_are_refused_by_calls_and_plans(stub, which):
    given = {**dict(zip("qkv", qkv(), strict=True)), "sinks": torch.zeros(8)}
    if which == "alibi_slopes":
        given |= {"alibi_slopes": torch.ones(8)}
    plan = fmha.plan(**given)
    given[which].requires_grad_()
    for run in (fmha.attention, plan.run):
        with pytest.raises(fmha.UnsupportedProblem, match="no backward"):
            run(**given)
        with torch.no_grad():
            run(**given)


GUARDED = hasattr(torch._C._dynamo.guards, "TensorGuards")
needs_guards = pytest.mark.skipif(not GUARDED, reason="this torch has no TensorGuards")


@needs_guards
def test_a_guard_knows_its_geometry_and_nothing_else():
    given = qkv()
    guard = tensors.guard(*given)
    assert guard(*given) and guard(*qkv())
    q, k, v = qkv()
    for kind in ("shape", "strides", "dtype", "device"):
        for i in range(3):
            assert not guard(*(other(t, kind) if i == j else t for j, t in enumerate((q, k, v)))), (kind, i)
    assert not guard(torch.as_strided(q, q.shape, (7, *q.stride()[1:])), k, v)  # the stride of an axis of length 1
    assert not guard(q.clone().requires_grad_(), k, v)
    assert not guard(torch.nn.Parameter(q, requires_grad=False), k, v)  # not known is no harm
    assert not guard(q, k, k)
    assert guard(q, k, v)
    v.resize_(1, 64, 8, 128)
    assert not guard(q, k, v)


@needs_guards
def test_a_guard_holds_in_the_mode_in_which_it_was_made_and_holds_no_tensor():
    given = qkv()
    plain = tensors.guard(*given)
    with torch.no_grad():
        assert plain(*given)
    with torch.inference_mode():
        inference = tensors.guard(*qkv())
        assert inference(*qkv()) and not inference(*given) and not plain(*given)
        assert tensors.guard(*given)(*given)
    assert not inference(*given) and plain(*given)
    gone = weakref.ref(given[0])
    del given
    assert gone() is None


def test_where_no_guard_can_be_had(monkeypatch):
    q, k, v = qkv()
    assert tensors.guard(q.clone().requires_grad_(), k, v) is tensors.no_guard
    assert tensors.guard(torch.nn.Parameter(q, requires_grad=False), k, v) is tensors.no_guard
    assert tensors.guard(q, k, k) is tensors.no_guard  # it wants three tensors
    for broken in (None, lambda *_, **__: 1 / 0, lambda *_, **__: SimpleNamespace(check=lambda *_: None)):
        monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", broken, raising=False)
        assert tensors.guard(q, k, v) is tensors.no_guard
    assert not tensors.no_guard(q, k, v)


@pytest.mark.parametrize("guards", [True, False])
def test_a_plan_takes_what_its_guard_does_not_know(stub, monkeypatch, guards):
    """Modes and kinds of tensors change; the plan goes by geometry, and stops making guards after a while."""
    made = []
    real = tensors.guard if guards else lambda *_: tensors.no_guard
    monkeypatch.setattr(tensors, "guard", lambda *given: made.append(given) or real(*given))
    q, k, v = qkv()
    plan = fmha.plan(q, k, v)
    for _ in range(3 * forward.GUARDS):
        plan.run(q, k, v)
        with torch.inference_mode():
            plan.run(*qkv())
        plan.run(torch.nn.Parameter(q, requires_grad=False), k, k)
    assert len(made) == forward.GUARDS and len(stub.launches) == 9 * forward.GUARDS
    for wrong in (q[:, :64], q.half(), q.transpose(1, 2).contiguous().transpose(1, 2)):
        with pytest.raises(fmha.InputError, match=r"^q has \(shape, strides, dtype, device\).*this plan was made for"):
            plan.run(wrong, k, v)
    with pytest.raises(fmha.UnsupportedProblem, match="no backward"):
        plan.run(q.requires_grad_(), k, v)


def test_a_guarded_tensor_may_change_in_place(stub):
    q, k, v = qkv()
    plan = fmha.plan(q, k, v)
    plan.run(q, k, v), plan.run(q, k, v)
    k.requires_grad_()
    with pytest.raises(fmha.UnsupportedProblem, match="no backward"):
        plan.run(q, k, v)
    k.requires_grad_(False)
    v.resize_(1, 64, 8, 128)
    with pytest.raises(fmha.InputError, match=r"^v has"):
        plan.run(q, k, v)
    assert len(stub.launches) == 2


def test_a_warm_call_stays_short(stub):
    """Not a time, which a busy machine would spoil: the number of functions that a warm call enters, five of the stub
    among them. It was 32 and 39; raise a limit only with a measurement (tools/host_time.py)."""
    q, k, v = qkv()
    plan = fmha.plan(q, k, v)
    for _ in range(3):  # the second call makes the guard that the third passes
        fmha.attention(q, k, v), plan.run(q, k, v)
    assert not GUARDED or calls_of(lambda: fmha.attention(q, k, v)) <= 28
    assert not GUARDED or calls_of(lambda: plan.run(q, k, v)) <= 21


def test_the_tool_that_measures_runs_every_caller(stub, monkeypatch):
    tool = runpy.run_path(str(ROOT / "tools" / "host_time.py"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    tool["measure"].__globals__.update(BATCHES=2, CALLS=3)
    found = tool["callers"](torch, "cpu")
    assert set(tool["GOALS"]) <= set(found)
    found.pop("compiled attention")  # inductor takes its time
    with torch.inference_mode():
        ready, absent = tool["prepare"](found, None)
        before = len(stub.launches)
        times = tool["measure"](torch, ready)
    assert set(absent) == {"SDPA plug-in", "SDPA cudnn", "SDPA efficient"}, absent
    ours = {"attention", "attention out=", "attention lse causal", "attention_varlen", "plan.run", "plan.run out="}
    assert set(times) >= ours | {"torch.ops.fmha.fwd", "SDPA flash", "SDPA math"}
    assert len(stub.launches) - before == (len(ours) + 1) * 2 * (3 + 1)


def test_the_tool_that_measures_new_lengths_runs_every_form(stub, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool = importlib.import_module("new_lengths")
    makers = dict(tool.callers(torch, "cpu"))
    assert set(makers) >= {
        "attention, dense",
        "attention, varlen",
        "attention, pages",
        "attention, packed",
        "SDPA flash",
    }
    for name, maker in makers.items():
        if name.startswith("attention"):
            before = len(stub.launches)
            row = tool._times(torch, maker, 20)
            assert len(stub.launches) - before == 5 + 2 * 20
            assert 0 < row["median_us"] <= row["p99_us"]
    assert "attention, dense" in "\n".join(tool.lines({"attention, dense": row}))

# SPDX-License-Identifier: Apache-2.0
"""The public calls on the emulator: same dispatch, same parameter block, numbers against the fp64 reference."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from helpers.numbers import REL_L2, qkv  # noqa: E402

import fmha_runtime as fmha  # noqa: E402
from fmha_runtime.ops.forward import reference  # noqa: E402

pytestmark = pytest.mark.emulator


def close(out, ref, dtype):
    return ((out.double() - ref).norm() / ref.norm()).item() < REL_L2[dtype]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (20, 3)},
        {"window": (None, 0)},
        {"window": [-1, 7]},
        {"causal": True, "window": (33, None)},
        {"scale": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("sq,sk", [(70, 131), (131, 70)])
def test_dense(options, sq, sk):
    q, k, v = qkv(2, sq, sk, 4, 2, 64)
    out, lse = fmha.attention(q, k, v, return_lse=True, device="emulator", **options)
    ref, ref_lse = reference.attention(q, k, v, **options)
    assert close(out, ref, q.dtype)
    assert torch.equal(lse.isinf(), ref_lse.isinf())
    assert (lse.double() - ref_lse).nan_to_num(0).abs().max() < 1e-3
    assert (out.transpose(1, 2)[ref_lse.isinf()] == 0).all()


@pytest.mark.parametrize("d,dv", [(40, 40), (104, 104), (192, 128)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_head_dims(d, dv, dtype):
    q, k, v = qkv(1, 67, 90, 2, 1, d, dv, dtype=dtype)
    out = fmha.attention(q, k, v, causal=True, device="emulator")
    assert out.shape == (1, 67, 2, dv)
    assert close(out, reference.attention(q, k, v, causal=True)[0], dtype)


def test_varlen_with_empty_sequences():
    lens_q, lens_k = [5, 0, 70, 3], [9, 4, 0, 130]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lens_q, lens_k))
    q, k, v = (t[0] for t in qkv(1, sum(lens_q), sum(lens_k), 4, 2, 32))
    v = torch.randn(sum(lens_k), 2, 32).to(q.dtype)
    out, lse = fmha.attention_varlen(q, k, v, cu_q, cu_k, 80, 130, causal=True, return_lse=True, device="emulator")
    ref, ref_lse = reference.attention_varlen(q, k, v, cu_q, cu_k, causal=True)
    assert lse.shape == (4, sum(lens_q))
    assert close(out, ref, q.dtype)
    assert (out[5:75] == 0).all() and lse[:, 5:75].isneginf().all()
    assert (lse.double() - ref_lse).nan_to_num(0).abs().max() < 1e-3


def test_seqused_hides_poisoned_padding():
    q, k, v = qkv(3, 40, 150, 2, 2, 48)
    used = torch.tensor([150, 37, 0], dtype=torch.int32)
    ref, _ = reference.attention(q, k, v, seqused_k=used)
    for b, n in enumerate(used.tolist()):
        k[b, n:] = v[b, n:] = float("nan")
    out = fmha.attention(q, k, v, seqused_k=used, device="emulator")
    assert close(out, ref, q.dtype)
    assert (out[2] == 0).all()


def test_strided_views_need_no_copy():
    packed = torch.randn(2, 60, 3, 4, 64).half()
    q, k, v = packed.unbind(2)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    plain = fmha.attention(*(t.contiguous() for t in (q, k, v)), device="emulator")
    assert torch.equal(fmha.attention(q, k, v, device="emulator"), plain)
    assert torch.equal(fmha.attention(*heads_first, device="emulator"), plain)


def test_out_is_written_in_place():
    q, k, v = qkv(1, 33, 33, 2, 2, 64)
    room = torch.full((1, 33, 2, 128), float("nan"), dtype=q.dtype)
    out = room[..., :64]
    assert fmha.attention(q, k, v, out=out, device="emulator") is out
    assert torch.equal(out, fmha.attention(q, k, v, device="emulator"))
    assert room[..., 64:].isnan().all()


def test_plan_runs_like_the_call_and_refuses_other_geometry():
    q, k, v = qkv(1, 50, 50, 2, 1, 64)
    plan = fmha.plan(q, k, v, causal=True, device="emulator")
    want = fmha.attention(q, k, v, causal=True, return_lse=True, device="emulator")
    for got, ref in zip(plan.run(q, k, v, return_lse=True), want, strict=True):
        assert torch.equal(got, ref)
    with pytest.raises(fmha.InputError, match="this plan was made for"):
        plan.run(q[:, :49], k, v)


def test_plan_wants_the_lengths_it_was_made_with():
    q, k, v = (t[0] for t in qkv(1, 30, 30, 2, 2, 32))
    cu = torch.tensor([0, 10, 30], dtype=torch.int32)
    plan = fmha.plan(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=20, max_seqlen_k=20, device="emulator")
    want = fmha.attention_varlen(q, k, v, cu, cu, 20, 20, device="emulator")
    assert torch.equal(plan.run(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu), want)
    with pytest.raises(fmha.InputError, match=r"cu_seqlens_q has .* None; this plan was made for"):
        plan.run(q, k, v)
    with pytest.raises(fmha.InputError, match="seqused_k has"):
        plan.run(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, seqused_k=cu[1:])


def test_debug_prints_a_line_before_each_launch(monkeypatch, capsys):
    monkeypatch.setenv("FMHA_DEBUG", "1")
    q, k, v = qkv(1, 9, 11, 1, 1, 32, seed=7)
    plan = fmha.plan(q, k, v, causal=True, scale=0.25, device="emulator")  # no call before had this scale
    plan.run(q, k, v)
    line = capsys.readouterr().err
    assert line.startswith("fmha: fmha_fwd_sm80_bf16_d32 tile") and "causal=True" in line


def test_hopper_kernels_on_the_emulator():
    for options in ({"causal": True}, {"window": (40, 9)}, {"softcap": 4.0}, {"sinks": torch.ones(4)}):
        q, k, v = qkv(2, 150, 210, 4, 2, 64)
        assert fmha.explain(q, k, v, device="emulator:sm90", **options).chosen.arch.value == "sm90a"
        out, lse = fmha.attention(q, k, v, device="emulator:sm90", return_lse=True, **options)
        want, want_lse = reference.attention(q, k, v, **options)
        assert close(out, want, q.dtype) and (lse - want_lse).abs().max() < 1e-3


@pytest.mark.parametrize(("d", "dv"), [(32, 32), (128, 128), (192, 128)])
def test_hopper_kernels_with_sequences_of_different_lengths_on_the_emulator(d, dv):
    lens_q, lens_k = [5, 0, 130, 33], [70, 9, 200, 0]
    q, k, v = (torch.randn(sum(lens), heads, width).to(torch.bfloat16) for lens, heads, width in (
        (lens_q, 2, d), (lens_k, 1, d), (lens_k, 1, dv)
    ))  # fmt: skip
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k))
    out, lse = fmha.attention_varlen(
        q, k, v, cu_q, cu_k, 130, 200, causal=True, return_lse=True, device="emulator:sm90"
    )  # fmt: skip
    want, want_lse = reference.attention_varlen(q, k, v, cu_q, cu_k, causal=True)
    assert close(out, want, q.dtype)
    empty = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty) and empty.any()
    assert (lse - want_lse)[~empty].abs().max() < 1e-3


def test_a_plan_serves_all_calls_of_a_geometry_and_options(monkeypatch):
    from fmha_runtime.calls import route
    from fmha_runtime.ops.forward.plan import Plan

    for name, fresh in (("_plans", {}), ("_bindings", {}), ("_seen", {}), ("_mine", route._Mine())):
        monkeypatch.setattr(route, name, fresh)
    aims, aim = [], Plan.aim
    monkeypatch.setattr(Plan, "aim", lambda self, *given: (aims.append(self), aim(self, *given))[1])
    q, k, v = qkv(1, 20, 20, 1, 1, 64)
    for _ in range(3):
        fmha.attention(q.clone(), k.clone(), v.clone(), device="emulator")
    assert len(aims) == len(route._bindings) == 1
    fmha.attention(q, k, v, causal=True, device="emulator")
    assert len(aims) == len(route._bindings) == 2
    fmha.attention(q, k[:, :7], v[:, :7], device="emulator")
    assert len(aims) == 3 and aims[2] is aims[0] and len(route._bindings) == 2, "the first plan was aimed again"


def test_cpu_tensors_take_the_reference_with_the_same_semantics():
    q, k, v = qkv(2, 33, 50, 4, 2, 64)
    for options in ({}, {"causal": True}, {"window": (5, 2)}):
        ours = fmha.attention(q, k, v, return_lse=True, device="emulator", **options)
        cpu = fmha.attention(q, k, v, return_lse=True, **options)
        assert cpu[0].dtype is q.dtype and cpu[1].dtype is torch.float32
        assert (ours[0].float() - cpu[0].float()).abs().max() < 2e-2
        assert (ours[1] - cpu[1]).abs().max() < 1e-3


def test_merge_states_of_a_split_is_the_whole():
    q, k, v = qkv(2, 17, 96, 4, 2, 64, dtype=torch.float16)
    whole, lse = fmha.attention(q, k, v, return_lse=True, device="emulator")
    cuts = [slice(0, 10), slice(10, 96)]
    parts = [fmha.attention(q, k[:, c], v[:, c], return_lse=True, device="emulator") for c in cuts]
    out, merged = fmha.merge_states([p[0] for p in parts], [p[1] for p in parts])
    assert (out.float() - whole.float()).abs().max() < 2e-3
    assert (merged - lse).abs().max() < 1e-4


def test_merge_states_of_empty_rows_stays_empty():
    out, lse = torch.zeros(1, 2, 1, 8), torch.full((1, 1, 2), -torch.inf)
    merged, total = fmha.merge_states([out, out], [lse, lse])
    assert (merged == 0).all() and total.isneginf().all()
    with pytest.raises(fmha.InputError, match="1 outs and 2 lses"):
        fmha.merge_states([out], [lse, lse])


def test_empty_tensors():
    q, k, v = qkv(2, 0, 5, 2, 2, 64)
    assert fmha.attention(q, k, v, device="emulator").shape == (2, 0, 2, 64)
    q, k, v = qkv(2, 5, 0, 2, 2, 64)
    out, lse = fmha.attention(q, k, v, return_lse=True, device="emulator")
    assert (out == 0).all() and lse.isneginf().all()


def test_every_option_changes_the_result():
    q, k, v = qkv(1, 48, 64, 2, 2, 64)
    base = fmha.attention(q, k, v, device="emulator")
    used = torch.tensor([40], dtype=torch.int32)
    for change in ({"causal": True}, {"window": (4, None)}, {"scale": 0.5}, {"seqused_k": used}):
        assert not torch.equal(fmha.attention(q, k, v, device="emulator", **change), base), change


def test_unsupported_runs_in_torch_only_when_asked():
    q, k, v = qkv(1, 8, 8, 2, 2, 60)
    with pytest.raises(fmha.UnsupportedProblem, match="60"):
        fmha.attention(q, k, v, device="emulator")
    out = fmha.attention(q, k, v, device="emulator", fallback="torch")
    assert (out.double() - reference.attention(q, k, v)[0]).abs().max() < 2e-2


def test_gradients_are_refused_not_detached():
    q, k, v = qkv(1, 8, 8, 2, 2, 64)
    q.requires_grad_()
    with pytest.raises(fmha.UnsupportedProblem, match="no backward"):
        fmha.attention(q, k, v, device="emulator")
    with torch.no_grad():
        fmha.attention(q, k, v, device="emulator")


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_no_keys_at_all(arch):
    q = torch.randn(1, 5, 2, 64).bfloat16()
    k = torch.empty(1, 0, 2, 64).bfloat16()
    out, lse = fmha.attention(q, k, k, return_lse=True, device=f"emulator:{arch}")
    assert (out == 0).all() and (lse == -torch.inf).all()

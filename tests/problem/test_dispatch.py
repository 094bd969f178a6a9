# SPDX-License-Identifier: Apache-2.0
"""Selection is exact, and every refusal says why: a table of problems and what must come of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from fmha_runtime.calls import api
from fmha_runtime.errors import InputError, UnsupportedProblem
from fmha_runtime.kernels import catalog
from fmha_runtime.kernels.spec import HEAD_DIMS, Arch, DType, KvLayout, Mask, Op, Score
from fmha_runtime.problem import dispatch
from fmha_runtime.problem.dispatch import Problem


def problem(**kw):
    base = {"arch": Arch.SM90, "dtype": DType.BF16, "head_dim": 128, "head_dim_v": 128}
    return Problem(**{**base, **kw})


@pytest.mark.parametrize("spec", catalog.enumerate_specs(), ids=str)
def test_every_row_is_chosen_for_its_own_problem(spec):
    device = Arch.for_capability(*spec.arch.capability)
    own = problem(
        op=spec.op, arch=device, dtype=spec.dtype, head_dim=spec.head_dim, head_dim_v=spec.head_dim_v,
        mask=spec.mask, score=spec.score, kv=spec.kv, seqlen_k=1 if spec.short else None,
    )  # fmt: skip
    if spec.op is Op.DECODE:
        own = replace(own, op=Op.FWD, seqlen_k=1000, seqlen_q=3 if spec.short else 60)
    found = dispatch.trace(own)
    if found.chosen != spec:  # only where another target of the same GPU is measured faster
        assert (found.chosen.arch, spec.arch) == (Arch.SM90A, Arch.SM90)
        assert (
            dict(found.rejected)[spec]
            == "computes the same; sm90a kernels come first on this GPU (measured from 512 tokens up)"
        )


SHORT, LONG = "fmha_fwd_sm90a_bf16_d64_short", "fmha_fwd_sm90a_bf16_d64"


def d64(**kw):
    return problem(**{"head_dim": 64, "head_dim_v": 64, "seqlen_q": 100, **kw})


@pytest.mark.parametrize(
    "change,name",
    [
        ({"seqlen_k": 0}, SHORT),
        ({"seqlen_k": 1024}, SHORT),
        ({"seqlen_k": 1025}, LONG),
        ({"seqlen_k": None}, LONG),
        ({"seqlen_k": 1024, "seqlen_q": 5000}, SHORT),
        ({"seqlen_k": 255, "seqlen_q": 1}, SHORT),
        ({"seqlen_k": 1025, "seqlen_q": 65}, LONG),
        ({"seqlen_k": 1024, "causal": True, "window": (None, 0)}, SHORT),
        ({"seqlen_k": 1024, "varlen": True, "batch": 9}, SHORT),
        ({"seqlen_k": 1025, "varlen": True, "batch": 9}, LONG),
        ({"seqlen_k": 1024, "heads": 32, "heads_k": 4}, SHORT),
        ({"seqlen_k": 1024, "arch": Arch.SM90A}, SHORT),
        ({"seqlen_k": 1025, "arch": Arch.SM90A}, LONG),
        ({"seqlen_k": 9, "score": Score.ALIBI}, f"{LONG}_alibi"),
        ({"seqlen_k": 9, "score": Score.SOFTCAP}, f"{LONG}_softcap"),
        ({"seqlen_k": 9, "mask": Mask.PACKED}, f"{LONG}_packed"),
        ({"seqlen_k": 9, "kv": KvLayout.PAGED}, f"{LONG}_paged"),
        ({"seqlen_k": 9, "arch": Arch.SM80}, "fmha_fwd_sm80_bf16_d64"),
        ({"seqlen_k": 9, "head_dim": 72, "head_dim_v": 72}, "fmha_fwd_sm90a_bf16_d72"),
        ({"seqlen_k": 9, "head_dim": 192, "head_dim_v": 128}, "fmha_fwd_sm90a_bf16_d192x128"),
    ],
    ids=str,
)
def test_short_rows_are_for_few_keys(change, name):
    assert dispatch.choose(d64(**change)).spec.name == name


def test_the_twin_that_was_passed_over_says_why():
    reasons = {spec.name: why for spec, why in dispatch.trace(d64(seqlen_k=1024)).rejected}
    assert reasons[LONG] == "computes the same; up to 1024 keys its short twin is faster"
    assert "sm90a kernels come first" in reasons["fmha_fwd_sm90_bf16_d64"]
    reasons = {spec.name: why for spec, why in dispatch.trace(d64(seqlen_k=1025)).rejected}
    assert reasons[SHORT] == "computes the same; is cut for up to 1024 keys"


def decoding(**kw):
    """More rows than decode kernels are for."""
    more = {"kv": KvLayout.PAGED, "batch": 64, "heads": 32, "heads_k": 8, "seqlen_q": 33, "seqlen_k": 2048}
    return d64(**{**more, **kw})


@pytest.mark.parametrize(
    "change,arch",
    [
        ({}, Arch.SM90),
        ({"seqlen_q": 64}, Arch.SM90),
        ({"seqlen_q": 65}, Arch.SM90A),
        ({"batch": 512, "heads": 4, "heads_k": 1}, Arch.SM90),
        ({"batch": 511, "heads": 4, "heads_k": 1}, Arch.SM90A),
        ({"score": Score.ALIBI}, Arch.SM90A),
        ({"mask": Mask.PACKED}, Arch.SM90A),
        ({"batch": 1}, Arch.SM90A),
        ({"seqlen_k": 16384}, Arch.SM90),
        ({"seqlen_k": 100}, Arch.SM90),
        ({"head_dim": 128, "head_dim_v": 128}, Arch.SM90A),
        ({"head_dim": 32, "head_dim_v": 32}, Arch.SM90A),
        ({"kv": KvLayout.CONTIGUOUS}, Arch.SM90A),
        ({"arch": Arch.SM90A}, Arch.SM90A),  # a device with one target, such as the emulator's
        ({"arch": Arch.SM80}, Arch.SM80),
    ],
    ids=str,
)
def test_decoding_in_large_batches_at_head_dim_64_is_for_mma_kernels(change, arch):
    assert dispatch.choose(decoding(**change)).spec.arch is arch


def decodes(**kw):
    return problem(**{"seqlen_k": 2048, "heads": 32, "heads_k": 8, **kw})


DECODE = "fmha_decode_sm90_bf16_d128"


@pytest.mark.parametrize(
    "change,name",
    [
        ({}, f"{DECODE}_short"),
        ({"seqlen_q": 4}, f"{DECODE}_short"),
        ({"seqlen_q": 5}, DECODE),
        ({"seqlen_q": 16}, DECODE),
        ({"seqlen_q": 33}, "fmha_fwd_sm90a_bf16_d128"),
        ({"seqlen_k": 768}, f"{DECODE}_short"),
        ({"seqlen_k": 767}, "fmha_fwd_sm90a_bf16_d128"),
        ({"seqlen_k": 256, "batch": 8}, f"{DECODE}_short"),
        ({"seqlen_k": 256, "batch": 7}, "fmha_fwd_sm90a_bf16_d128"),
        ({"seqlen_k": 255, "batch": 8}, "fmha_fwd_sm90a_bf16_d128"),
        ({"seqlen_q": 32, "batch": 16}, DECODE),
        ({"seqlen_q": 32, "batch": 17}, "fmha_fwd_sm90a_bf16_d128"),
        ({"seqlen_q": 128, "batch": 2, "seqlen_k": 16384}, DECODE),
        ({"seqlen_q": 128, "batch": 3, "seqlen_k": 16384}, "fmha_fwd_sm90a_bf16_d128"),
        ({"kv": KvLayout.PAGED, "page_size": 528, "seqlen_q": 5000}, f"{DECODE}_paged"),
        ({"kv": KvLayout.PAGED, "page_size": 1, "seqlen_k": 9}, f"{DECODE}_paged_short"),
        ({"kv": KvLayout.PAGED, "page_size": 64, "seqlen_q": 5000}, "fmha_fwd_sm90a_bf16_d128_paged"),
        ({"seqlen_k": None}, "fmha_fwd_sm90a_bf16_d128"),
        ({"heads": 8}, f"{DECODE}_short"),
        ({"heads": 64, "heads_k": 1}, DECODE),
        ({"heads": 128, "heads_k": 1}, DECODE),
        ({"score": Score.SOFTCAP}, f"{DECODE}_short"),
        ({"score": Score.ALIBI, "mask": Mask.PACKED}, f"{DECODE}_short"),
        ({"kv": KvLayout.PAGED, "seqlen_q": 7}, f"{DECODE}_paged"),
        ({"arch": Arch.SM89, "dtype": DType.FP16}, "fmha_decode_sm89_fp16_d128_short"),
        ({"arch": Arch.SM90A}, "fmha_fwd_sm90a_bf16_d128"),
    ],
    ids=str,
)
def test_few_queries_on_many_keys_are_for_decode_kernels(change, name):
    assert dispatch.choose(decodes(**change)).spec.name == name


def test_decode_kernels_say_why_and_why_not():
    reasons = {spec.name: why for spec, why in dispatch.trace(decodes()).rejected}
    assert reasons[DECODE] == "computes the same; its short twin is for up to 16 queries x heads of a KV head"
    assert "read K and V once for all query heads" in reasons["fmha_fwd_sm90a_bf16_d128"]
    reasons = {spec.name: why for spec, why in dispatch.trace(decodes(seqlen_q=500)).rejected}
    assert reasons[DECODE] == "is faster only for few queries on many keys"
    assert dispatch.choose(decodes(), "sm90a").spec.name == "fmha_fwd_sm90a_bf16_d128"
    assert dispatch.choose(decodes(), "sm90").spec.name == "fmha_fwd_sm90_bf16_d128"


def test_the_decode_preference_is_explained_and_can_be_overruled():
    found = dispatch.trace(decoding())
    name = f"{LONG}_paged"
    why = {spec.name: why for spec, why in found.rejected}[name]
    assert why.startswith("computes the same; sm90 kernels are faster with pages, head dim 64")
    assert dispatch.choose(decoding(), "sm90a").spec.name == name
    assert dispatch.choose(decoding(batch=1), "sm90").spec.name == name.replace("sm90a", "sm90")


def test_the_walk_is_remembered_whatever_the_lengths():
    dispatch._walk.cache_clear()
    for n in range(1, 3000, 7):
        dispatch.choose(d64(seqlen_k=n, seqlen_q=n, batch=n))
        dispatch.choose(decoding(seqlen_k=n, seqlen_q=n, batch=n))
    assert dispatch._walk.cache_info().currsize <= 6


def test_kernels_of_all_smaller_problems():
    few = ["fmha_decode_sm90_bf16_d64", "fmha_decode_sm90_bf16_d64_short"]
    assert [s.name for s in dispatch.kernels(d64())] == [LONG, SHORT]
    assert [s.name for s in dispatch.kernels(d64(seqlen_k=4096))] == [LONG, SHORT, *few]
    assert [s.name for s in dispatch.kernels(d64(seqlen_k=512))] == [SHORT]
    assert [s.name for s in dispatch.kernels(d64(seqlen_k=512, batch=256))] == [SHORT, *few]
    assert [s.name for s in dispatch.kernels(d64(seqlen_k=200))] == [SHORT]
    assert [s.name for s in dispatch.kernels(problem())] == ["fmha_fwd_sm90a_bf16_d128"]
    both = [(s.op, s.arch) for s in dispatch.kernels(decoding(seqlen_q=500))]
    assert set(both) == {(Op.FWD, Arch.SM90A), (Op.FWD, Arch.SM90), (Op.DECODE, Arch.SM90)}


def test_a_calls_key_count_is_the_bound_that_the_host_knows():
    torch = pytest.importorskip("torch")
    q, long = torch.zeros(2, 3, 4, 64).bfloat16(), torch.zeros(2, 1030, 2, 64).bfloat16()
    where = {"device": "emulator:sm90a"}
    few = torch.tensor([5, 6], dtype=torch.int32)
    assert api.explain(q, long, long, seqused_k=few, **where).chosen.name == LONG
    assert api.explain(q, long[:, :1024], long[:, :1024], causal=True, **where).chosen.name == SHORT
    tokens = long.flatten(0, 1)
    lengths = {
        "cu_seqlens_q": torch.tensor([0, 3, 6], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 1030, 2060], dtype=torch.int32),
        "max_seqlen_q": 3,
    }
    for bound, name in ((1024, SHORT), (1030, LONG)):
        found = api.explain(q.flatten(0, 1), tokens, tokens, max_seqlen_k=bound, **lengths, **where)
        assert found.chosen.name == name
    with pytest.raises(InputError, match="max_seqlen_k"):
        api.explain(q.flatten(0, 1), tokens, tokens, **lengths, **where)


def test_runtime_values_do_not_change_the_kernel():
    for change in ({"causal": True}, {"window": (5, 5)}, {"varlen": True}, {"heads": 8}, {"batch": 7}):
        assert dispatch.choose(problem(**change)).spec.name == "fmha_fwd_sm90a_bf16_d128"


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"head_dim": 60, "head_dim_v": 60}, r"Head dims on sm90 for bf16: .*40, .*192x128"),
        ({"head_dim": 128, "head_dim_v": 60}, "head dims"),
        ({"dtype": DType.E4M3, "head_dim": 59, "head_dim_v": 59}, "e4m3"),
    ],
    ids=str,
)
def test_refusals_name_what_exists(change, reason):
    with pytest.raises(UnsupportedProblem, match=reason) as caught:
        dispatch.choose(problem(**change))
    assert caught.value.nearest in {s.name for s in catalog.enumerate_specs()}
    assert caught.value.rejections


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
def test_features_are_never_dropped(dims):
    """Every combination of mask, score and pages, on every device, has its own kernel, in the catalogue or by name."""
    named = set()
    for arch in (Arch.SM80, Arch.SM86, Arch.SM89, Arch.SM90, Arch.SM120):
        for dtype, mask, score, kv in product((DType.FP16, DType.BF16), Mask, Score, KvLayout):
            wanted = {
                "dtype": dtype,
                "head_dim": dims[0],
                "head_dim_v": dims[1],
                "mask": mask,
                "score": score,
                "kv": kv,
            }
            chosen = dispatch.trace(problem(arch=arch, **wanted)).chosen
            assert chosen is not None and {name: getattr(chosen, name) for name in wanted} == wanted
            assert chosen.arch in arch.targets
            if not catalog.is_core(chosen):
                named.add((mask, score))
    gemma = {(Mask.PACKED, Score.SOFTCAP)} if dims in ((128, 128), (256, 256)) else set()
    assert named == {(Mask.PACKED, Score.SOFTCAP), (Mask.PACKED, Score.ALIBI)} - gemma


@pytest.mark.parametrize(
    "capability,arch",
    [
        ((7, 5), None), ((8, 0), Arch.SM80), ((8, 6), Arch.SM86), ((8, 7), Arch.SM86), ((8, 9), Arch.SM89),
        ((9, 0), Arch.SM90), ((10, 0), None), ((12, 0), Arch.SM120), ((12, 1), Arch.SM120),
    ],
)  # fmt: skip
def test_reach_of_a_cubin(capability, arch):
    assert Arch.for_capability(*capability) is arch


def test_trace_reads_like_an_explanation():
    text = str(dispatch.trace(problem(causal=True, seqlen_q=7, seqlen_k=9, heads=4, heads_k=2)))
    assert "fmha_fwd_sm90a_bf16_d128" in text
    assert "causal" in text and "7 x 9" in text and "4/2 heads" in text
    assert "is for sm80, device is sm90" in text
    assert problem().op is Op.FWD

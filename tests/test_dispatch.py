# SPDX-License-Identifier: Apache-2.0
"""Selection is exact, and every refusal says why: a table of problems and what must come of them."""

from __future__ import annotations

import pytest

from fmha_runtime import catalog, dispatch
from fmha_runtime.dispatch import Problem
from fmha_runtime.errors import UnsupportedProblem
from fmha_runtime.spec import Arch, DType, Mask, Op, Score


def problem(**kw):
    base = {"arch": Arch.SM90, "dtype": DType.BF16, "head_dim": 128, "head_dim_v": 128}
    return Problem(**{**base, **kw})


@pytest.mark.parametrize("spec", catalog.enumerate_specs(), ids=str)
def test_every_row_is_chosen_for_its_own_problem(spec):
    device = Arch.for_capability(*spec.arch.capability)
    own = problem(
        op=spec.op, arch=device, dtype=spec.dtype, head_dim=spec.head_dim, head_dim_v=spec.head_dim_v,
        mask=spec.mask, score=spec.score, kv=spec.kv,
    )  # fmt: skip
    found = dispatch.trace(own)
    if found.chosen != spec:  # only where another target of the same GPU is measured faster
        assert (found.chosen.arch, spec.arch) == (Arch.SM90A, Arch.SM90)
        assert (
            dict(found.rejected)[spec]
            == "computes the same; sm90a kernels come first on this GPU (measured from 512 tokens up)"
        )


def test_runtime_values_do_not_change_the_kernel():
    for change in ({"causal": True}, {"window": (5, 5)}, {"varlen": True}, {"heads": 8}, {"batch": 7}):
        assert dispatch.choose(problem(**change)).spec.name == "fmha_fwd_sm90a_bf16_d128"


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"head_dim": 56, "head_dim_v": 56}, r"Head dims on sm90 for bf16: .*40, .*192x128"),
        ({"head_dim": 128, "head_dim_v": 64}, "head dims"),
        ({"dtype": DType.E4M3, "head_dim": 59, "head_dim_v": 59}, "e4m3"),
    ],
    ids=str,
)
def test_refusals_name_what_exists(change, reason):
    with pytest.raises(UnsupportedProblem, match=reason) as caught:
        dispatch.choose(problem(**change))
    assert caught.value.nearest in {s.name for s in catalog.enumerate_specs()}
    assert caught.value.rejections


def test_features_are_never_dropped():
    for spec in catalog.enumerate_specs():
        for change in ({"mask": Mask.PACKED}, {"score": Score.SOFTCAP}, {"score": Score.ALIBI}):
            asked = problem(arch=spec.arch, dtype=spec.dtype, **change)
            chosen = dispatch.trace(asked).chosen
            if chosen is not None:
                assert (chosen.mask, chosen.score) == (asked.mask, asked.score)


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

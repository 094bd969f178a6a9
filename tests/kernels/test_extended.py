# SPDX-License-Identifier: Apache-2.0
"""Kernels outside the catalogue: any head dim in steps of 8 and any set of features, by name, and never by accident."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")

from click.testing import CliRunner  # noqa: E402
from helpers.numbers import close, qkv  # noqa: E402

import fmha_runtime as fmha  # noqa: E402
from fmha_runtime.cli.program import main  # noqa: E402
from fmha_runtime.errors import ExtendedKernelNotBuilt, KernelNotBuilt, UnsupportedProblem  # noqa: E402
from fmha_runtime.kernels import catalog  # noqa: E402
from fmha_runtime.kernels.spec import Arch, DType, KernelSpec, KvLayout, Mask, Op, Score  # noqa: E402
from fmha_runtime.ops import obtain  # noqa: E402
from fmha_runtime.ops.forward import reference  # noqa: E402
from fmha_runtime.problem import dispatch  # noqa: E402
from fmha_runtime.problem.dispatch import Problem  # noqa: E402

D112 = KernelSpec.parse("fmha_fwd_sm90a_bf16_d112")


def test_extended_kernels_exist_and_are_enumerated_nowhere():
    assert catalog.exists(D112) and not catalog.is_core(D112) and D112 not in catalog.enumerate_specs()
    assert all(catalog.is_core(spec) for spec in catalog.enumerate_specs())
    for name in ("sm90a_bf16_d100", "sm90a_bf16_d264", "sm90a_bf16_d4", "sm80_bf16_d24x200", "sm90a_e4m3_d112"):
        assert not catalog.exists(KernelSpec.parse(f"fmha_fwd_{name}")), name
    assert catalog.exists(KernelSpec.parse("fmha_fwd_sm90a_bf16_d24x200"))


def test_every_extended_kernel_has_a_tile_that_fits():
    rng = random.Random(5)
    for _ in range(400):
        d, dv = 8 * rng.randint(1, 32), 8 * rng.randint(1, 32)
        score, mask, kv = rng.choice(list(Score)), rng.choice(list(Mask)), rng.choice(list(KvLayout))
        spec = KernelSpec(Op.FWD, rng.choice(list(Arch)), DType.BF16, d, dv, mask, score, kv)
        assert KernelSpec.parse(spec.name) == spec
        if catalog.exists(spec):
            assert catalog.smem_bytes(spec, catalog.tile(spec)) <= spec.arch.smem_limit


def problem(d, dv=None, arch=Arch.SM90, **more):
    return Problem(arch, DType.BF16, d, dv or d, seqlen_q=100, seqlen_k=500, **more)


def test_dispatch_names_the_kernel_and_says_that_it_is_none_of_the_catalogue():
    found = dispatch.choose(problem(112))
    assert found.spec == D112
    assert "`fmha build fmha_fwd_sm90a_bf16_d112` builds it, nobody has verified it" in str(found.trace)
    both = dispatch.choose(problem(64, mask=Mask.PACKED, score=Score.SOFTCAP, kv=KvLayout.PAGED)).spec
    assert both.name == "fmha_fwd_sm90a_bf16_d64_packed_softcap_paged"
    assert dispatch.choose(problem(24, 200)).spec.name == "fmha_fwd_sm90a_bf16_d24x200"
    for given in (problem(100), problem(264), problem(24, 200, Arch.SM80)):
        with pytest.raises(UnsupportedProblem, match="no kernel computes this"):
            dispatch.choose(given)


def test_softcap_with_a_packed_mask_is_core_where_gemma_needs_it():
    for d in (128, 256):
        for arch in (Arch.SM80, Arch.SM90, Arch.SM120):
            assert catalog.is_core(dispatch.choose(problem(d, arch=arch, mask=Mask.PACKED, score=Score.SOFTCAP)).spec)


def test_one_that_is_not_built_is_refused_with_its_command(own_cache):
    with pytest.raises(ExtendedKernelNotBuilt, match=r"fmha_fwd_sm90a_bf16_d112 would.*fmha build") as caught:
        obtain.kernel(D112, device="cuda:0")
    assert isinstance(caught.value, KernelNotBuilt) and isinstance(caught.value, UnsupportedProblem)
    assert caught.value.command == "fmha build fmha_fwd_sm90a_bf16_d112"


def test_it_is_built_by_its_whole_name_and_may_spill(own_cache, fake_nvcc):
    fake_nvcc.write(spills=40)
    run = CliRunner().invoke(main, ["build", D112.name])
    assert run.exit_code == 0, run.output
    assert obtain.image(D112).spec == D112
    listed = CliRunner().invoke(main, ["list", D112.name])
    assert D112.name in listed.output and "unverified" in listed.output
    assert D112.name not in CliRunner().invoke(main, ["list", "fmha_fwd_sm90a_bf16_d1*"]).output


def test_it_is_built_on_demand(own_cache, fake_nvcc, monkeypatch):
    monkeypatch.setenv("FMHA_BUILD_ON_DEMAND", "1")
    assert obtain.image(D112).spec == D112


@pytest.mark.emulator
@pytest.mark.parametrize(
    "arch, d, dv, features",
    [
        ("sm80", 112, 112, ()),
        ("sm90", 112, 112, ()),
        ("sm90", 8, 8, ("causal",)),
        ("sm80", 8, 8, ("causal",)),
        ("sm90", 24, 200, ("causal",)),
        ("sm80", 56, 56, ("packed", "softcap")),
        ("sm90", 56, 40, ("packed", "alibi", "paged")),
        ("sm80", 248, 136, ("packed", "alibi", "paged")),
        ("sm90", 128, 128, ("packed", "softcap")),
        ("sm90", 256, 256, ("packed", "softcap", "paged")),
    ],
)
def test_they_compute_what_they_say(arch, d, dv, features):
    q, k, v = qkv(2, 70, 131, 4, 2, d, dv)
    options = {"causal": "causal" in features}
    if "packed" in features:
        options["mask"] = torch.rand(2, 4, 70, 131, generator=torch.Generator().manual_seed(1)) < 0.5
    if "softcap" in features:
        options["softcap"] = 5.0
    if "alibi" in features:
        options["alibi_slopes"] = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    want = reference.attention(q, k, v, **options)
    where = {"device": f"emulator:{arch}", "return_lse": True}
    if "paged" in features:
        pages = [torch.cat([t, t.new_zeros(2, 13, *t.shape[2:])], 1).reshape(18, 16, 2, -1) for t in (k, v)]
        table, used = torch.arange(18, dtype=torch.int32).view(2, 9), torch.full((2,), 131, dtype=torch.int32)
        got = fmha.attention_with_kvcache(q, *pages, cache_seqlens=used, page_table=table, **options, **where)
    else:
        got = fmha.attention(q, k, v, **options, **where)
    close(*got, *want)

# SPDX-License-Identifier: Apache-2.0
"""A caller can force a tile or a target: exactly that one runs, or the reason is said."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

import fmha_runtime
from fmha_runtime.calls import api
from fmha_runtime.device import counters, driver
from fmha_runtime.errors import BuildError, InputError, UnsupportedProblem
from fmha_runtime.kernels import catalog, forced_tile, store
from fmha_runtime.kernels.spec import Arch, DType, KernelSpec, Mask
from fmha_runtime.kernels.tile import Tile
from fmha_runtime.ops import obtain
from fmha_runtime.ops.forward import reference
from fmha_runtime.problem import dispatch
from fmha_runtime.problem.dispatch import Problem
from fmha_runtime.toolchain import build

HOPPER = KernelSpec.parse("fmha_fwd_sm90a_bf16_d128")
MMA = KernelSpec.parse("fmha_fwd_sm90_bf16_d128")
SMALL = KernelSpec.parse("fmha_fwd_sm80_fp16_d64")
PROBLEM = Problem(Arch.SM90, DType.BF16, 128, 128)


@pytest.mark.parametrize(
    ("spec", "text", "tile"),
    [
        (HOPPER, "128x176", "128x176 w12 s2 c1"),
        (HOPPER, "192x80", "192x80 w16 s2 c1"),
        (HOPPER, "128x64 s4", "128x64 w12 s4 c1"),
        (HOPPER, "128x64 w12 s3 c1", "128x64 w12 s3 c1"),
        (HOPPER, "128x64 c1", "128x64 w12 s2 c1"),
        (MMA, "128x64", "128x64 w4 s2 c2 q"),
        (MMA, "128x64 w8 s3 c1", "128x64 w8 s3 c1"),
        (MMA, "32x32", "32x32 w2 s2 c2 q"),
    ],
)
def test_what_is_left_out_comes_from_the_kernels_own_tile(
    monkeypatch: pytest.MonkeyPatch, spec: KernelSpec, text: str, tile: str
) -> None:
    own = {HOPPER: "128x128 w12 s2 c1", MMA: "64x64 w4 s2 c2 q"}
    monkeypatch.setattr(catalog, "tile", lambda spec: Tile.parse(own[spec]))
    assert str(forced_tile.parse(spec, text)) == tile


@pytest.mark.parametrize(
    ("spec", "text", "words"),
    [
        (HOPPER, "128", "not understood"),
        (HOPPER, "", "not understood"),
        (HOPPER, "128x176 w4 s2 c1", "64 rows a consumer"),
        (HOPPER, "96x64", "tile"),
        (HOPPER, "128x128 w12 s2 c1 q", "Q in shared memory"),
        (HOPPER, "128x256 s3", "shared memory"),
        (MMA, "128x64 w12 s2 c1", "m16"),
        (MMA, "64x24", "block_n"),
        (MMA, "512x512", "shared memory"),
    ],
)
def test_a_tile_that_cannot_be_is_refused(spec: KernelSpec, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        forced_tile.parse(spec, text)


def test_stages_that_are_left_out_are_no_more_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "tile", lambda spec: Tile.parse("128x64 w12 s4 c1"))
    assert forced_tile.parse(HOPPER, "128x64").stages == 4
    assert forced_tile.parse(HOPPER, "128x176").stages == 2
    with pytest.raises(InputError, match="shared memory"):
        forced_tile.parse(HOPPER, "128x176 s4")


def test_a_target_can_be_forced() -> None:
    assert dispatch.choose(PROBLEM).spec == HOPPER
    choice = dispatch.choose(PROBLEM, "sm90")
    assert (choice.spec, choice.tile) == (MMA, catalog.tile(MMA))
    assert choice.trace.rejected[0] == (HOPPER, "the caller forced sm90")
    assert MMA not in dict(choice.trace.rejected)
    choice = dispatch.choose(PROBLEM, "sm90 128x32 w4 s3 c2")
    assert (choice.spec, str(choice.tile)) == (MMA, "128x32 w4 s3 c2")
    assert dispatch.choose(PROBLEM, "sm90a 128x176").spec == HOPPER
    with pytest.raises(InputError, match="targets that compute this on sm90: sm90a, sm90"):
        dispatch.choose(PROBLEM, "sm80")
    with pytest.raises(UnsupportedProblem):
        dispatch.choose(Problem(Arch.SM90, DType.BF16, 20, 20), "128x64")


def test_a_forced_target_follows_the_same_rules_and_a_forced_tile_is_the_long_twins() -> None:
    few, many = (Problem(Arch.SM90, DType.BF16, 64, 64, seqlen_q=99, seqlen_k=n) for n in (1024, 1025))
    long = KernelSpec.parse("fmha_fwd_sm90a_bf16_d64")
    assert dispatch.choose(few, "sm90a").spec.name == "fmha_fwd_sm90a_bf16_d64_short"
    assert dispatch.choose(many, "sm90a").spec == long
    assert dispatch.choose(few, "sm90").spec.name == "fmha_fwd_sm90_bf16_d64"
    for text in ("128x64", "sm90a 128x64"):
        one, other = dispatch.choose(few, text), dispatch.choose(many, text)
        assert (one.spec, one.tile) == (other.spec, other.tile) == (long, forced_tile.parse(long, "128x64"))
        assert one.trace.rejected[0][1] == "the caller forced a tile" and one.trace.rejected[0][0].short
        assert long not in dict(one.trace.rejected)
    with pytest.raises(InputError, match="targets that compute this on sm90: sm90a, sm90"):
        dispatch.choose(few, "sm80")


def test_a_forced_target_needs_a_kernel() -> None:
    packed = Problem(Arch.SM80, DType.BF16, 128, 128, mask=Mask.PACKED)
    with pytest.raises(InputError, match="sm90a"):
        dispatch.choose(packed, "sm90a")


def test_explain_says_what_was_forced() -> None:
    trace = api.explain(PROBLEM, tile="128x176 s2")
    assert trace.forced == Tile.parse("128x176 w12 s2 c1")
    assert f"tile 128x176 w12 s2 c1 (forced; the catalogue says {catalog.tile(HOPPER)})" in str(trace)
    assert api.explain(PROBLEM).forced is None
    with pytest.raises(InputError, match="not understood"):
        api.explain(PROBLEM, tile="big")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()


@pytest.mark.emulator
def test_a_forced_tile_runs() -> None:
    q, k, v = random(1, 40, 2, 64), random(1, 70, 2, 64), random(1, 70, 2, 64)
    want = reference.attention(q, k, v, causal=True)[0]
    for tile in ("32x32 w2 s2 c1", "64x16 w4 s3 c1"):
        plan = api.plan(q, k, v, causal=True, device="emulator", tile=tile)
        assert str(plan.tile) == tile and plan.shape.heads == 2
        assert (plan.run(q, k, v) - want).norm() / want.norm() < 1e-3
        out = fmha_runtime.attention(q, k, v, causal=True, device="emulator", tile=tile)
        assert torch.equal(out, plan.run(q, k, v))
    plain = api.plan(q, k, v, causal=True, device="emulator")
    assert plain.tile == catalog.tile(plain.spec)


@pytest.mark.emulator
def test_a_plan_can_have_a_cta_for_each_tile() -> None:
    q = random(2, 300, 3, 64)
    plan = api.plan(q, q, q, device="emulator:sm90a", tile="128x64")
    few = plan.grid
    want = plan.run(q, q, q)
    plan.use_plain_grid()
    assert few < plan.grid == 3 * 2 * 3
    assert torch.equal(plan.run(q, q, q), want)


def test_the_torch_path_has_no_tiles() -> None:
    q = random(1, 8, 2, 64)
    with pytest.raises(InputError, match="emulator"):
        fmha_runtime.attention(q, q, q, tile="64x64")
    with pytest.raises(UnsupportedProblem):
        x = random(1, 8, 2, 20)
        fmha_runtime.attention(x, x, x, tile="64x64", device="emulator", fallback="torch")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the driver was given: image, name, device, bytes of shared memory, bytes of parameters, stream."""
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(driver, "load", lambda *arguments: given.append(arguments))
    monkeypatch.setattr(counters, "prepare", lambda device: None)
    return given


@pytest.mark.parametrize("text", ["64x32 w4 s2 c1", "128x64 w8 s2 c1", None])
def test_what_is_loaded_may_use_the_shared_memory_of_its_own_tile(own_cache, fake_nvcc, loaded, text) -> None:
    tile = forced_tile.parse(SMALL, text) if text else None
    if tile is None:
        build.build([SMALL])
    obtain.kernel(SMALL, device="cuda:3", tile=tile, stream=7)
    ((image, name, device, smem, size, stream),) = loaded
    cut = tile or catalog.tile(SMALL)
    assert (name, device, smem, stream) == (SMALL.name, 3, catalog.smem_bytes(SMALL, cut), 7)
    assert size == ctypes.sizeof(catalog.block(SMALL)) and SMALL.name.encode() in image
    others = {catalog.smem_bytes(SMALL, other) for other in (catalog.tile(SMALL), Tile.parse("64x32 w4 s2 c1"))}
    assert len(others) == 2, "the tiles of this test differ in shared memory"


def test_a_cubin_of_a_forced_tile_is_built_once(own_cache, fake_nvcc, loaded: list[tuple[Any, ...]]) -> None:
    tile = forced_tile.parse(SMALL, "64x32 w4 s2 c1")
    obtain.kernel(SMALL, tile=tile)
    obtain.kernel(SMALL, tile=tile)
    assert fake_nvcc.runs == 1 and len(loaded) == 2
    row = store.find_tile(SMALL, tile)
    assert row is not None and row.tile == tile
    assert store.find_tile(SMALL, Tile.parse("64x16 w4 s2 c1")) is None
    assert store.state(SMALL).word == "stale"  # dispatch never picks it unasked


def test_experiments_may_spill_and_the_catalogues_kernels_not(own_cache, fake_nvcc, loaded, monkeypatch) -> None:
    fake_nvcc.write(version=catalog.PROVEN_NVCC, spills=24)
    tile = forced_tile.parse(SMALL, "64x32 w4 s2 c1")
    obtain.kernel(SMALL, tile=tile)
    monkeypatch.setattr(catalog, "tile", lambda spec: tile)  # somebody makes it the catalogue's
    assert "spills" in store.state(SMALL).reason
    (result,) = build.build([SMALL])
    assert result.status == "failed"


def test_a_tile_that_does_not_compile_says_so(own_cache, fake_nvcc, loaded) -> None:
    fake_nvcc.write(failing="d64")
    with pytest.raises(BuildError, match="tile 64x32 w4 s2 c1 cannot be built"):
        obtain.kernel(SMALL, tile=Tile.parse("64x32 w4 s2 c1"))


@pytest.mark.gpu
def test_a_forced_tile_runs_on_the_gpu() -> None:
    q, k, v = (torch.randn(2, 300, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    want = fmha_runtime.attention(q, k, v, causal=True).float()
    for tile in ("128x64", "sm90", "sm90 128x32 w4 s2 c1"):
        if torch.cuda.get_device_capability()[0] != 9:
            pytest.skip("the tiles are Hopper's")
        out = fmha_runtime.attention(q, k, v, causal=True, tile=tile).float()
        assert (out - want).norm() / want.norm() < 1e-2

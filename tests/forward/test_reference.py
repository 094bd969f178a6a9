# SPDX-License-Identifier: Apache-2.0
"""The reference computes what docs/semantics.md says: everything else is measured against it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import fmha_runtime
from fmha_runtime.errors import InputError
from fmha_runtime.ops.forward import reference


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def problem(batch: int, sq: int, sk: int, heads: int, kv_heads: int, d: int, dv: int) -> Any:
    return (
        normal(batch, sq, heads, d),
        normal(batch, sk, kv_heads, d),
        normal(batch, sk, kv_heads, dv),
    )


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)


def drawing(sq: int, sk: int, **options: Any) -> list[str]:
    """Which keys each query weighs: with the identity as V, the output is the weights."""
    q, k = normal(1, sq, 1, 8), normal(1, sk, 1, 8)
    out, _ = reference.attention(q, k, torch.eye(sk).view(1, sk, 1, sk), **options)
    return ["".join("#" if w > 0 else "." for w in row) for row in out[0, :, 0].tolist()]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 8, 8), (2, 37, 53, 6, 2, 40, 24), (3, 19, 5, 8, 1, 72, 72)])
def test_full_attention_is_that_of_torch(shape: tuple[int, ...]) -> None:
    q, k, v = problem(*shape)
    out, _ = reference.attention(q, k, v)
    torch.testing.assert_close(out, sdpa(q, k, v), rtol=0, atol=1e-13)


def test_scale_is_that_of_torch() -> None:
    q, k, v = problem(1, 7, 9, 2, 2, 16, 16)
    out, _ = reference.attention(q, k, v, scale=0.7)
    torch.testing.assert_close(out, sdpa(q, k, v, scale=0.7), rtol=0, atol=1e-13)


def test_causal_is_aligned_to_the_bottom_right() -> None:
    assert drawing(2, 5, causal=True) == ["####.", "#####"]
    assert drawing(5, 2, causal=True) == ["..", "..", "..", "#.", "##"]


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((1, 0), ["##..", ".##.", "..##"]),
        ((0, 0), [".#..", "..#.", "...#"]),
        ((0, 2), [".###", "..##", "...#"]),
        ((None, 0), ["##..", "###.", "####"]),
        ((-1, 1), ["###.", "####", "####"]),
        ((1, -1), ["####", ".###", "..##"]),
        ((9, 9), ["####", "####", "####"]),
    ],
)
def test_a_window_is_inclusive(window: tuple[int | None, int | None], expected: list[str]) -> None:
    assert drawing(3, 4, window=window) == expected
    # The same with a fifth key that does not exist.
    used = torch.tensor([4])
    assert drawing(3, 5, window=window, seqused_k=used) == [f"{row}." for row in expected]


def test_causal_takes_the_right_side_of_a_window() -> None:
    assert drawing(3, 4, causal=True, window=(1, 7)) == drawing(3, 4, window=(1, 0))


def test_a_uniform_softmax_by_hand() -> None:
    q = torch.zeros(1, 2, 1, 8)
    v = torch.tensor([3.0, 5.0, 10.0]).view(1, 3, 1, 1)
    out, lse = reference.attention(q, normal(1, 3, 1, 8), v, causal=True)
    assert out.flatten().tolist() == pytest.approx([4.0, 6.0])
    assert lse.flatten().tolist() == pytest.approx([math.log(2), math.log(3)])


def test_lse_is_the_natural_logarithm_of_the_sum() -> None:
    q, k, v = problem(2, 4, 6, 4, 2, 8, 8)
    _, lse = reference.attention(q, k, v, scale=0.5)
    score = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 0.5
    torch.testing.assert_close(lse, score.logsumexp(-1), rtol=0, atol=1e-12)


def test_rows_that_see_no_key_are_zero_and_minus_infinity() -> None:
    q, k, v = problem(1, 5, 2, 3, 1, 8, 8)
    out, lse = reference.attention(q, k, v, causal=True)
    assert torch.equal(out[:, :3], torch.zeros(1, 3, 3, 8, dtype=out.dtype))
    assert (lse[..., :3] == -math.inf).all() and lse[..., 3:].isfinite().all()
    for empty in (k[:, :0], k.new_zeros(1, 0, 1, 8)):
        out, lse = reference.attention(q, empty, v[:, :0])
        assert not out.any() and (lse == -math.inf).all()


def test_alibi_is_a_bias_by_distance_to_the_diagonal() -> None:
    q, k, v = problem(2, 3, 5, 4, 2, 8, 8)
    distance = (torch.arange(3)[:, None] + 2 - torch.arange(5)).abs()
    for slopes in (torch.rand(4), torch.rand(2, 4)):
        bias = -slopes.double().expand(2, 4)[:, :, None, None] * distance
        out, _ = reference.attention(q, k, v, alibi_slopes=slopes)
        torch.testing.assert_close(out, sdpa(q, k, v, attn_mask=bias), rtol=0, atol=1e-7)


def test_softcap_bends_the_scaled_score() -> None:
    q, k, v = problem(1, 3, 4, 1, 1, 8, 8)
    score = 3 * torch.tanh(torch.einsum("bihd,bjhd->bhij", q, k) * 0.9 / 3)
    want = torch.einsum("bhij,bjhd->bihd", score.softmax(-1), v)
    out, lse = reference.attention(q, k, v, scale=0.9, softcap=3.0)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, score.logsumexp(-1), rtol=0, atol=1e-13)


def test_keys_that_do_not_exist_may_be_nan() -> None:
    q, k, v = problem(3, 4, 9, 2, 1, 8, 8)
    used = torch.tensor([9, 0, 5], dtype=torch.int32)
    want = [reference.attention(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], causal=True)
            for b, n in enumerate(used.tolist())]  # fmt: skip
    for b, n in enumerate(used.tolist()):
        k[b, n:] = v[b, n:] = math.nan
    out, lse = reference.attention(q, k, v, causal=True, seqused_k=used)
    assert torch.equal(out, torch.cat([o for o, _ in want]))
    assert torch.equal(lse, torch.cat([x for _, x in want]))


@pytest.mark.parametrize("used", [None, (2, 0, 0, 4)])
def test_varlen_is_each_sequence_by_itself(used: tuple[int, ...] | None) -> None:
    lens_q, lens_k = (3, 0, 2, 5), (4, 3, 0, 5)
    q, k, v = normal(12, 4, 8), normal(14, 2, 8), normal(14, 2, 16)
    k[12:] = v[12:] = math.nan
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k))
    out, lse = reference.attention_varlen(
        *(q, k, v, cu_q, cu_k),
        window=(2, 1),
        seqused_k=None if used is None else torch.tensor(used),
    )
    for b in range(4):
        i = slice(cu_q[b], cu_q[b + 1])
        j = slice(cu_k[b], cu_k[b + 1] if used is None else cu_k[b] + used[b])
        one, one_lse = reference.attention(q[None, i], k[None, j], v[None, j], window=(2, 1))
        assert torch.equal(out[i], one[0]) and torch.equal(lse[:, i], one_lse[0])
    assert not out[10:].any() and (lse[:, 10:] == -math.inf).all()


def test_rows_in_blocks_are_the_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = problem(2, 50, 70, 4, 2, 8, 8)
    whole = reference.attention(q, k, v, window=(20, 3))
    monkeypatch.setattr(reference, "_MAX_SCORES", 4 * 70 * 7)
    for block, want in zip(reference.attention(q, k, v, window=(20, 3)), whole, strict=True):
        torch.testing.assert_close(block, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_baseline_is_honest_low_precision(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in problem(2, 60, 90, 4, 2, 64, 64))
    want, want_lse = reference.attention(q, k, v, causal=True)
    out, lse = reference.baseline(q, k, v, causal=True)
    assert out.dtype is dtype and lse.dtype is torch.float32
    rel_l2 = float((out.double() - want).norm() / want.norm())
    rounding = torch.finfo(dtype).eps / 2
    assert rounding / 4 < rel_l2 < 3 * rounding
    assert float((lse - want_lse).abs().max()) < 8 * rounding


@pytest.mark.parametrize("window", [(1,), (-2, 0), (1, 2, 3)])
def test_a_malformed_window_is_refused(window: Any) -> None:
    q, k, v = problem(1, 2, 2, 1, 1, 8, 8)
    with pytest.raises(InputError, match="window"):
        reference.attention(q, k, v, window=window)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_splits_of_the_keys_merge_to_the_whole(data: st.DataObject) -> None:
    sk = data.draw(st.integers(1, 24))
    cuts = data.draw(st.lists(st.integers(0, sk), min_size=1, max_size=4))
    q, k, v = problem(2, data.draw(st.integers(1, 5)), sk, 4, 2, 8, 8)
    bounds = sorted({0, sk, *cuts})
    parts = [reference.attention(q, k[:, i:j], v[:, i:j]) for i, j in itertools.pairwise(bounds)]
    nothing = reference.attention(q, k[:, :0], v[:, :0])
    outs, lses = zip(*parts, nothing, strict=True)
    out, lse = fmha_runtime.merge_states([o.float() for o in outs], [x.float() for x in lses])
    whole, whole_lse = reference.attention(q, k, v)
    torch.testing.assert_close(out.double(), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), whole_lse, rtol=0, atol=1e-5)

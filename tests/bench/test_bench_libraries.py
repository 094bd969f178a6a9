# SPDX-License-Identifier: Apache-2.0
"""Adapters of other libraries: stand-ins with the documented signatures compute what they are asked for, so an argument
that an adapter drops or confuses shows as a wrong result."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fmha_runtime.bench import cells as bench_cells
from fmha_runtime.bench import libraries as bench_libraries
from fmha_runtime.bench import peers as bench_peers
from fmha_runtime.bench import run as bencher
from fmha_runtime.bench.cells import Cell
from fmha_runtime.bench.provider import Absent
from fmha_runtime.kernels.spec import DType
from fmha_runtime.ops.forward.reference import attention, attention_varlen

SMALL = Cell(DType.FP16, 64, 64, 32, True)
CELLS = {
    "plain": SMALL,
    "full": replace(SMALL, causal=False),
    "softcap": replace(SMALL, softcap=30.0),
    "ALiBi": replace(SMALL, alibi=True),
    "window": replace(SMALL, window=(7, 0)),
    "window of full": replace(SMALL, window=(7, 3), causal=False),
    "packed": replace(SMALL, packed=True),
    "varlen": replace(SMALL, lengths=(32, 5, 27)),
    "varlen full": replace(SMALL, lengths=(32, 5, 27), causal=False),
    "paged": replace(SMALL, page_size=8, queries=16),
    "GQA": replace(SMALL, grouped=(4, 2)),
    "varlen GQA": replace(SMALL, lengths=(32, 5, 27), grouped=(4, 2)),
    "paged GQA": replace(SMALL, page_size=8, queries=16, grouped=(4, 2)),
    "big pages": replace(SMALL, page_size=256, seqlen=512, queries=16, grouped=(4, 2)),
}
RUNS = {
    "flash_attn": set(CELLS) - {"packed", "paged", "paged GQA"},
    "flash_attn_3": set(CELLS) - {"packed", "ALiBi"},
    "flash_attn_4": set(CELLS) - {"packed", "ALiBi"},
    "flashinfer": set(CELLS) - {"packed", "window of full"},
    "xformers": {"plain", "full", "window", "window of full", "varlen", "varlen full", "GQA", "varlen GQA"},
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cells, "TOKENS", 64)
    monkeypatch.setattr(bench_cells, "WIDTH", 128)
    monkeypatch.setattr(bench_libraries, "_FLASHINFER_WORKSPACE", 16)
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def half(out: Tensor) -> Tensor:
    return out.half()


def sides(window: tuple[int | None, int | None]) -> tuple[int | None, int | None]:
    left, right = (None if x in (-1, None) else x for x in window)
    return left, right


def fa2(q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
        window_size: Any = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None) -> Any:  # fmt: skip
    options = {"window": sides(window_size), "softcap": softcap, "alibi_slopes": alibi_slopes}
    return half(attention(q, k, v, causal=causal, **options)[0])


def fa2_varlen(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
               dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False, window_size: Any = (-1, -1),
               softcap: float = 0.0, alibi_slopes: Any = None) -> Any:  # fmt: skip
    assert max_seqlen_q == max_seqlen_k == 32
    options = {"window": sides(window_size), "softcap": softcap, "alibi_slopes": alibi_slopes}
    return half(attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, **options)[0])


def fa2_cache(q: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None, rotary_cos: Any = None,
              rotary_sin: Any = None, cache_seqlens: Any = None, cache_batch_idx: Any = None,
              cache_leftpad: Any = None, block_table: Any = None, softmax_scale: Any = None, causal: bool = False,
              window_size: Any = (-1, -1), softcap: float = 0.0) -> Any:  # fmt: skip
    assert k_cache.shape[1] % 256 == 0
    options = {"seqused_k": cache_seqlens, "page_table": block_table, "softcap": softcap}
    return half(attention(q, k_cache, v_cache, causal=causal, window=sides(window_size), **options)[0])


def fa3(q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: bool = False, qv: Any = None, q_descale: Any = None,
        k_descale: Any = None, v_descale: Any = None, window_size: Any = (-1, -1), attention_chunk: int = 0,
        softcap: float = 0.0) -> Any:  # fmt: skip
    assert all(isinstance(side, int) for side in window_size)
    return half(attention(q, k, v, causal=causal, window=sides(window_size), softcap=softcap)[0]), "lse"


def fa3_varlen(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
               seqused_q: Any = None, seqused_k: Any = None, softmax_scale: Any = None, causal: bool = False,
               window_size: Any = (-1, -1), softcap: float = 0.0) -> Any:  # fmt: skip
    return half(attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, softcap=softcap)[0])


def fa3_cache(q: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None, qv: Any = None,
              rotary_cos: Any = None, rotary_sin: Any = None, cache_seqlens: Any = None, page_table: Any = None,
              causal: bool = False, window_size: Any = (-1, -1), softcap: float = 0.0) -> Any:  # fmt: skip
    options = {"seqused_k": cache_seqlens, "page_table": page_table, "softcap": softcap}
    return half(attention(q, k_cache, v_cache, causal=causal, window=sides(window_size), **options)[0])


def fa4(q: Any, k: Any, v: Any, qv: Any = None, gather_kv_indices: Any = None, softmax_scale: Any = None,
        causal: bool = False, window_size: Any = (None, None), learnable_sink: Any = None,
        softcap: float = 0.0) -> Any:  # fmt: skip
    assert -1 not in window_size
    return half(attention(q, k, v, causal=causal, window=window_size, softcap=softcap)[0]), None


def fa4_varlen(q: Any, k: Any, v: Any, *, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
               max_seqlen_q: Any = None, max_seqlen_k: Any = None, seqused_k: Any = None, page_table: Any = None,
               causal: bool = False, window_size: Any = (None, None), softcap: float = 0.0) -> Any:  # fmt: skip
    if page_table is not None:
        return half(attention(q, k, v, causal=causal, seqused_k=seqused_k, page_table=page_table)[0]), None
    return half(attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, softcap=softcap)[0]), None


class Wrapper:
    """FlashInfer's batch wrappers: plan, then run on [T, H, D]."""

    def __init__(self, workspace: Tensor, layout: str) -> None:
        assert layout == "NHD" and workspace.dtype is torch.uint8

    def _common(self, causal: bool, pos_encoding_mode: str, window_left: int, logits_soft_cap: Any, heads: int) -> None:
        slopes = bench_cells.alibi_slopes(heads) if pos_encoding_mode == "ALIBI" else None
        self.options: dict[str, Any] = {"causal": causal, "softcap": logits_soft_cap or 0.0, "alibi_slopes": slopes}
        self.options["window"] = sides((window_left, -1))


class Ragged(Wrapper):
    def plan(self, qo_indptr: Tensor, kv_indptr: Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int,
             head_dim_vo: Any = None, custom_mask: Any = None, packed_custom_mask: Any = None, causal: bool = False,
             pos_encoding_mode: str = "NONE", use_fp16_qk_reduction: bool = False, window_left: int = -1,
             logits_soft_cap: Any = None, sm_scale: Any = None, rope_scale: Any = None, rope_theta: Any = None,
             q_data_type: Any = "float16", kv_data_type: Any = None) -> None:  # fmt: skip
        assert q_data_type is kv_data_type is torch.float16
        self._common(causal, pos_encoding_mode, window_left, logits_soft_cap, num_qo_heads)
        self.at = (qo_indptr, kv_indptr)
        self.shape = (num_qo_heads, num_kv_heads, head_dim_qk)

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert (q.shape[1], k.shape[1], q.shape[2]) == self.shape
        return half(attention_varlen(q, k, v, *self.at, **self.options)[0])


class Paged(Wrapper):
    def plan(self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
             num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, head_dim_vo: Any = None,
             custom_mask: Any = None, packed_custom_mask: Any = None, causal: bool = False,
             pos_encoding_mode: str = "NONE", use_fp16_qk_reduction: bool = False, sm_scale: Any = None,
             window_left: int = -1, logits_soft_cap: Any = None, rope_scale: Any = None, rope_theta: Any = None,
             q_data_type: Any = "float16", kv_data_type: Any = None) -> None:  # fmt: skip
        self._common(causal, pos_encoding_mode, window_left, logits_soft_cap, num_qo_heads)
        self.starts, batch = qo_indptr, qo_indptr.numel() - 1
        self.table = paged_kv_indices.view(batch, -1)
        full = (paged_kv_indptr[1:] - paged_kv_indptr[:-1] - 1) * page_size
        self.used = (full + paged_kv_last_page_len).int()

    def run(self, q: Tensor, pool: tuple[Tensor, Tensor]) -> Tensor:
        used = {"seqused_k": self.used, "page_table": self.table}
        return half(attention_varlen(q, *pool, self.starts, None, **used, **self.options)[0])


class Bias:
    """xFormers' masks, as options of the reference."""

    def __init__(self, lengths: Any = None, **options: Any) -> None:
        self.lengths, self.options = lengths, options


def xformers_attention(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None) -> Tensor:
    options = attn_bias.options if attn_bias else {}
    q, k, v = query, key, value
    if q.ndim == 5:
        q, k, v = q.flatten(2, 3), k[:, :, :, 0], v[:, :, :, 0]
    if attn_bias and attn_bias.lengths:
        starts = torch.tensor([0, *attn_bias.lengths], dtype=torch.int32).cumsum(0).int()
        out = attention_varlen(q[0], k[0], v[0], starts, starts, **options)[0][None]
    else:
        out = attention(q, k, v, **options)[0]
    return half(out).view(*query.shape[:-1], v.shape[-1])


def modules() -> dict[str, ModuleType]:
    def module(name: str, **content: Any) -> ModuleType:
        made = ModuleType(name)
        vars(made).update(content)
        return made

    def block(causal: bool) -> Any:
        return SimpleNamespace(from_seqlens=lambda lengths: Bias(lengths, causal=causal))

    biases = module(
        "xformers.ops.fmha.attn_bias",
        LowerTriangularMask=lambda: Bias(causal=True),
        LocalAttentionFromBottomRightMask=lambda window_left, window_right: Bias(window=(window_left, window_right)),
        BlockDiagonalMask=block(False),
        BlockDiagonalCausalMask=block(True),
    )
    cute = module("flash_attn.cute", flash_attn_func=fa4, flash_attn_varlen_func=fa4_varlen)
    return {
        "flash_attn": module(
            "flash_attn",
            flash_attn_func=fa2,
            flash_attn_varlen_func=fa2_varlen,
            flash_attn_with_kvcache=fa2_cache,
            cute=cute,
        ),
        "flash_attn.cute": cute,
        "flash_attn_interface": module(
            "flash_attn_interface",
            flash_attn_func=fa3,
            flash_attn_varlen_func=fa3_varlen,
            flash_attn_with_kvcache=fa3_cache,
        ),
        "flashinfer": module(
            "flashinfer", BatchPrefillWithRaggedKVCacheWrapper=Ragged, BatchPrefillWithPagedKVCacheWrapper=Paged
        ),
        "xformers": module("xformers"),
        "xformers.ops": module("xformers.ops", memory_efficient_attention_forward=xformers_attention),
        "xformers.ops.fmha": module("xformers.ops.fmha"),
        "xformers.ops.fmha.attn_bias": biases,
    }


def test_everyone_that_can_be_imported_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found, missing = bench_peers.find(["all"])
    assert found == (*bench_peers.SDPA, "flex", *RUNS) and not missing
    monkeypatch.setitem(sys.modules, "flashinfer", None)  # as if it were not installed
    found, missing = bench_peers.find(["flashinfer", "xformers"])
    assert found == ("xformers",) and "cannot import flashinfer" in missing["flashinfer"]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("feature", CELLS)
def test_an_adapter_asks_for_the_cell_or_says_why_not(name: str, feature: str) -> None:
    cell = CELLS[feature]
    x = bench_cells.inputs(cell, "cpu")
    if feature not in RUNS[name]:
        with pytest.raises(Absent) as refusal:
            bench_peers.prepare(name, cell, x)
        assert len(str(refusal.value)) > 20
        return
    runnable = bench_peers.prepare(name, cell, x)
    out = runnable.output(runnable.call())
    assert out.shape == x.q.shape
    ends = {(0, 0), (cell.batch - 1, cell.heads - 1)}
    for b, h in ends:
        assert bencher._distance(bencher._part(cell, out, b, h), bencher._reference(cell, x, b, h)) < 1e-3


def test_two_head_dims_are_refused_where_they_cannot_run() -> None:
    cell = replace(SMALL, head_dim=192, head_dim_v=128, grouped=(2, 2))
    x = bench_cells.inputs(cell, "cpu")
    for name in ("flash_attn", "flashinfer"):
        with pytest.raises(Absent, match="two head dims"):
            bench_peers.prepare(name, cell, x)
    runnable = bench_peers.prepare("xformers", cell, x)
    assert runnable.output(runnable.call()).shape == (*x.q.shape[:-1], 128)
    with pytest.raises(Absent, match="64, 128, 256"):
        bench_peers.prepare("flashinfer", replace(SMALL, head_dim=80, head_dim_v=80), x)


def test_a_library_is_held_against_ours_like_torch() -> None:
    x = bench_cells.inputs(SMALL, "cpu")
    runnable = bench_peers.prepare("flash_attn_3", SMALL, x)
    out = runnable.output(runnable.call())
    assert bencher.wrong(SMALL, x, {"ours": out, "flash_attn_3": out}) == {}
    assert list(bencher.wrong(SMALL, x, {"ours": out, "flash_attn_3": out * 1.1})) == ["flash_attn_3"]

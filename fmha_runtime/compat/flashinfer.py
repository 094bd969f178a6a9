# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's wrappers for paged caches on this library: ``plan`` once a step, ``run`` once a layer.

Pages are named in the CSR form: those of sequence b are ``indices[indptr[b]:indptr[b + 1]]``, the last of which holds
``last_page_len[b]`` tokens. ``plan`` makes a page table of them and reads the longest sequence on the host, as
FlashInfer's does. Log-sum-exps are to base 2, ``[tokens, heads]``, as there.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from ..calls.api import attention_with_kvcache
from ..errors import InputError, UnsupportedProblem
from ..ops.append.appender import append_kv

if TYPE_CHECKING:
    import torch

LAYOUTS = ("NHD", "HND")
_HINTS = (
    "backend", "data_type", "disable_split_kv", "fixed_split_size", "jit_args", "kv_data_type", "non_blocking",
    "o_data_type", "q_data_type", "rope_scale", "rope_theta", "seq_lens", "use_fp16_qk_reduction", "use_tensor_cores",
)  # fmt: skip
"""Keywords of ``plan`` that the result does not depend on here. What rotates is told by pos_encoding_mode."""


class _Paged:
    """What both wrappers share: a layout, and what was planned."""

    def __init__(self, float_workspace_buffer: Any = None, kv_layout: str = "NHD", **buffers: Any) -> None:
        """
        Args:
            float_workspace_buffer: not needed here.
            kv_layout: "NHD", pages [page_size, Hk, D], or "HND", pages [Hk, page_size, D].
            buffers: FlashInfer's buffers for CUDA graphs; not needed here, but see ``plan``.

        Raises:
            InputError: another layout.
        """
        if kv_layout not in LAYOUTS:
            raise InputError(f"kv_layout is {kv_layout!r}; 'NHD' or 'HND' is needed")
        self._layout = kv_layout
        self._graph = bool(buffers.get("use_cuda_graph", False))
        self._table: torch.Tensor | None = None
        self._lengths: torch.Tensor | None = None
        self._options: dict[str, Any] = {}
        self._page_size = 0

    def _pages(self, indptr: Any, indices: Any, last_page_len: Any, page_size: int) -> None:
        """Makes the page table and the lengths. With use_cuda_graph they are written where they were, if there are as
        many sequences and none has more pages than any before, so that a captured graph sees them.

        Raises:
            InputError: tensors of other shapes, or an indptr that descends.
        """
        import torch

        for name, x in (("indptr", indptr), ("indices", indices), ("last_page_len", last_page_len)):
            if not isinstance(x, torch.Tensor) or x.ndim != 1 or x.dtype not in (torch.int32, torch.int64):
                got = f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
                raise InputError(f"{name} is {got}; a tensor of int32 with one axis is needed")
        batch, device = len(last_page_len), indices.device
        if len(indptr) != batch + 1:
            raise InputError(
                f"indptr has {len(indptr)} entries for {batch} sequences; one more than sequences is needed"
            )
        starts = indptr.tolist()
        counts = [end - begin for begin, end in itertools.pairwise(starts)]
        if batch and (min(counts) < 0 or starts[0] != 0 or starts[-1] > len(indices)):
            raise InputError(
                f"indptr goes from {starts[0]} to {starts[-1]} and {'descends' if min(counts) < 0 else 'ascends'}; it "
                f"must ascend from 0 to at most the {len(indices)} indices"
            )
        width = max([1, *counts])
        if self._graph and self._table is not None and self._table.shape[0] == batch and self._table.shape[1] >= width:
            width = self._table.shape[1]
        first = indptr.to(device, torch.int64)
        column = torch.arange(width, device=device)
        at = (first[:-1, None] + column).clamp(max=max(0, len(indices) - 1))
        there = column < first.diff()[:, None]
        table = torch.where(there, indices[at] if len(indices) else at, 0).to(torch.int32)
        last = last_page_len.to(device, torch.int32)
        pages = first.diff().to(torch.int32)
        lengths = torch.where(pages > 0, (pages - 1) * page_size + last, 0).to(torch.int32)
        if self._graph and self._table is not None and self._table.shape == table.shape:
            assert self._lengths is not None
            self._table.copy_(table)
            self._lengths.copy_(lengths)
        else:
            self._table, self._lengths = table, lengths
        self._page_size = page_size

    def _plan_options(self, function: str, further: dict[str, Any], **plain: Any) -> None:
        """
        Raises:
            UnsupportedProblem: what no kernel computes.
            TypeError: a keyword that FlashInfer does not have either.
        """
        mode = plain["pos_encoding_mode"]
        if mode not in ("NONE", None):
            what = "ALiBi's slopes of FlashInfer are not those of attention(alibi_slopes=)" if mode == "ALIBI" else mode
            raise UnsupportedProblem(f"{function}: pos_encoding_mode is {mode!r}: {what}. Rotate q and k beforehand")
        for name, value in further.items():
            if name in ("custom_mask", "packed_custom_mask") and value is not None:
                raise UnsupportedProblem(f"{function}: {name}= is FlashInfer's own form of a mask: use pack_mask")
            if name not in _HINTS and name not in ("custom_mask", "packed_custom_mask"):
                raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        left = plain["window_left"]
        self._options = {
            "scale": plain["sm_scale"],
            "softcap": plain["logits_soft_cap"] or 0.0,
            "window": None if left is None or left < 0 else (left, None),
            "causal": plain["causal"],
        }

    def _run(
        self, q: torch.Tensor, cache: Any, out: Any, lse: Any, return_lse: bool, more: dict[str, Any],
        form: dict[str, Any],
    ) -> Any:  # fmt: skip
        import torch

        if self._table is None or self._lengths is None:
            raise InputError("run before plan: call plan(...) first, once a step")
        k, v = split(cache, self._layout)
        if k.shape[1] != self._page_size:
            raise InputError(f"the cache has pages of {k.shape[1]} tokens, plan was told {self._page_size}")
        options = dict(self._options)
        if more.get("window_left") is not None:
            options["window"] = None if more["window_left"] < 0 else (more["window_left"], None)
        for name in ("q_scale", "k_scale", "v_scale"):
            if more.get(name) not in (None, 1, 1.0):
                raise UnsupportedProblem(f"run: {name} is {more[name]} and there are no FP8 kernels: scale beforehand")
        unknown = set(more) - {"q_scale", "k_scale", "v_scale", "window_left", "sinks", "enable_pdl", "q_len_per_req"}
        if unknown:
            raise TypeError(f"run() got an unexpected keyword argument {min(unknown)!r}")
        found = attention_with_kvcache(
            q, k, v, cache_seqlens=self._lengths, page_table=self._table, sinks=more.get("sinks"), out=out,
            return_lse=return_lse, **options, **form,
        )  # fmt: skip
        if not return_lse:
            return found
        result, natural = found
        tokens = natural.transpose(-1, -2).flatten(0, -2) / math.log(2)  # [tokens, heads]
        if lse is not None:
            lse.copy_(tokens)
            tokens = lse
        return result, torch.as_tensor(tokens)


class BatchDecodeWithPagedKVCacheWrapper(_Paged):
    """One query of each sequence on its pages."""

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        data_type: Any = None,
        sm_scale: float | None = None,
        **further: Any,
    ) -> None:
        """Which pages the sequences of this step have, and the options of its layers.

        Raises:
            InputError, UnsupportedProblem, TypeError: see the module.
        """
        self._pages(indptr, indices, last_page_len, page_size)
        self._plan_options(
            "BatchDecodeWithPagedKVCacheWrapper.plan", further, pos_encoding_mode=pos_encoding_mode, causal=False,
            window_left=window_left, logits_soft_cap=logits_soft_cap, sm_scale=sm_scale,
        )  # fmt: skip

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: Any,
        *,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        **more: Any,
    ) -> Any:
        """Attention of q [B, H, D].

        Args:
            paged_kv_cache: [pages, 2, page_size, Hk, D] ("NHD") or [pages, 2, Hk, page_size, D] ("HND"), or a pair of
                such pools without the axis of two.

        Returns:
            out [B, H, Dv], or (out, lse [B, H] to base 2).

        Raises:
            InputError: run before plan, or a cache of another form.
            UnsupportedProblem: scales of FP8.
        """
        rows = None if out is None else out[:, None]
        found = self._run(q[:, None], paged_kv_cache, rows, lse, return_lse, more, {})
        if out is not None:
            return (out, found[1]) if return_lse else out
        return (found[0][:, 0], found[1]) if return_lse else found[:, 0]

    def end_forward(self) -> None:
        """Nothing: what was planned stays until it is planned anew."""

    forward = run


class BatchPrefillWithPagedKVCacheWrapper(_Paged):
    """Packed queries of each sequence on its pages, the last query at the last key."""

    _cu: torch.Tensor | None = None
    _longest = 0

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        **further: Any,
    ) -> None:
        """Which queries and pages the sequences of this step have, and the options of its layers.

        Raises:
            InputError, UnsupportedProblem, TypeError: see the module.
        """
        import torch

        self._pages(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size)
        if not isinstance(qo_indptr, torch.Tensor) or tuple(qo_indptr.shape) != tuple(paged_kv_indptr.shape):
            got = tuple(qo_indptr.shape) if isinstance(qo_indptr, torch.Tensor) else type(qo_indptr).__name__
            raise InputError(f"qo_indptr is {got}; a tensor as long as paged_kv_indptr is needed")
        counts = qo_indptr.diff().tolist()
        if counts and min(counts) < 0:
            raise InputError("qo_indptr descends; it must ascend from 0 to the tokens of q")
        cu, longest = qo_indptr.to(paged_kv_indices.device, torch.int32), max([0, *counts])
        if self._graph and self._cu is not None and self._cu.shape == cu.shape and longest <= self._longest:
            self._cu.copy_(cu)
        else:
            self._cu, self._longest = cu.clone(), longest
        self._plan_options(
            "BatchPrefillWithPagedKVCacheWrapper.plan",
            {**further, "custom_mask": custom_mask, "packed_custom_mask": packed_custom_mask},
            pos_encoding_mode=pos_encoding_mode, causal=causal, window_left=window_left,
            logits_soft_cap=logits_soft_cap, sm_scale=sm_scale,
        )  # fmt: skip

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: Any,
        *,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        **more: Any,
    ) -> Any:
        """Attention of q [tokens, H, D]; otherwise as for decoding.

        Returns:
            out [tokens, H, Dv], or (out, lse [tokens, H] to base 2).
        """
        if self._cu is None:
            raise InputError("run before plan: call plan(...) first, once a step")
        form = {"cu_seqlens_q": self._cu, "max_seqlen_q": self._longest}
        return self._run(q, paged_kv_cache, out, lse, return_lse, more, form)

    def end_forward(self) -> None:
        """Nothing: what was planned stays until it is planned anew."""

    forward = run


def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: Any,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Copies tokens to their positions in a paged cache, as FlashInfer's function of this name.

    Args:
        append_key, append_value: [tokens, Hk, D].
        batch_indices, positions: int32 [tokens], of which sequence and where in it.
        paged_kv_cache: as for ``run``.

    Raises:
        InputError: another layout, or tensors that do not fit each other.
    """
    if kv_layout not in LAYOUTS:
        raise InputError(f"kv_layout is {kv_layout!r}; 'NHD' or 'HND' is needed")
    k, v = split(paged_kv_cache, kv_layout)
    at = positions.long()
    entry = kv_indptr.long()[batch_indices.long()] + at // k.shape[1]
    slots = kv_indices.long()[entry.clamp(max=max(0, len(kv_indices) - 1))] * k.shape[1] + at % k.shape[1]
    append_kv(append_key, append_value, k, v, slot_mapping=slots)


def split(cache: Any, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The pools of K and V as views [pages, page_size, Hk, D].

    Raises:
        InputError: neither a pair of pools nor one tensor with five axes, the second of which is K and V.
    """
    import torch

    if isinstance(cache, tuple | list) and len(cache) == 2:
        pools = [x for x in cache if isinstance(x, torch.Tensor) and x.ndim == 4]
    elif isinstance(cache, torch.Tensor) and cache.ndim == 5 and cache.shape[1] == 2:
        pools = [cache[:, 0], cache[:, 1]]
    else:
        pools = []
    if len(pools) != 2:
        got = tuple(cache.shape) if isinstance(cache, torch.Tensor) else type(cache).__name__
        raise InputError(
            f"paged_kv_cache is {got}; [pages, 2, page_size, Hk, D] (NHD), [pages, 2, Hk, page_size, D] (HND), or a "
            "pair of pools with four axes is needed"
        )
    k, v = (x.transpose(1, 2) if layout == "HND" else x for x in pools)
    return k, v

# SPDX-License-Identifier: Apache-2.0
"""What torch's FlopCounterMode counts for our operators: both matrix products over all pairs of a query and a key.

That is torch's own formula for scaled_dot_product_attention: causality, windows and masks do not lessen it. Lengths of
packed sequences and caches count where they can be read (which waits for the device, as torch's formula does); those of
fake tensors count as their upper bounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..problem import kinds

if TYPE_CHECKING:
    import torch

_formulas: dict[Any, Any] = {}
"""By operator, as torch keeps them."""


def register(namespace: Any) -> None:
    """Gives torch the formulas of the operators in ``torch.ops.NAMESPACE``, which have just been defined. Once."""
    from torch.utils import flop_counter

    for name, formula in (("fwd", _fwd), ("fwd_varlen", _fwd_varlen), ("fwd_kvcache", _fwd_kvcache)):
        for packet in (getattr(namespace, name), getattr(namespace, f"{name}_out")):
            flop_counter.register_flop_formula(packet, get_raw=True)(formula)
            _formulas[packet] = formula


def teach() -> None:
    """Counters that run already copied torch's formulas when they were made, perhaps before ours were there."""
    import torch.utils._python_dispatch as dispatch

    for mode in dispatch._get_current_dispatch_mode_stack():
        known = getattr(getattr(mode, "counter", mode), "flop_registry", None)
        if isinstance(known, dict):
            for packet, formula in _formulas.items():
                known.setdefault(packet, formula)


def _fwd(q: Any, k: Any, v: Any, *, seqused_k: Any = None, **_: Any) -> int:
    keys = [k.shape[1]] * k.shape[0]
    return _pairs(q, k, v, [q.shape[1]] * q.shape[0], _at_most(keys, seqused_k))


def _fwd_varlen(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int, *,
    seqused_k: Any = None, **_: Any,
) -> int:  # fmt: skip
    keys = _lengths(cu_seqlens_k, max_seqlen_k)
    return _pairs(q, k, v, _lengths(cu_seqlens_q, max_seqlen_q), _at_most(keys, seqused_k))


def _fwd_kvcache(
    q: Any, k_cache: Any, v_cache: Any, cache_seqlens: Any, *, page_table: Any = None, cu_seqlens_q: Any = None,
    max_seqlen_q: Any = None, **_: Any,
) -> int:  # fmt: skip
    room = k_cache.shape[1] if page_table is None else k_cache.shape[1] * page_table.shape[1]
    queries = [q.shape[1]] * q.shape[0] if cu_seqlens_q is None else _lengths(cu_seqlens_q, max_seqlen_q)
    return _pairs(q, k_cache, v_cache, queries, _at_most([room] * cache_seqlens.shape[0], cache_seqlens))


def _pairs(q: Any, k: Any, v: Any, queries: list[int], keys: list[int]) -> int:
    pairs = sum(a * b for a, b in zip(queries, keys, strict=True))
    return 2 * q.shape[-2] * pairs * (q.shape[-1] + v.shape[-1])


def _lengths(offsets: torch.Tensor, longest: int) -> list[int]:
    return offsets.diff().tolist() if _has_values(offsets) else [longest] * (offsets.shape[0] - 1)


def _at_most(lengths: list[int], used: torch.Tensor | None) -> list[int]:
    if used is None or not _has_values(used):
        return lengths
    return [max(0, min(pair)) for pair in zip(lengths, used.tolist(), strict=True)]


def _has_values(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "meta" and not kinds.sees_operators(tensor)

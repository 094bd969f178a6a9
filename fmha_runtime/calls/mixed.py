# SPDX-License-Identifier: Apache-2.0
"""A batch whose first sequences decode and whose others prefill: two launches behind one call."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import TYPE_CHECKING, Any

from ..errors import InputError, UnsupportedProblem

if TYPE_CHECKING:
    import torch


def run(
    call: Callable[..., Any], num_decodes: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    lengths: torch.Tensor | int, table: torch.Tensor | None, cu_seqlens_q: torch.Tensor | None,
    out: torch.Tensor | None, return_lse: bool, slopes: torch.Tensor | None, mask: Any, options: dict[str, Any],
) -> Any:  # fmt: skip
    """``attention_with_kvcache`` of a mixed batch.

    Args:
        call: that function, for the parts.
        num_decodes: sequences at the front with one query each.
        options: the arguments that both parts share, and ``max_seqlen_q``, which is of the others.

    Raises:
        InputError: no ``cu_seqlens_q``, or a number of decodes that the batch cannot have.
        UnsupportedProblem: a packed mask.
    """
    import torch

    if cu_seqlens_q is None:
        raise InputError(
            f"num_decodes is {num_decodes} without cu_seqlens_q: it is for packed queries of different lengths; where "
            "all sequences have as many, leave it out"
        )
    assert not isinstance(lengths, int)  # one for all was made a tensor
    batch = len(cu_seqlens_q) - 1
    if not isinstance(num_decodes, Integral) or isinstance(num_decodes, bool) or not 0 < num_decodes <= batch:
        raise InputError(f"num_decodes is {num_decodes!r}; 0 to {batch} sequences of this batch can be decoding")
    if mask is not None:
        raise UnsupportedProblem("a packed mask is of the whole batch and cannot be cut: call once for each part")
    if num_decodes > len(q):
        raise InputError(f"num_decodes is {num_decodes} and q has {len(q)} tokens: each decoding sequence has one")
    if num_decodes == batch:
        options = {**options, "max_seqlen_q": 1}
        return call(
            q, k, v, cache_seqlens=lengths, page_table=table, cu_seqlens_q=cu_seqlens_q, out=out, return_lse=return_lse,
            alibi_slopes=slopes, **options,
        )  # fmt: skip
    n = int(num_decodes)
    if out is None:
        out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)

    def part(which: slice) -> dict[str, Any]:
        return {
            "cache_seqlens": lengths[which],
            "page_table": None if table is None else table[which],
            "alibi_slopes": slopes if slopes is None or slopes.ndim == 1 else slopes[which],
            "return_lse": return_lse,
        }

    caches = [(k, v) if table is not None else (k[which], v[which]) for which in (slice(n), slice(n, None))]
    # The others first: where a call leaves no token unwritten, as on the CPU, it writes those of the decodes, too.
    found = call(q, *caches[1], cu_seqlens_q=cu_seqlens_q[n:], out=out, **part(slice(n, None)), **options)
    few = call(q[:n, None], *caches[0], out=out[:n, None], **part(slice(n)), **{**options, "max_seqlen_q": None})
    if not return_lse:
        return out
    lse = found[1]
    lse[:, :n] = few[1][:, :, 0].t()
    return out, lse

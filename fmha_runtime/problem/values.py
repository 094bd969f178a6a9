# SPDX-License-Identifier: Apache-2.0
"""What lengths and page tables say, where they lie on the host: there their numbers are checked. Those on a GPU are
never read; docs/semantics.md says what wrong ones mean there."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from ..errors import InputError
from .arguments import Shape

if TYPE_CHECKING:
    import torch


def check(
    shape: Shape,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    page_table: torch.Tensor | None,
    tokens_k: int,
    pages: int,
) -> None:
    """
    Args:
        shape: of the call; its lengths are what the caller says of the longest sequences.
        tokens_k: rows of k of a varlen batch.
        pages: of the pool.

    Raises:
        InputError: offsets that descend or reach past their tensor, a sequence longer than the caller said, or a page
            inside a sequence's length that the pool does not have.
    """
    if cu_seqlens_q is not None:
        _check_offsets("q", cu_seqlens_q, shape.total_q or 0, shape.seqlen_q, None)
    if cu_seqlens_k is not None:
        _check_offsets("k", cu_seqlens_k, tokens_k, shape.seqlen_k, seqused_k)
    if page_table is not None and seqused_k is not None and shape.page_size is not None:
        _check_pages(page_table, seqused_k, shape.page_size, pages)


def _check_offsets(of: str, offsets: torch.Tensor, tokens: int, longest: int, used: torch.Tensor | None) -> None:
    """``used``: how many tokens of each sequence exist; None: all."""
    found, existing = offsets.tolist(), None if used is None else used.tolist()
    name = f"cu_seqlens_{of}"
    for b, (begin, end) in enumerate(itertools.pairwise(found)):
        if not 0 <= begin <= end <= tokens:
            raise InputError(
                f"{name}[{b}] is {begin} and {name}[{b + 1}] is {end}; offsets must ascend from 0 to at most the "
                f"{tokens} tokens of {of}"
            )
        length = end - begin if existing is None else min(end - begin, existing[b])
        if length > longest:
            raise InputError(
                f"max_seqlen_{of} is {longest}, but sequence {b} has {length} tokens ({name}): an upper bound is needed"
            )


def _check_pages(table: torch.Tensor, used: torch.Tensor, page_size: int, pages: int) -> None:
    rows, lengths = table.tolist(), used.tolist()
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        for i, page in enumerate(row[: max(0, -(-length // page_size))]):
            if not 0 <= page < pages:
                raise InputError(
                    f"page_table[{b}, {i}] is {page}, but sequence {b} has {length} tokens, so that page {i} is one of "
                    f"its own; the pool has pages 0 to {pages - 1}"
                )

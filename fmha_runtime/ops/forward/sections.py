# SPDX-License-Identifier: Apache-2.0
"""In which order tiles start: how many query heads share the GPU at a time (``section_heads`` of the parameter block).

Inside a section all heads start their longest tile before any starts its second longest (scheduler.cuh). Small sections
keep K and V in the L2. Too small ones cost balance: the last section begins with its longest tiles as well, and when
nothing is left beside them, most of the GPU waits for them. Measured on an H200 on 2026-11-21, causal, bf16, TFLOP/s,
sections by the L2 alone -> these: d 128 2k 563 -> 583, 8k 668 -> 711, 16k 693 -> 727; d 256 8k 714 -> 772; d 64 8k
512 -> 543; d 160 16k 697 -> 753.
"""

from __future__ import annotations

from ...kernels.forward.params import UNLIMITED
from ...problem.arguments import Options, Shape


def section_heads(
    shape: Shape, options: Options, *, longest_first: bool, block_m: int, itemsize: int, slots: int, l2_bytes: int
) -> int:
    """Query heads of a section.

    Args:
        shape: the problem; of a varlen batch its longest sequences count.
        options: its mask; what matters is how unequal the tiles are that it leaves.
        longest_first: later rows see more keys, by these options or by a mask of bits; if not, the L2 decides alone.
        block_m: query rows of a tile.
        itemsize: bytes of an element of K and V.
        slots: tiles that run at the same time.
        l2_bytes: size of the L2. K and V of a section get a quarter of it where balance allows.

    Returns:
        a multiple of the query heads of a key head, unless it is all heads of the batch.
    """
    group = shape.heads // shape.heads_k
    units = max(1, shape.batch * shape.heads_k)  # K/V heads of the batch
    kv_bytes = shape.seqlen_k * (shape.head_dim + shape.head_dim_v) * itemsize
    in_l2 = max(1, l2_bytes // 4 // max(1, kv_bytes))
    if not longest_first:
        return min(units, in_l2) * group
    wanted = max(in_l2, -(-_for_balance(shape, options, block_m, slots) // group))
    size = -(-units // max(1, units // wanted))
    while size < units and units - (-(-units // size) - 1) * size < wanted:
        size += 1  # until the last section is large enough too
    return size * group


def _for_balance(shape: Shape, options: Options, block_m: int, slots: int) -> int:
    """Heads whose tiles keep all slots busy for as long as the longest takes longer than the shortest."""
    tiles = -(-shape.seqlen_q // block_m)
    diagonal = shape.seqlen_k - shape.seqlen_q  # of the first row
    right = 0 if options.window_right == UNLIMITED else min(options.window_right, shape.seqlen_k)  # a mask of bits
    seen = min(shape.seqlen_k, options.window_left + block_m + right, options.attention_chunk or UNLIMITED)
    longest = max(1, seen)
    first = min(shape.seqlen_k, diagonal + block_m + right) - max(0, diagonal - options.window_left)
    shortest = min(longest, max(1, first))
    # Lengths grow evenly from the first tile to the last: work of a head is the mean times the number of tiles.
    return -(-2 * slots * (longest - shortest) // max(1, tiles * (longest + shortest)))

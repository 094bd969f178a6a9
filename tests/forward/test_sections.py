# SPDX-License-Identifier: Apache-2.0
"""How many heads share the GPU: what a plan asks for, and what that makes of the time that slots stand idle."""

from __future__ import annotations

import heapq
import math
from dataclasses import replace

import pytest

from fmha_runtime.kernels import catalog
from fmha_runtime.kernels.spec import HEAD_DIMS, Arch, DType, KernelSpec, Op
from fmha_runtime.ops.forward.sections import section_heads
from fmha_runtime.problem.arguments import Options, Shape

SLOTS, L2 = 132, 60 << 20
CAUSAL, FULL = Options(window_right=0), Options()


def shape(batch=1, heads=16, heads_k=None, q=4096, k=None, d=128, dv=None):
    return Shape(batch, heads, heads_k or heads, q, k or q, d, dv or d)


def section(problem, options=CAUSAL, *, block_m=192, slots=SLOTS, l2=L2, longest_first=True):
    return section_heads(
        problem, options, longest_first=longest_first, block_m=block_m, itemsize=2, slots=slots, l2_bytes=l2
    )


def busy(problem, heads_a_section, tile, slots=SLOTS):
    """Share of the time that slots work, when tiles start in scheduler.cuh's order and the next goes to whoever is
    free. A tile costs its steps and a start and end of one and a half."""
    heads, tiles = problem.batch * problem.heads, -(-problem.seqlen_q // tile.block_m)
    ends, work = [0.0] * slots, 0.0
    for first in range(0, heads, heads_a_section):
        for m in reversed(range(tiles)):
            keys = min(problem.seqlen_k, (m + 1) * tile.block_m)
            cost = 1.5 + math.ceil(keys / tile.block_n)
            for _ in range(min(heads_a_section, heads - first)):
                heapq.heappush(ends, heapq.heappop(ends) + cost)
                work += cost
    return work / slots / max(ends)


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
def test_causal_tiles_keep_an_h200_busy(dims):
    """The lengths of the yardstick: the L2 alone made it 0.89 in the worst case, and 0.96 on the average."""
    d, dv = dims
    tile = catalog.tile(KernelSpec(Op.FWD, Arch.SM90A, DType.BF16, d, dv))
    found = []
    for seqlen in (1024, 2048, 4096, 8192, 16384):
        problem = shape(16384 // seqlen, 2048 // d, q=seqlen, d=d, dv=dv)
        found.append(busy(problem, section(problem, block_m=tile.block_m), tile))
    assert min(found) > 0.965 and sum(found) / len(found) > 0.975, found


def test_sections_by_the_l2_alone_leave_slots_idle():
    """The model can tell: what was there before."""
    problem = shape(2, 16, q=8192)
    tile = catalog.tile(KernelSpec(Op.FWD, Arch.SM90A, DType.BF16, 128, 128))
    by_l2 = section(problem, longest_first=False)
    assert by_l2 == 3
    assert busy(problem, by_l2, tile) < 0.91 < 0.98 < busy(problem, section(problem), tile)


@pytest.mark.parametrize("heads", [64, 100, 168, 500])
@pytest.mark.parametrize("seqlen", [1024, 2048, 4096, 16384])
def test_sections_are_of_equal_size(heads, seqlen):
    """A last section of a few heads would leave slots idle at the end."""
    got = section(shape(1, heads, q=seqlen))
    sections = -(-heads // got)
    last = heads - (sections - 1) * got
    assert sections > 1 and 0.7 * got <= last <= got


@pytest.mark.parametrize("heads", [1, 2, 3, 7])
@pytest.mark.parametrize("seqlen", [1, 128, 1024])
def test_few_heads_are_one_section(heads, seqlen):
    assert section(shape(1, heads, q=seqlen)) == heads


def test_what_a_section_depends_on():
    # 2 * 132 * (4096 - 192) / (22 tiles * (4096 + 192)) = 10.9 heads that balance, and 64 in sections of the same size
    assert section(shape(4, 16)) == 13
    assert section(shape(4, 16), FULL, longest_first=False) == 7  # by the L2 alone
    assert section(shape(4, 16), slots=2) == 8  # the same, evenly
    assert section(shape(4, 16), l2=400 << 20) == 64
    # Query heads of one key head stay together.
    assert section(shape(4, 32, 8)) % 4 == 0
    assert section(shape(1, 6, 1)) == 6
    # A narrow window makes tiles of nearly the same length; so does a cache that is long beside the queries.
    wide, narrow = (section(shape(1, 64, q=16384), replace(CAUSAL, window_left=left)) for left in (8192, 64))
    assert narrow <= wide
    assert section(shape(1, 64, q=192, k=16384)) == section(shape(1, 64, q=192, k=16384), longest_first=False)
    # A mask of bits without a band counts as causal.
    assert section(shape(4, 16), FULL) == section(shape(4, 16))


@pytest.mark.parametrize("problem", [shape(0), shape(q=0, k=0), shape(q=0, k=64), shape(q=64, k=0), shape(3, q=1, k=1)])
def test_empty_problems_have_a_section_too(problem):
    for longest_first in (True, False):
        assert section(problem, longest_first=longest_first) >= 1

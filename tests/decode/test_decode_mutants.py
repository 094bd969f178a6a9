# SPDX-License-Identifier: Apache-2.0
"""The emulator, or a wrong result, tells when a decode kernel loses a cut, a barrier or a count.

Mutants as in test_emulator_mutants.py.
"""

from __future__ import annotations

import pytest
import torch
from helpers.caches import paged, queries
from helpers.mutants import Mutant, assert_caught, assert_the_same_in_every_order

from fmha_runtime.device.emulator import Order
from fmha_runtime.kernels.spec import KernelSpec
from fmha_runtime.ops.forward import direct

pytestmark = pytest.mark.emulator

PLAIN = "fmha_decode_sm90_bf16_d64_short"
WIDE = "fmha_decode_sm90_bf16_d64"
PAGED = "fmha_decode_sm90_bf16_d64_paged_short"
LOOP = r"(for \(; n_block < end; \+\+n_block\) \{\s*)"
WAIT = r"(cp_async_wait<Traits::kStages - 2>\(\);\s*kv\.keep\([^;]*;\s*)"


def mutant(file: str, pattern: str, replacement: str, fault: str = "", spec: str = PLAIN) -> Mutant:
    return Mutant(f"decode/{file}", pattern, replacement, fault, spec)


MUTANTS = {
    "a tile is not waited for": mutant("mma.cuh", LOOP + r"cp_async_wait<[^;]*;", r"\1", "in flight"),
    "no barrier behind the wait": mutant("mma.cuh", LOOP + WAIT + r"sync_cta\(\);", r"\1\2", "race|in flight|nobody"),
    "the ring is overwritten by results": mutant(
        "mma.cuh", r"sync_cta\(\);  // all warps are done with the ring", "", "race|in flight"
    ),
    "the next piece overwrites the results": mutant(
        "mma.cuh", r"sync_cta\(\);  // the piece before this one[^\n]*", "", "race|in flight"
    ),
    "warps meet without a barrier": mutant(
        "merge.cuh", r"sync_cta\(\);(\s*float share\[kWarpsN\])", r"\1", "race|nobody has written"
    ),
    "a cut off by one": mutant(
        "worklist.cuh", r"step = begin - unit_begin;", "step = begin - unit_begin; step += step > 0;",
        "counters at other numbers|reads",
    ),
    "a piece too long by one": mutant(
        "worklist.cuh", r"left -= piece\.steps;", "left -= piece.steps; piece.steps += left <= 0;"
    ),
    "one result is left out": mutant("merge.cuh", r"partial\.load\(count, ", "partial.load(count - 1, "),
    "one group is left out": mutant("merge.cuh", r"group - 1\) / group;", "group - 1) / group - 1;"),
    "results are added up by whoever comes first": mutant(
        "merge.cuh", r"\.x\[0\]\) == count - 1;", ".x[0]) == 0;"
    ),
    "a count that does not end at zero": mutant(
        "merge.cuh", r"static_cast<uint32_t>\(count\) - 1\)", "static_cast<uint32_t>(count))", "counters at other"
    ),
    "a sink is counted by every piece": mutant(
        "mma.cuh",
        r"partial\.exchange\(o, ring, warp_m, warp_n, lane\);",
        "partial.exchange(o, ring, warp_m, warp_n, lane); partial.sum[0] += p.sinks != nullptr;",
    ),
    "heads take each other's slopes": mutant("rows.cuh", r"(alibi_batch_stride\) \+\s*)r\.head", r"\1 0"),
    "queries take each other's masks": mutant("rows.cuh", r"query % 8 \* 4", "0"),
    "pages are read before they are known": mutant(
        "kv.cuh", r"(fetch\(n_block \+ Traits::kStages - 1\);\s*)sync_cta\(\);", r"\1", "race|nobody", spec=PAGED
    ),
    "pages of the next tile": mutant(
        "mma.cuh", r"kv\.keep\(n_block \+ Traits::kStages - 1\);", "", "nobody|reads|touches|race", spec=PAGED
    ),
    "rows of a page off by one": mutant(
        "kv.cuh", r"token - (pages\.page\(token\) \* pages\.size;)", r"token + 1 - \1", "reads", spec=PAGED
    ),
    "64 rows, a wait too few": mutant("mma.cuh", LOOP + r"cp_async_wait<[^;]*;", r"\1", "in flight", spec=WIDE),
}  # fmt: skip


OF_MANY = (
    "a tile is not waited for",
    "no barrier behind the wait",
    "the next piece overwrites the results",
    "pages of the next tile",
)


def run(kernel, spec):
    """Three ragged sequences, of which one is cut into twelve pieces, that meet in two groups."""
    q = queries(3, 3, 4, 64)
    mask = torch.rand(3, 1500, generator=torch.Generator().manual_seed(4)) < 0.8
    slopes = torch.tensor([0.001, 0.01, 0.002, 0.05])
    options = {"causal": True, "alibi_slopes": slopes, "sinks": torch.tensor([2.0, 1.0, 3.0, 2.0]), "mask": mask}
    return on(kernel, spec, q, (1500, 0, 130), **options)


def run_many(kernel, spec):
    """Sequences of three tiles and of one: a CTA has one of each."""
    return on(kernel, spec, queries(48, 1, 4, 64), (390, 100) * 24)


def on(kernel, spec, q, lengths, **options):
    if spec.kv.value == "paged":
        k, v, table, used = paged(lengths, 24, 1, 64)
        options["page_table"] = table
    else:
        g = torch.Generator().manual_seed(3)
        k, v = (torch.randn(len(lengths), max(lengths), 1, 64, generator=g).bfloat16() for _ in range(2))
        used = torch.tensor(lengths, dtype=torch.int32)
    v *= 30  # so that a tile more or less shows
    return direct.run(kernel, spec, q, k, v, seqused_k=used, return_lse=True, **options)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_loss_is_noticed(name, tmp_path):
    orders = Order if MUTANTS[name].fault else [Order.FORWARD]
    assert_caught(MUTANTS[name], tmp_path / "fmha", run_many if name in OF_MANY else run, orders)


@pytest.mark.parametrize("problem", [run, run_many])
@pytest.mark.parametrize("name", [PLAIN, WIDE, PAGED])
def test_the_kernel_as_it_is_faults_in_no_order(name, problem):
    assert_the_same_in_every_order(KernelSpec.parse(name), problem)

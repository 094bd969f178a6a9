# SPDX-License-Identifier: Apache-2.0
"""The emulator notices when the Hopper kernel loses a fence, a wait, an arrival or a byte.

Mutants as in test_emulator_mutants.py, of the warp-specialised kernel.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.mutants import Mutant, assert_caught, assert_the_same_in_every_order

from fmha_runtime.device import emulator
from fmha_runtime.kernels.spec import KernelSpec
from fmha_runtime.ops.forward import direct

pytestmark = pytest.mark.emulator

SPEC = KernelSpec.parse("fmha_fwd_sm90a_bf16_d64")
IN_FLIGHT = "wgmma: reads shared memory offset .* while a tma_load_4d to it"


def mutant(
    pattern: str, replacement: str, fault: str, file: str = "forward/wgmma.cuh", kernel: str = SPEC.name
) -> Mutant:
    return Mutant(file, pattern, replacement, fault, kernel)


WAIT_V = r"mbarrier_wait\(smem\.v_full\(previous\.stage\), previous\.parity\);"
FENCE_STEP = r"wgmma_fence\(\);(\s*issue_qk\(ring\.stage\);\s*mbarrier_wait)"
WAIT_PV = r"wgmma_wait<0>\(\);  // only now[^\n]*\n"

MUTANTS = {
    "barriers not shown to the copy engine": mutant(
        r"mbarrier_init_fence\(\);", "", "no mbarrier_init_fence after its mbarrier_init", "forward/wgmma_smem.cuh"
    ),
    "barriers used before they are initialised": mutant(
        r"(smem\.init_barriers\(\);\s*\}\s*)sync_cta\(\);",
        r"\1",
        "was initialised by thread 0 with nothing in between|there is no mbarrier",
    ),
    "V is not waited for": mutant(WAIT_V, "", IN_FLIGHT + "|wgmma: race at .*, which the copy engine filled"),
    "K is not waited for": mutant(
        r"mbarrier_wait\(smem\.k_full\(ring\.stage\), ring\.parity\);(?=\s*wait_for_turn\(\);"
        r"\s*pin\(s_flat\);\s*wgmma_fence\(\);\s*issue_qk\(ring\.stage\);\s*mbarrier_wait)",
        "",
        IN_FLIGHT,
    ),
    "Q is not waited for": mutant(
        r"mbarrier_wait\(smem\.q_full\(q_ring\.stage, consumer\), q_ring\.parity\);",
        "",
        f"{IN_FLIGHT}|more arrivals than|ld_shared_v4: (race|reads)",
    ),
    "Q and its assignment are replaced while they are read": mutant(
        r"mbarrier_wait\(smem\.q_empty\(q_ring\.stage, consumer\), q_ring\.parity \^ 1\);",
        "",
        "more arrivals than|tma_load_4d: (race|writes)|st_shared_v4: race|" + IN_FLIGHT,
        kernel="fmha_fwd_sm90a_bf16_d160",  # one stage of Q: it is replaced as soon as it may
    ),
    "the queue of tiles is not put back": mutant(
        r"st_global_u32\(queue, 0\);", "", "left its tile queue at 6", file="blocks/tile_queue.cuh"
    ),
    "a consumer that passes keeps the turn": mutant(
        r"pass_turn\(\);(\s*release\(smem\.k_empty\(ring\.stage\)\);\s*mbarrier_wait)", r"\1", "deadlock"
    ),
    "a consumer that passes keeps the tile": mutant(
        r"(pass_turn\(\);\s*)release\(smem\.k_empty\(ring\.stage\)\);(?=\s*mbarrier_wait\(smem\.v_full)",
        r"\1",
        "deadlock",
    ),
    "K is refilled while it is read": mutant(
        r"mbarrier_wait\(smem\.k_empty\(ring\.stage\), ring\.parity \^ 1\);",
        "",
        "more arrivals than|tma_load_4d: (race|writes)",
    ),
    "V is refilled while it is read": mutant(
        r"mbarrier_wait\(smem\.v_empty\(at\.stage\), at\.parity \^ 1\);",
        "",
        "more arrivals than|tma_load_4d: (race|writes)|deadlock|" + IN_FLIGHT,
    ),
    "V is released before it was read": mutant(
        WAIT_PV + r"\s*pin\(o_flat\);\s*release\(smem\.v_empty\(previous\.stage\)\);",
        "release(smem.v_empty(previous.stage)); wgmma_wait<0>();",
        "tma_load_4d: (race at .* a wgmma of warp|writes .* while a wgmma)",
    ),
    "one warp speaks for its warpgroup": mutant(
        r"if \(lane == 0\) \{(\s*mbarrier_arrive\(bar\);)",
        r"if (warp == 0 && lane < 4) {\1",
        "race at .* a wgmma of warp|while a wgmma of warp",
    ),
    "an arrival too many expected": mutant(
        r"mbarrier_init\(v_empty\(stage\), kConsumerWarps\)",
        "mbarrier_init(v_empty(stage), kConsumerWarps + 1)",
        "deadlock.* of 13 arrivals",
        "forward/wgmma_smem.cuh",
    ),
    "wrong number of bytes": mutant(r"Traits::kKBytes\);", "Traits::kKBytes + 16);", "deadlock.* bytes announced"),
    "parity of the ring never flips": mutant(
        r"parity \^= 1;(?=\s*\}\s*\}\s*FMHA_DEVICE RingPosition previous)",
        "",
        "more arrivals than|deadlock|tma_load_4d|wgmma",
        "forward/wgmma_smem.cuh",
    ),
    "zeroed rows of V not shown to the tensor cores": mutant(
        r"fence_async_shared\(\);", "", "no fence_async_shared made it visible"
    ),
    "V released by lane 0 while other lanes zero it": mutant(
        r"(fence_async_shared\(\);\s*)sync_warp\(\);", r"\1", "wgmma: race at .* wrote with no"
    ),
    "rows of V past the length stay": mutant(r"st_shared_v4\(group \+ byte, [^;]*;", "", ""),
    "products without a fence": mutant(FENCE_STEP, r"\1", "was written by ordinary code after the latest wgmma_fence"),
    "O is rescaled while it is accumulated": mutant(
        WAIT_PV,
        "softmax.rescale(o, shrink); wgmma_wait<0>();\n",
        "accumulator register 0 was written while a wgmma on it was in flight",
    ),
    "P is rewritten while it is read": mutant(
        WAIT_PV, "pack_probs(); wgmma_wait<0>();\n", "a register of operand A was rewritten"
    ),
    "a product is never committed": mutant(r"(1\);\s*\}\s*)wgmma_commit\(\);", r"\1", "in flight|a wgmma of warp"),
    "registers for everybody": mutant(
        r"registers_inc<Traits::kConsumerRegs>\(\);",
        "registers_inc<256>();",
        "the warps ask for .* registers in all",
    ),
    "nobody begins": mutant(
        r"if \(consumer == Traits::kConsumers - 1\) \{\s*pass_turn\(\);\s*\}",
        "",
        "deadlock.*at barrier 1 with 128 of 256 threads",
    ),
    "columns of Q meet other columns of K": mutant(
        r"group \* Traits::kKvGroupBytes \+ column",
        "group * Traits::kKvGroupBytes + (column ^ 32)",
        "",
    ),
}


def outputs(kernel: emulator.Kernel, spec: KernelSpec) -> tuple[torch.Tensor]:
    """Two query tiles of three heads on two CTAs, three key tiles, the last one ragged and followed by NaN."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, rows, 3, spec.head_dim, generator=generator).to(torch.bfloat16) for rows in (200, 390, 390)
    )
    k[:, 300:] = v[:, 300:] = float("nan")
    used = torch.tensor([300], dtype=torch.int32)
    out = direct.run(kernel, spec, q, k, v, seqused_k=used)
    assert isinstance(out, torch.Tensor)
    return (out,)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path) -> None:
    assert_caught(MUTANTS[name], tmp_path / "fmha", outputs)


def test_the_real_kernel_is_clean_and_the_same_in_every_order() -> None:
    assert_the_same_in_every_order(SPEC, outputs)

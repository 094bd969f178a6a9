# SPDX-License-Identifier: Apache-2.0
"""The emulator notices when the real kernel loses a barrier, a wait or a bound.

Each mutant is a copy of kernel_src/fmha with one statement changed. A pattern that no longer
matches exactly once fails its test: then the kernel moved on and the mutant must follow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.mutants import Mutant, assert_caught, assert_the_same_in_every_order

from fmha_runtime.device import emulator
from fmha_runtime.kernels.spec import KernelSpec, KvLayout
from fmha_runtime.ops.forward import direct

pytestmark = pytest.mark.emulator

LOOP_TOP = r"(while \(n_block >= range\.begin\) \{\s*)"
WAIT = r"(cp_async_wait<Traits::kStages - 2>\(\);\s*)"

MUTANTS = {
    "main loop without its wait": Mutant("forward/mma.cuh", LOOP_TOP + WAIT, r"\1", "while a cp_async_16 .* in flight"),
    "main loop waits for one group too few": Mutant(
        "forward/mma.cuh",
        LOOP_TOP + WAIT,
        r"\1cp_async_wait<Traits::kStages - 1>(); ",
        "while a cp_async_16 .* in flight",
    ),
    "main loop without its barrier": Mutant(
        "forward/mma.cuh",
        LOOP_TOP + WAIT + r"sync_cta\(\);",
        r"\1\2",
        "race|in flight|nobody has written",
    ),
    "copies never committed": Mutant(
        "forward/mma.cuh", r"\bcp_async_commit\(\);", "", "while a cp_async_16 .* in flight"
    ),
    "next tile lands on the one being read": Mutant(
        "forward/mma.cuh",
        r"const int free_stage = [^;]*;",
        "const int free_stage = stage;",
        "race|in flight",
    ),
    "rows behind the sequence are read": Mutant(
        "blocks/tile_copy.cuh",
        r"\bdone < rows_left\b",
        "true",
        "cp_async_16: reads 16 bytes at byte offset",
    ),
    "surplus of the head dim is not zeroed": Mutant(
        "blocks/tile_copy.cuh",
        r"for \(int row = thread; row < rows;",
        "for (int row = rows; row < rows;",
        "nobody has written",
        "fmha_fwd_sm90_bf16_d72",
    ),
    "rows behind the sequence are stored": Mutant(
        "blocks/epilogue.cuh", r"warp_row \+ row < q_len", "true", "st_global_v4: stores 16 bytes at byte"
    ),
    "log-sum-exp behind the sequence is stored": Mutant(
        "blocks/epilogue.cuh", r" && row < q_len\b", "", "st_global_f32: stores 4 bytes at byte offset"
    ),
    "O overwrites Q while others read it": Mutant(
        "blocks/epilogue.cuh", r"sync_warp\(\);(?=\s*//)", "", "st_shared_u32: race"
    ),
    "O is read before it is written": Mutant(
        "blocks/epilogue.cuh", r"sync_warp\(\);(?!\s*//)", "", "ld_shared_v4: race|st_shared_u32: race"
    ),
    "pages behind the sequence are looked up": Mutant(
        "blocks/paged_kv.cuh",
        r"token < end_row \? (ld_global_s32\(.*?\)\)) : 0",
        r"\1",
        "ld_global_s32: .* byte offset",
        "fmha_fwd_sm90_bf16_d64_paged",
    ),
    "K is read where V lies": Mutant("forward/mma.cuh", r"address\.k \+ stage_offset", "address.v + stage_offset", ""),
}


def outputs(kernel: emulator.Kernel, spec: KernelSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Two query tiles, four KV tiles, neither full."""
    generator = torch.Generator().manual_seed(0)
    dim = spec.head_dim
    q, k, v = (torch.randn(1, rows, 1, dim, generator=generator).to(torch.bfloat16) for rows in (130, 200, 200))
    options: dict[str, Any] = {}
    if spec.kv is KvLayout.PAGED:
        k, v = (torch.cat([x, x[:, :8]], 1).view(13, 16, 1, dim) for x in (k, v))  # 12 pages and a half
        options["page_table"] = torch.arange(13, dtype=torch.int32)[None]
        options["seqused_k"] = torch.tensor([200], dtype=torch.int32)
    out, lse = direct.run(kernel, spec, q, k, v, causal=True, return_lse=True, **options)
    return out, lse


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path) -> None:
    assert_caught(MUTANTS[name], tmp_path / "fmha", outputs)


@pytest.mark.parametrize("name", sorted({mutant.spec for mutant in MUTANTS.values()}))
def test_the_real_kernel_is_clean_and_the_same_in_every_order(name: str) -> None:
    assert_the_same_in_every_order(KernelSpec.parse(name), outputs)

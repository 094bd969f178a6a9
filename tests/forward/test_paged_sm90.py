# SPDX-License-Identifier: Apache-2.0
"""Paged K and V on Hopper's own kernels: every page size against every cut, nothing of a stranger's page in sight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.caches import LAYOUTS, paged, queries
from helpers.mutants import Mutant, assert_caught, assert_the_same_in_every_order
from helpers.numbers import REL_L2
from hypothesis import given, settings
from hypothesis import strategies as st

import fmha_runtime as fmha
from fmha_runtime.device import emulator
from fmha_runtime.device.emulator import Order
from fmha_runtime.kernels.spec import HEAD_DIMS, KernelSpec
from fmha_runtime.kernels.tile import Tile
from fmha_runtime.ops import obtain
from fmha_runtime.ops.forward import direct, reference
from fmha_runtime.problem.arguments import PAGE_SIZES

pytestmark = pytest.mark.emulator

DEVICE = "emulator:sm90a"  # for which no decode kernel comes first
SPEC = KernelSpec.parse("fmha_fwd_sm90a_bf16_d80_paged")


def agree(q, k, v, lengths, table, **options):
    chosen = fmha.explain(q, k, v, seqused_k=lengths, page_table=table, device=DEVICE, **options).chosen
    assert (chosen.arch.value, chosen.kv.value) == ("sm90a", "paged")
    out, lse = fmha.attention_with_kvcache(
        q, k, v, cache_seqlens=lengths, page_table=table, return_lse=True, device=DEVICE, **options
    )
    extra = {key: x for key, x in options.items() if key not in ("cu_seqlens_q", "max_seqlen_q")}
    extra |= {"seqused_k": lengths, "page_table": table}
    if "cu_seqlens_q" in options:
        ref, ref_lse = reference.attention_varlen(q, k, v, options["cu_seqlens_q"], None, **extra)
    else:
        ref, ref_lse = reference.attention(q, k, v, **extra)
    assert ref.isfinite().all()
    assert (out.double() - ref).norm() <= REL_L2[q.dtype] * ref.norm()
    assert torch.equal(lse.isinf(), ref_lse.isinf())
    assert (lse.double() - ref_lse).nan_to_num(0).abs().max() < 1e-3
    return out


@pytest.mark.parametrize("page", PAGE_SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_page_sizes_and_layouts(page, layout):
    k, v, table, lengths = paged((130, 1, 0, 257), page, 2, 64, layout=layout)
    agree(queries(4, 20, 4, 64), k, v, lengths, table, causal=True)


@pytest.mark.parametrize("page", [8, 16, 64, 256])
@pytest.mark.parametrize("d,dv", HEAD_DIMS)
def test_every_cut_finds_its_pages(d, dv, page):
    """Tiles of 64 to 128 keys, smaller and larger than a page."""
    k, v, table, lengths = paged((270, 33), page, 1, d, dv=dv)
    agree(queries(2, 70, 2, d), k, v, lengths, table)


@pytest.mark.parametrize("page", [8, 16, 64, 256])
@pytest.mark.parametrize("keys", [48, 112])
def test_tiles_that_begin_inside_a_page(keys, page):
    """The catalogue has no such cut at present; tuning and callers may ask for one."""
    tile = Tile.parse(f"192x{keys} w16 s3 c1")
    k, v, table, lengths = paged((270, 33), page, 1, 80)
    q = queries(2, 70, 2, 80)
    options = {"seqused_k": lengths, "page_table": table}
    out = direct.run(obtain.kernel(SPEC, device="emulator", tile=tile), SPEC, q, k, v, tile=tile, **options)
    ref, _ = reference.attention(q, k, v, **options)
    assert (out.double() - ref).norm() <= REL_L2[q.dtype] * ref.norm()


@pytest.mark.parametrize("d", [40, 128])
def test_fp16(d):
    k, v, table, lengths = paged((270, 33), 32, 1, d, dtype=torch.float16)
    agree(queries(2, 70, 2, d, torch.float16), k, v, lengths, table)


@pytest.mark.parametrize(
    "options",
    [
        {"alibi_slopes": torch.rand(4)},
        {"softcap": 5.0},
        {"sinks": torch.randn(4)},
        {"attention_chunk": 48, "causal": True},
        {"window": (54, 0)},
        {"scale": 0.3},
        {"mask": torch.rand(3, 4, 33, 257) < 0.3},
    ],
    ids=lambda o: next(iter(o)),
)
@pytest.mark.parametrize("d", [64, 80])
def test_options(options, d):
    k, v, table, lengths = paged((130, 61, 257), 32, 2, d)
    q = queries(3, 33, 4, d)
    out = agree(q, k, v, lengths, table, **options)
    plain = fmha.attention_with_kvcache(q, k, v, cache_seqlens=lengths, page_table=table, device=DEVICE)
    assert not torch.equal(out, plain)


def test_queries_of_different_lengths():
    """Chunked prefill next to decoding: 1, 250, 0 and 70 new tokens on caches of different lengths."""
    lengths = (200, 250, 9, 131)
    k, v, table, used = paged(lengths, 16, 2, 64)
    new = (1, 250, 0, 70)
    q = queries(1, sum(new), 4, 64)[0]
    cu = torch.tensor([0, *new]).cumsum(0).int()
    agree(q, k, v, used, table, cu_seqlens_q=cu, max_seqlen_q=250, causal=True)


def test_a_plan_takes_another_pool_of_the_same_geometry():
    q = queries(2, 33, 4, 64)
    plan = None
    for seed in (0, 1):
        k, v, table, lengths = paged((130, 61), 16, 2, 64, seed=seed)
        lens = {"seqused_k": lengths, "page_table": table}
        plan = plan or fmha.plan(q, k, v, device=DEVICE, **lens)
        assert torch.equal(plan.run(q, k, v, **lens), agree(q, k, v, lengths, table))


@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=3), sq=st.integers(1, 200),
    page=st.sampled_from(PAGE_SIZES), seed=st.integers(0, 99), causal=st.booleans(), d=st.sampled_from([32, 80]),
    window=st.none() | st.integers(0, 300),
)  # fmt: skip
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_lengths(lengths, sq, page, seed, causal, d, window):
    k, v, table, used = paged(tuple(lengths), page, 1, d, seed=seed)
    q = queries(len(lengths), sq, 2, d)
    options = {"causal": causal, "window": (window, None), "page_table": table}
    out, lse = fmha.attention_with_kvcache(q, k, v, cache_seqlens=used, return_lse=True, device=DEVICE, **options)
    ref, ref_lse = reference.attention(q, k, v, seqused_k=used, **options)
    assert (out.double() - ref).abs().max() < 3e-2
    assert torch.equal(lse.isinf(), ref_lse.isinf())


# --- mutants


def mutant(pattern: str, replacement: str, fault: str, file: str = "forward/wgmma_paged.cuh") -> Mutant:
    return Mutant(file, pattern, replacement, fault, SPEC.name)


MUTANTS = {
    "pages behind the sequence are looked up": mutant(
        r"token < k_len \? (ld_global_s32\(.*?\)) : -1", r"\1", "ld_global_s32: .* byte offset"
    ),
    "pages behind the sequence are left out": mutant(
        r"for \(int g = 0; g < groups; \+\+g\) \{", "for (int g = 0; g < groups && page >= 0; ++g) {", "deadlock"
    ),
    "every piece is of the first page": mutant(r"page = next_page;", "", ""),
    "every piece starts its page": mutant(r"const int page_row = [^;]*;", "const int page_row = 0;", ""),
    "every sequence reads the first one's table": mutant(r"batch \* p\.page_table_stride", "0 * batch", ""),
    "pieces larger than a page": mutant(
        r"return page_bits < kTileBits[^;]*;", "return kTileBits;", "deadlock|bytes announced|outside"
    ),
    "rows of V past the length stay": mutant(r"st_shared_v4\(group \+ byte, [^;]*;", "", "", "forward/wgmma.cuh"),
}


def outputs(kernel: emulator.Kernel, spec: KernelSpec) -> tuple[torch.Tensor]:
    """Pages that are smaller than a tile, and larger ones; the table ends with the last page of the last sequence."""
    found = []
    for page in (32, 256):
        k, v, table, lengths = paged((70, 333), page, 2, spec.head_dim)
        q = queries(2, 200, 2, spec.head_dim)
        table = table[:, : -(-333 // page)].contiguous()
        found.append(direct.run(kernel, spec, q, k, v, seqused_k=lengths, page_table=table))
    return (torch.cat(found),)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path) -> None:
    assert_caught(MUTANTS[name], tmp_path / "fmha", outputs, [Order.FORWARD])


def test_the_real_kernel_is_the_same_in_every_order() -> None:
    assert_the_same_in_every_order(SPEC, outputs)

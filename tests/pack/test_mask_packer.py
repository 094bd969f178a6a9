# SPDX-License-Identifier: Apache-2.0
"""The kernel that packs masks, on the emulator: every bit, every stride, and faults that must be noticed."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fmha_runtime as fmha
from fmha_runtime import config
from fmha_runtime.device import driver
from fmha_runtime.device.emulator import Order
from fmha_runtime.errors import EmulatorFault, InputError, UnsupportedProblem
from fmha_runtime.kernels import catalog, sources
from fmha_runtime.kernels.pack import family as pack_family
from fmha_runtime.kernels.spec import Arch, KernelSpec
from fmha_runtime.ops import obtain
from fmha_runtime.ops.pack import cases as verify_pack
from fmha_runtime.ops.pack import packer
from fmha_runtime.problem import packed_mask
from fmha_runtime.verify import run as verifier

SPEC = pack_family.spec(Arch.SM90)


@pytest.fixture(scope="module")
def kernel() -> Any:
    return obtain.kernel(SPEC, device="emulator")


def same(a: fmha.PackedMask, b: fmha.PackedMask) -> bool:
    return torch.equal(a.words, b.words) and torch.equal(a.any, b.any) and a.key == b.key


def random_mask(*shape: int, seed: int = 0, share: float = 0.5) -> Any:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.emulator
@given(
    batch=st.integers(1, 2), heads=st.integers(1, 3), rows=st.integers(0, 200), cols=st.integers(0, 300),
    offset=st.integers(0, 17), pad=st.integers(0, 17), seed=st.integers(0, 99),
    share=st.sampled_from([0.0, 0.01, 0.5, 1.0]), transposed=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_stride_and_offset(batch, heads, rows, cols, offset, pad, seed, share, transposed):
    """The emulator knows no byte outside the view: a load beside it is a fault, not luck."""
    kernel = obtain.kernel(SPEC, device="emulator")
    mask = random_mask(batch, heads, rows, cols, seed=seed, share=share)
    if transposed:
        mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        room = torch.ones(batch, heads, rows, offset + cols + pad, dtype=torch.bool)
        room[..., offset : offset + cols] = mask
        mask = room[..., offset : offset + cols]
    assert same(packer.run(kernel, mask), packed_mask.pack(mask))


@pytest.mark.emulator
@given(
    lens=st.lists(st.integers(0, 150), min_size=1, max_size=8),
    heads=st.integers(1, 2), more=st.integers(0, 70), cols=st.integers(1, 140), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=30, deadline=None, derandomize=True)
def test_varlen(lens, heads, more, cols, seed):
    kernel = obtain.kernel(SPEC, device="emulator")
    cu = torch.tensor([0, *lens]).cumsum(0).int()
    mask = random_mask(heads, sum(lens) + more, cols, seed=seed)
    got = packer.run(kernel, mask, cu)
    assert same(got, packed_mask.pack(mask, cu_seqlens_q=cu))
    assert torch.equal(fmha.unpack_mask(got, cu_seqlens_q=cu), mask)


def test_columns_beyond_one_word_of_blocks(kernel):
    mask = random_mask(1, 2, 70, 5000, share=0.0005)
    got = packer.run(kernel, mask)
    assert got.any.shape == (1, 2, 2, 3)
    assert same(got, packed_mask.pack(mask))


@pytest.mark.parametrize("value", [1, 2, 127, 128, 255])
def test_any_nonzero_byte_is_true(kernel, value):
    mask = random_mask(1, 1, 65, 131)
    assert same(packer.run(kernel, mask.to(torch.uint8) * value), packed_mask.pack(mask))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float32, torch.bfloat16, torch.float64])
def test_other_dtypes(kernel, dtype):
    bits = random_mask(1, 1, 5, 70)
    mask = bits.to(dtype) * -1
    if dtype.is_floating_point:  # what SDPA adds: -0.0 is 0
        mask = torch.full_like(mask, -0.0).masked_fill(~bits, -torch.inf)
    assert same(packer.run(kernel, mask), packed_mask.pack(bits))


def test_numpy_and_torch_pack_alike():
    for shape in ((1, 1, 1, 1), (2, 3, 65, 131), (1, 2, 100, 2300), (1, 1, 0, 5), (1, 1, 5, 0)):
        mask = random_mask(*shape, share=0.02)
        words, seen = packed_mask._pack_torch(mask)
        want = packed_mask.pack(mask)
        assert torch.equal(words, want.words) and torch.equal(seen, want.any)


@pytest.mark.emulator
def test_order_of_threads_does_not_matter():
    kernel, mask = obtain.kernel(SPEC, device="emulator"), random_mask(1, 1, 130, 300)
    for kernel.order in Order:
        assert same(packer.run(kernel, mask), packed_mask.pack(mask))


def test_wrong_lengths_stay_inside_the_mask(kernel):
    """cu_seqlens_q is not read on the host: sequences behind the tokens must not lead the kernel out of the mask."""
    mask = random_mask(1, 70, 90)
    packer.run(kernel, mask, torch.tensor([0, 50, 500], dtype=torch.int32))


def test_shapes_that_are_none(kernel):
    with pytest.raises(InputError, match=r"\[Sq, Sk\] or \[B or 1, H or 1, Sq, Sk\]"):
        packer.run(kernel, random_mask(3, 4, 5))
    with pytest.raises(InputError, match="varlen needs"):
        packer.run(kernel, random_mask(1, 3, 4, 5), torch.tensor([0, 4], dtype=torch.int32))


def test_a_gpu_without_a_packer_is_named(monkeypatch):
    monkeypatch.setattr(driver, "capability", lambda index: (7, 5))
    packer.spec_for.cache_clear()
    with pytest.raises(UnsupportedProblem, match=r"compute capability 7\.5"):
        packer.spec_for(0)
    monkeypatch.setattr(driver, "capability", lambda index: (9, 0))
    assert packer.spec_for(0).name == "fmha_pack_sm90_u8"
    packer.spec_for.cache_clear()


MUTANTS = {
    "columns behind the row are read": (r"col \+ i < cols", "true", "ld_global_u8: reads 1 bytes"),
    "vectors reach behind the row": (r" && col - shift \+ 32 <= cols", "", "ld_global_v4: reads 16 bytes"),
    "vectors reach before the row": (r"col >= shift && ", "", "ld_global_v4: reads 16 bytes"),
    "rows behind the mask are read": (r"row \+ 8 < rows\.end \? p\.cols : 0", "p.cols", "reads 1 bytes|reads 16 bytes"),
    "no barrier before the sum": (r"sync_cta\(\);", "", "race|nobody has written"),
    "words behind the last block": (r"if \(block < p\.col_blocks\) ", "", "st_global_u32: stores 4 bytes|wrong"),
    "lanes 1 and 2 not swapped": (r"lane % 2 \* 2 \+ lane % 4 / 2", "lane % 4", "wrong"),
    "only 0x01 is true": (r"\(\(\(x & 0x7f7f7f7fu\) \+ 0x7f7f7f7fu\) \| x\) & 0x80808080u", "x << 7", "wrong"),
    "shifted by words only": (r"pair >> \(c\.shift % 4 \* 8\)", "pair", "wrong"),
    "a sequence late": (r"/ 64 \+ middle <= row_block", "/ 64 + middle < row_block", "wrong|reads"),
}


@pytest.mark.emulator
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path) -> None:
    pattern, replacement, fault = MUTANTS[name]
    shutil.copytree(config.kernel_src() / "fmha", tmp_path / "fmha")
    file = tmp_path / "fmha" / "pack/packer.cuh"
    text, count = re.subn(pattern, replacement, file.read_text())
    assert count == 1, f"{pattern!r} matches {count} times, not once: the mutant must follow the kernel"
    file.write_text(text)
    kernel = obtain.from_source(sources.render(SPEC, catalog.tile(SPEC)), SPEC.name, [tmp_path / "fmha"])
    said = []
    for lens in (None, torch.tensor([0, 3, 70, 99], dtype=torch.int32)):
        # Rows begin anywhere, the first one too, and the last byte of the last row is the end.
        room = torch.randint(0, 3, (5 + 99 * 131,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        mask = room[5:].view(99, 131)
        try:
            got = packer.run(kernel, mask, lens)
        except EmulatorFault as error:
            said.append(str(error))
        else:
            said.append("" if same(got, packed_mask.pack(mask, cu_seqlens_q=lens)) else "wrong")
    assert re.search(fault, " ".join(said)), said


# --- verification


def report(change: Any) -> verifier.Report:
    """Of a packer that is right but for ``change(words, any)``."""

    def run(mask: Any, cu: Any, out: Any = None) -> fmha.PackedMask:
        right = packed_mask.pack(mask, cu_seqlens_q=cu)
        words, seen = (o.copy_(r) for o, r in zip(out, (right.words, right.any), strict=True)) if out else (
            right.words, right.any,
        )  # fmt: skip
        change(words, seen)
        return fmha.PackedMask(words, seen, right.rows, right.cols, right.sequences)

    return verifier.verify_kernel(SPEC, device="emulator", quick=True, runner=run)


def test_verification_passes_a_right_packer():
    found = report(lambda words, seen: None)
    assert found.ok and len(found.passed) > 40
    assert next(found.lines()).startswith(f"ok    {SPEC.name}") and "0 wrong words" in next(found.lines())


def flip_a_bit(words, seen):
    words.view(-1)[-1:] ^= 1 << 17


def forget_a_block(words, seen):
    seen.view(-1)[:1] &= ~1


def write_behind(words, seen):
    if words.storage_offset():
        words.as_strided((1,), (1,), words.storage_offset() + words.numel())[0] = 0


def write_before(words, seen):
    if seen.storage_offset():
        seen.as_strided((1,), (1,), seen.storage_offset() - 1)[0] = 0


@pytest.mark.parametrize(
    ("change", "check"),
    [(flip_a_bit, "output"), (forget_a_block, "output"), (write_behind, "canary"), (write_before, "canary")],
)
def test_verification_fails_a_wrong_packer(change, check):
    found = report(change)
    assert {f.check for r in found.failed for f in r.failures} >= {check}


def test_cases_of_every_kind():
    found = verify_pack.cases()
    assert [c.id for c in found] == list(range(len(found)))
    assert verifier.cases(SPEC) == found
    assert {c.layout for c in found} == set(verify_pack.LAYOUTS)
    assert verifier.parse_case("fmha_pack_sm90_u8/3") == (SPEC, 3)
    for layout in verify_pack.LAYOUTS:
        case = next(c for c in found if c.layout == layout and c.rows > 60 and c.cols > 60 and not c.lens)
        one, two = (verify_pack.inputs(SPEC, case, "cpu")[0] for _ in "ab")
        assert torch.equal(one, two) and one.shape == (case.batch, case.heads, case.rows, case.cols)


@pytest.mark.emulator
def test_the_kernel_verifies_on_the_emulator():
    found = verifier.verify_kernel(KernelSpec.parse("fmha_pack_sm80_u8"), device="emulator", quick=True)
    assert found.ok, "\n".join(found.lines())
    assert verifier.to_record(replace(found, complete=True)).worst_ratio == 0

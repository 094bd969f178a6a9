# SPDX-License-Identifier: Apache-2.0
"""The cases and checks of the kernels that pack masks: every bit must be the one that numpy packs.

Like those of attention kernels: awkward shapes and strides, poisoned surroundings (a byte outside the mask is
nonzero, which would show as a bit), canaries around both outputs, a second run that must give the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ...kernels.spec import KernelSpec
from ...problem import packed_mask
from ...problem.packed_mask import PackedMask
from ..suite import CaseResult, Failure, checked

if TYPE_CHECKING:
    from torch import Tensor

PackRunner = Callable[..., PackedMask]
"""``runner(mask, cu_seqlens_q, out=None)``, as mask_packer.run after the kernel."""

LAYOUTS = ("contiguous", "aligned rows", "any rows", "transposed", "every other", "shared heads")
SHAPES = (
    *((1, 1), (1, 64), (64, 64), (3, 3), (65, 63), (16, 128), (113, 203), (64, 2048), (63, 2049), (130, 4100)),
    *((0, 5), (5, 0), (1, 8192), (1023, 1024), (300, 65)),
)
_CANARY = -0x35014542
_GUARD = 64  # words


EDITION = 2  # as EDITION of forward/check.py


def limits() -> dict[str, float]:
    """What the checks allow: not one wrong word."""
    return {"edition": EDITION, "wrong_words": 0}


@dataclass(frozen=True)
class PackCase:
    """One mask. ``lens`` are the lengths of varlen sequences, () of a dense mask; ``spare`` tokens are behind them."""

    id: int
    batch: int
    heads: int
    rows: int
    cols: int
    layout: str = "contiguous"
    dtype: str = "bool"
    share: float = 0.5
    lens: tuple[int, ...] = ()
    spare: int = 0
    quick: bool = False
    normal: bool = False  # of attention's cases: whether the relative error counts

    def __str__(self) -> str:
        shape = f"b={self.batch} h={self.heads} {self.rows}x{self.cols}"
        lens = f" varlen {','.join(map(str, self.lens))} and {self.spare} more" if self.lens else ""
        return f"mask {shape}{lens} {self.dtype} {self.layout} {self.share}"

    def products(self, spec: KernelSpec) -> int:
        """What it costs on the emulator, in the unit of attention's cases: about a microsecond."""
        rows = self.rows + 64 * len(self.lens)
        return 300 * self.batch * self.heads * -(-rows // 64) * -(-self.cols // 2048)


@cache
def cases() -> tuple[PackCase, ...]:
    """Every case, ``cases()[i].id == i``. Append only: ids are part of what people quote."""
    found: list[dict[str, Any]] = []
    for i, (rows, cols) in enumerate(SHAPES):
        for j, layout in enumerate(LAYOUTS):
            batch, heads = ((1, 1), (2, 3), (3, 1), (1, 2))[(i + j) % 4]
            share, dtype = (0.5, 0.01, 0.99)[(i + j) % 3], ("bool", "uint8", "int8")[j % 3]
            settings = {"batch": batch, "heads": heads, "rows": rows, "cols": cols, "layout": layout}
            found.append({**settings, "share": share, "dtype": dtype, "quick": (i + j) % 3 == 0})
    lengths = ((1, 0, 57, 130, 0, 3), (64, 64), (63, 65, 0, 0, 1, 128), (0,), (300,), (1,) * 70)
    for i, lens in enumerate(lengths):
        for j, layout in enumerate(LAYOUTS):
            settings = {"batch": 1, "heads": 1 + j % 2, "rows": sum(lens) + 7 * (j % 3), "cols": (90, 64, 2100)[i % 3]}
            found.append({**settings, "layout": layout, "lens": lens, "spare": 7 * (j % 3), "quick": (i + j) % 3 == 0})
    for dtype in ("int32", "float32", "bfloat16", "int64"):
        found.append({"batch": 2, "heads": 2, "rows": 70, "cols": 131, "dtype": dtype, "quick": True})
    for share in (0.0, 1.0):
        found.append({"batch": 1, "heads": 2, "rows": 100, "cols": 2300, "share": share, "quick": True})
    found.append({"batch": 1, "heads": 1, "rows": 4096, "cols": 8192, "share": 0.001})
    found.append({"batch": 2, "heads": 8, "rows": 1500, "cols": 3001, "layout": "any rows"})
    found.append({"batch": 300, "heads": 2, "rows": 3, "cols": 130})
    return tuple(PackCase(id=i, **settings) for i, settings in enumerate(found))


def inputs(spec: KernelSpec, case: PackCase, device: str) -> tuple[Tensor, Tensor | None]:
    """The mask, laid out as the case says, and cu_seqlens_q; the same at every call."""
    import torch

    digest = hashlib.sha256(f"{spec.name}/{case.id}".encode()).digest()
    random = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
    shape = (case.batch, case.heads, case.rows, case.cols)
    bits = torch.rand(shape, generator=random, device=device) < case.share
    if case.dtype == "bool":
        mask = bits
    elif case.dtype in ("uint8", "int8"):  # any nonzero value is true
        values = torch.randint(1, 256, shape, generator=random, device=device)
        mask = (bits * values).to(torch.uint8).view(getattr(torch, case.dtype))
    elif case.dtype.startswith(("float", "bfloat")):  # as SDPA adds them
        mask = torch.zeros(shape, dtype=getattr(torch, case.dtype), device=device).masked_fill(~bits, -torch.inf)
    else:
        mask = bits.to(getattr(torch, case.dtype)) * -2
    mask = _place(mask, case.layout)
    if not case.lens:
        return mask, None
    ends = torch.tensor([sum(case.lens[:i]) for i in range(len(case.lens) + 1)], dtype=torch.int32)
    return mask[0], ends.to(device)


def _place(mask: Tensor, layout: str) -> Tensor:
    """A view with the values of a mask in a larger buffer whose other elements are nonzero."""
    batch, heads, rows, cols = mask.shape
    if layout == "contiguous":
        return mask.contiguous()
    if layout == "shared heads":  # what a broadcast leaves
        return mask[:, :1].expand(mask.shape)
    if layout == "transposed":
        room = mask.new_ones(batch, cols, heads, rows + 3)
        view = room.permute(0, 2, 3, 1)[:, :, 1 : 1 + rows]
    elif layout == "every other":
        view = mask.new_ones(batch, heads, rows, 2 * cols + 1)[..., 1::2]
    else:
        first, pad = (16, -cols % 16) if layout == "aligned rows" else (5, 6)
        view = mask.new_ones(batch, rows, heads, first + cols + pad).transpose(1, 2)[..., first : first + cols]
    return view.copy_(mask)


def check_case(spec: KernelSpec, case: PackCase, device: str, runner: PackRunner) -> CaseResult:
    """Run one case with tensors on a torch device and apply every check. Errors are counted in words."""
    return checked(case, lambda: _check(spec, case, device, runner))


def _check(spec: KernelSpec, case: PackCase, device: str, runner: PackRunner) -> tuple[list[Failure], float]:
    import torch

    mask, cu = inputs(spec, case, device)
    want = packed_mask.pack(mask.cpu(), cu_seqlens_q=None if cu is None else cu.cpu())
    rooms = [_guarded(part.shape, device) for part in (want.words, want.any)]
    got = runner(mask, cu, out=tuple(view for _, view in rooms))
    failures: list[Failure] = []
    wrong = 0
    form = (got.rows, got.cols, got.sequences)
    if form != (want.rows, want.cols, want.sequences):
        failures.append(Failure("output", f"returned (rows, cols, sequences) {form}"))
    for name, (room, view), right in zip(("words", "any"), rooms, (want.words, want.any), strict=True):
        found = view.cpu()
        differ = (found != right).nonzero()
        wrong += len(differ)
        if len(differ):
            at = tuple(differ[0].tolist())
            where: dict[str, Any] = {"coordinate": at, "got": int(found[at]), "want": int(right[at])}
            failures.append(Failure("output", f"{len(differ)} words of {name} are wrong,", **where))
        edges = torch.cat([room[:_GUARD], room[_GUARD + view.numel() :]])
        if not bool((edges == _CANARY).all()):
            failures.append(Failure("canary", f"words before or after {name} were written"))
    again = runner(mask, cu)
    if not (torch.equal(again.words, got.words) and torch.equal(again.any, got.any)):
        failures.append(Failure("repeat", "another buffer, or a second run, gives other bits"))
    return failures, float(wrong)


def _guarded(shape: Any, device: str) -> tuple[Tensor, Tensor]:
    """A buffer of canaries and the view in it that the kernel fills."""
    import torch

    count = math.prod(shape)
    room = torch.full((count + 2 * _GUARD,), _CANARY, dtype=torch.int32, device=device)
    return room, room[_GUARD : _GUARD + count].view(shape)

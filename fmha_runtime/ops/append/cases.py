# SPDX-License-Identifier: Apache-2.0
"""The cases and checks of the kernels that fill caches: every byte of the cache must be the one that torch leaves.

Tokens go to places in random order, some nowhere; strides are odd, caches are slices of larger buffers whose other
bytes must stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ...kernels.spec import KernelSpec
from ..suite import CaseResult, Failure, checked
from . import reference

if TYPE_CHECKING:
    from torch import Tensor

AppendRunner = Callable[..., None]
"""``runner(k, v, k_cache, v_cache, slots, lengths, table, cu_seqlens)``, as appender.run after the kernel."""
EDITION = 1
LAYOUTS = ("nhd", "hnd", "joint", "sliced")


def limits() -> dict[str, float]:
    """What the checks allow: not one wrong byte."""
    return {"edition": EDITION, "wrong_bytes": 0}


@dataclass(frozen=True)
class AppendCase:
    """One call. ``lens`` are new tokens of each sequence; ``way`` is slots, lengths, pages or varlen."""

    id: int
    way: str
    lens: tuple[int, ...]
    page_size: int
    heads: int = 2
    dim: int = 64
    dim_v: int = 64
    dtype: str = "bfloat16"
    layout: str = "nhd"
    quick: bool = False
    normal: bool = False  # of attention's cases: whether the relative error counts

    def __str__(self) -> str:
        lens = ",".join(map(str, self.lens[:6])) + ("..." if len(self.lens) > 6 else "")
        dims = f"{self.dim}x{self.dim_v}"
        return (
            f"by {self.way}, new {lens}, pages of {self.page_size}, h={self.heads} d={dims} {self.dtype} {self.layout}"
        )

    def products(self, spec: KernelSpec) -> int:
        """What it costs on the emulator, in the unit of attention's cases: about a microsecond."""
        return 3 * sum(self.lens) * self.heads * (self.dim + self.dim_v)


@cache
def cases() -> tuple[AppendCase, ...]:
    """Every case, ``cases()[i].id == i``. Append only: ids are part of what people quote."""
    found: list[dict[str, Any]] = []
    for i, way in enumerate(("slots", "lengths", "pages", "varlen")):
        for j, layout in enumerate(LAYOUTS):
            lens = ((3, 3, 3), (1,) * 5, (17, 17))[(i + j) % 3] if way != "varlen" else (3, 0, 17, 1)
            # Heads are whole chunks of 16 bytes.
            dims = (64, 128) if j == 2 else ((64, 64), (128, 128), (192, 128), (40, 40), (8, 256))[(i * 4 + j) % 5]
            settings = {"way": way, "lens": lens, "page_size": (16, 1, 24, 528)[(i + j) % 4], "layout": layout}
            more = {"heads": (1, 2, 8, 5)[(i + j) % 4], "dim": dims[0], "dim_v": dims[1]}
            found.append({**settings, **more, "dtype": ("bfloat16", "float32", "uint8", "float16")[j], "quick": j == i})
    found.append({"way": "slots", "lens": (257,), "page_size": 16, "heads": 8, "dim": 128, "dim_v": 128})
    found.append({"way": "varlen", "lens": tuple(i % 7 for i in range(300)), "page_size": 16, "quick": True})
    found.append({"way": "pages", "lens": (4000, 4000), "page_size": 64, "heads": 8, "dim": 128, "dim_v": 128})
    return tuple(AppendCase(id=i, **settings) for i, settings in enumerate(found))


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case: a room with a cache in it for K and for V, the new tokens, where they go."""

    rooms: tuple[Tensor, Tensor]
    views: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
    new: tuple[Tensor, Tensor]
    places: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # slots, lengths, table, cu_seqlens


def inputs(spec: KernelSpec, case: AppendCase, device: str) -> Inputs:
    """The tensors of a case, the same at every call."""
    import torch

    digest = hashlib.sha256(f"{spec.name}/{case.id}".encode()).digest()
    random = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
    dtype, batch, tokens = getattr(torch, case.dtype), len(case.lens), sum(case.lens)

    def ints(values: Any, kind: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=kind, device=device)

    def fresh(*shape: int) -> Tensor:
        return torch.randint(0, 250, shape, generator=random, device=device).to(dtype)

    most = max(case.lens) + 40
    columns = 1 if case.way == "lengths" else -(-most // case.page_size)
    rows = most if case.way == "lengths" else case.page_size
    pages = batch * columns + 3 * (case.way != "lengths")
    made = [_room(case.layout, pages, rows, case.heads, dim, fresh) for dim in (case.dim, case.dim_v)]
    (k_room, k_view), (v_room, v_view) = made
    shape = (tokens,) if case.way in ("slots", "varlen") else (batch, case.lens[0])
    odd = 1 if case.layout == "sliced" else 0
    new = tuple(fresh(*shape, case.heads + odd, dim)[..., odd:, :] for dim in (case.dim, case.dim_v))
    table = torch.randperm(pages, generator=random, device=device)[: batch * columns].view(batch, columns).int()
    lengths = ints([(i * 13) % 41 for i in range(batch)])
    if case.way == "slots":
        slots = torch.randperm(pages * rows, generator=random, device=device)[:tokens].long()
        slots[::5] = -1
        slots[3::11] = pages * rows + 7
        slots[4::13] = 1 << 40
        places: Any = (slots, None, None, None)
    elif case.way == "lengths":
        lengths[0] = 39  # without room for all
        places = (None, lengths, None, None)
    else:
        if pages > 1:
            table[-1, -1] = -1
        cu = ints([sum(case.lens[:i]) for i in range(batch + 1)]) if case.way == "varlen" else None
        places = (None, lengths, table, cu)
    return Inputs((k_room, v_room), (k_view, v_view), (new[0], new[1]), places)


def _room(
    layout: str, pages: int, rows: int, heads: int, dim: int, fresh: Callable[..., Tensor]
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A buffer, and what of it is the cache [pages, rows, heads, dim]."""
    if layout == "hnd":
        return fresh(pages, heads, rows, dim), lambda room: room.transpose(1, 2)
    if layout == "joint":
        return fresh(pages, 2, rows, heads, dim), lambda room: room[:, 1]
    if layout == "sliced":
        return fresh(pages, rows, heads + 2, dim + 16), lambda room: room[:, :, 1 : 1 + heads, 16:]
    return fresh(pages, rows, heads, dim), lambda room: room


def check_case(spec: KernelSpec, case: AppendCase, device: str, runner: AppendRunner) -> CaseResult:
    """Run one case with tensors on a torch device and apply every check. Errors are counted in elements."""
    return checked(case, lambda: _check(spec, case, device, runner))


def _check(spec: KernelSpec, case: AppendCase, device: str, runner: AppendRunner) -> tuple[list[Failure], float]:
    x = inputs(spec, case, device)
    want = [room.clone() for room in x.rooms]
    slots, lengths, table, cu = x.places
    caches = [view(room) for view, room in zip(x.views, want, strict=True)]
    if slots is None:
        assert lengths is not None
        form = tuple(x.new[0].shape[:-2])
        slots = reference.slots_of(form, lengths, cu, table, *caches[0].shape[:2])
    flat = (x.new[0].flatten(0, -3), x.new[1].flatten(0, -3))
    reference.write((caches[0], caches[1]), flat, slots)
    runner(*x.new, *(view(room) for view, room in zip(x.views, x.rooms, strict=True)), *x.places)
    failures, wrong = [], 0
    for name, got, right in zip(("K", "V"), x.rooms, want, strict=True):
        differ = (got != right).nonzero()
        wrong += len(differ)
        if len(differ):
            at = tuple(differ[0].tolist())
            numbers: dict[str, Any] = {"coordinate": at, "got": float(got[at]), "want": float(right[at])}
            failures.append(Failure("output", f"{len(differ)} elements of {name}'s buffer are wrong,", **numbers))
    return failures, float(wrong)

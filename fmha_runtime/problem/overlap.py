# SPDX-License-Identifier: Apache-2.0
"""Whether an output shares memory with what its kernel reads while it writes, or with itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    import torch

_MAX_WORK = 100_000
"""Steps that the exact comparison of two interleaved tensors may take; beyond them they count as overlapping."""


class Memory:
    """Where the elements of tensors of one geometry lie, their addresses aside."""

    __slots__ = ("_forms", "_known", "bytes")

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
        size = out.element_size()
        self._forms = [(tuple(t.shape), tuple(s * size for s in t.stride()), size) for t in (q, k, v, out)]
        self.bytes = [_extent(shape, strides) + size if 0 not in shape else 0 for shape, strides, _ in self._forms]
        self._known: set[tuple[int, int, int]] = set()

    def check(self, q: int, k: int, v: int, out: int) -> None:
        """``out`` at its address shares no byte with q, k and v at theirs; being q itself is fine, since a kernel has
        read a tile of q before it writes that tile.

        Raises:
            InputError: it does.
        """
        distances = (q - out, k - out, v - out)
        if distances in self._known:
            return
        end = out + self.bytes[3]
        for i, (name, at) in enumerate((("q", q), ("k", k), ("v", v))):
            if at >= end or out >= at + self.bytes[i]:
                continue
            if i == 0 and at == out and self._forms[0] == self._forms[3]:
                continue
            if _share(self._forms[i], at, self._forms[3], out):
                raise InputError(
                    f"out and {name} share memory (out is bytes {out:#x} to {end:#x}, {name} {at:#x} to "
                    f"{at + self.bytes[i]:#x}): {name} is read while out is written. Pass an out of its own; only q "
                    "itself, with the same strides, may be overwritten"
                )
        if len(self._known) < 1024:
            self._known.add(distances)


def check_out(out: torch.Tensor) -> None:
    """No two elements of an output lie in one place.

    Raises:
        InputError: they do, or might: strides that neither nest nor tell apart.
    """
    axes = sorted((s, n) for n, s in zip(out.shape, out.stride(), strict=True) if n > 1)
    reach = 0
    for stride, n in axes:
        if stride <= reach:
            raise InputError(
                f"out has shape {tuple(out.shape)} and strides {tuple(out.stride())}"
                + (", a stride of 0 among them" if stride == 0 else "")
                + ": several results would share one place in memory"
            )
        reach += (n - 1) * stride


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def _share(one: Any, one_at: int, other: Any, other_at: int) -> bool:
    """Whether two tensors whose ranges of addresses meet have a byte in common."""
    import numpy

    a, b = (numpy.asarray(_Pretended(form, at)) for form, at in ((one, one_at), (other, other_at)))
    try:
        return bool(numpy.shares_memory(a, b, max_work=_MAX_WORK))  # type: ignore[arg-type]
    except RuntimeError:  # numpy's TooHardError: it gave up
        return True


class _Pretended:
    """An array as numpy sees it. Nothing reads its elements, which may lie on a GPU."""

    def __init__(self, form: Any, at: int) -> None:
        shape, strides, size = form
        self.__array_interface__ = {
            "version": 3, "data": (at, True), "shape": shape, "strides": strides, "typestr": f"|V{size}",
        }  # fmt: skip

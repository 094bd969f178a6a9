# SPDX-License-Identifier: Apache-2.0
"""From the words of a command line to kernels of the catalogue, or to a problem for dispatch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from difflib import SequenceMatcher
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from ..errors import DriverError, InputError
from ..kernels import catalog
from ..kernels.spec import Arch, DType, KernelSpec, KvLayout, Mask, Op, Score
from ..problem.dispatch import Problem

_Word = TypeVar("_Word", bound=Enum)
_DIMS = re.compile(r"(\d+)(?:x(\d+))?")


@dataclass(frozen=True)
class Selection:
    """Which kernels a command is about: every criterion must hold; an empty one always does.

    ``names`` are kernel names or globs of them. ``head_dim`` words are "128" (any kernel with that
    head dim of q and k) or "192x128" (exactly this pair).
    """

    names: tuple[str, ...] = ()
    op: tuple[Op, ...] = ()
    arch: tuple[Arch, ...] = ()
    dtype: tuple[DType, ...] = ()
    head_dim: tuple[str, ...] = ()
    mask: tuple[Mask, ...] = ()
    score: tuple[Score, ...] = ()
    kv: tuple[KvLayout, ...] = ()
    short: tuple[bool, ...] = ()

    def __str__(self) -> str:
        words = list(self.names)
        for field in fields(self)[1:-1]:
            chosen = [getattr(value, "value", value) for value in getattr(self, field.name)]
            words += [f"{field.name} {' or '.join(chosen)}"] if chosen else []
        words += ["short" if short else "not short" for short in self.short]
        return ", ".join(words) or "everything"

    def kernels(self) -> tuple[KernelSpec, ...]:
        """The selected kernels, sorted by name.

        Raises:
            InputError: nothing is selected; the message has the nearest names.
        """
        tests = self._tests()
        everything = (*catalog.enumerate_specs(), *self._extended())
        found = tuple(spec for spec in everything if all(test(spec) for test in tests))
        if found:
            return found

        def distance(spec: KernelSpec) -> tuple[int, float]:
            likeness = max((_likeness(spec.name, name) for name in self.names), default=0.0)
            return sum(not test(spec) for test in tests), -likeness

        near = sorted(everything, key=distance)[:3]
        raise InputError(
            f"no kernel of the catalogue is {self}; the nearest are "
            f"{', '.join(spec.name for spec in near)}: `fmha list` shows all {len(catalog.enumerate_specs())}"
        )

    def _extended(self) -> list[KernelSpec]:
        """Kernels outside the catalogue whose whole name was given."""
        found = []
        for name in self.names:
            try:
                spec = KernelSpec.parse(name)
            except InputError:  # a pattern
                continue
            if catalog.exists(spec) and not catalog.is_core(spec):
                found.append(spec)
        return found

    def _tests(self) -> list[Callable[[KernelSpec], bool]]:
        tests: list[Callable[[KernelSpec], bool]] = []
        if self.names:
            tests.append(lambda spec: any(fnmatchcase(spec.name, name) for name in self.names))
        if self.head_dim:
            dims = [_dims(word) for word in self.head_dim]
            tests.append(lambda spec: any(spec.head_dim == d and dv in (None, spec.head_dim_v) for d, dv in dims))
        for axis in ("op", "arch", "dtype", "mask", "score", "kv", "short"):
            allowed = getattr(self, axis)
            if allowed:
                tests.append(lambda spec, a=axis, v=allowed: getattr(spec, a) in v)  # type: ignore[misc]
        if self.mask or self.score or self.kv:  # of attention; a packer has neither
            tests.append(lambda spec: spec.op not in (Op.PACK, Op.APPEND))
        return tests


def _likeness(name: str, pattern: str) -> float:
    return SequenceMatcher(None, name, pattern.replace("*", "")).ratio()


def _dims(word: str) -> tuple[int, int | None]:
    found = _DIMS.fullmatch(word)
    if found is None:
        raise InputError(f"{word!r} is not a head dim; write 128, or 192x128 for a pair")
    return int(found[1]), int(found[2]) if found[2] else None


def head_dims(words: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Head dim pairs: 128 is (128, 128), 192x128 is (192, 128).

    Raises:
        InputError: a word is neither.
    """
    pairs = map(_dims, words)
    return tuple((d, d if dv is None else dv) for d, dv in pairs)


def lengths(text: str) -> tuple[int, ...]:
    """Sequence lengths from ``512,1024``.

    Raises:
        InputError: one of them is not a positive number.
    """
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise InputError(f"{text!r} is not a list of lengths; write 512,1024,2048")
    return tuple(map(int, words))


_COUNTS = {"b": "batch", "sq": "seqlen_q", "sk": "seqlen_k", "h": "heads", "hk": "heads_k"}
_FLAGS: dict[str, tuple[str, Any]] = {
    "causal": ("causal", True),
    "varlen": ("varlen", True),
    "packed": ("mask", Mask.PACKED),
    "alibi": ("score", Score.ALIBI),
    "softcap": ("score", Score.SOFTCAP),
    "paged": ("kv", KvLayout.PAGED),
}
_FORM = (
    "the words are b=2 sq=1024 sk=1024 h=32 hk=8 d=128 (or d=192x128) dtype=bf16 op=fwd "
    "window=127,0 and " + " ".join(_FLAGS)
)


def problem(words: Sequence[str], arch: Arch) -> Problem:
    """The problem that words such as ``sq=1 sk=4096 h=32 hk=8 d=128 dtype=bf16 causal`` describe.

    ``d`` and ``dtype`` are needed, except with ``op=pack``; counts default to 1, ``hk`` to ``h``, ``sk`` to ``sq``, and
    without either to any number.

    Raises:
        InputError: a word is unknown, lacks its value, or ``d`` or ``dtype`` is missing.
    """
    asked: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key in _FLAGS and not equals:
            name, meaning = _FLAGS[key]
            asked[name] = meaning
        elif key in _COUNTS:
            asked[_COUNTS[key]] = _count(key, value)
        elif key == "d":
            head_dim, head_dim_v = _dims(value)
            asked |= {"head_dim": head_dim, "head_dim_v": head_dim_v or head_dim}
        elif key == "dtype":
            asked["dtype"] = _member(DType, value)
        elif key == "op":
            asked["op"] = _member(Op, value)
        elif key == "window":
            asked["window"] = _window(value)
        else:
            raise InputError(f"{word!r} is not understood; {_FORM}")
    if asked.get("op") in (Op.PACK, Op.APPEND):
        return Problem(arch, DType.U8, 0, 0, asked["op"])
    missing = [word for word, name in (("d", "head_dim"), ("dtype", "dtype")) if name not in asked]
    if missing:
        raise InputError(f"{' and '.join(f'{word}=' for word in missing)} is missing; {_FORM}")
    asked.setdefault("seqlen_k", asked.get("seqlen_q"))
    asked.setdefault("heads_k", asked.get("heads", 1))
    if asked["heads_k"] == 0 or asked.get("heads", 1) % asked["heads_k"]:
        raise InputError(
            f"h={asked.get('heads', 1)} query heads cannot share hk={asked['heads_k']} key heads "
            "evenly; h must be a multiple of hk"
        )
    if asked.get("causal"):
        asked["window"] = (asked.get("window", (None, None))[0], 0)
    return Problem(arch=arch, **asked)


def _count(key: str, value: str) -> int:
    if not value.isdecimal():
        raise InputError(f"{key}={value} is not a count; {_FORM}")
    return int(value)


def _member(kind: type[_Word], value: str) -> _Word:
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(member.value for member in kind)
        raise InputError(f"{kind.__name__.lower()}={value} is unknown; it is one of {allowed}") from None


def _window(value: str) -> tuple[int | None, int | None]:
    parts = value.split(",")
    if len(parts) != 2 or not all(re.fullmatch(r"\d+|-1|none|", part.lower()) for part in parts):
        raise InputError(f"window={value} is not a pair of key counts; write window=127,0, and -1 for unlimited")
    left, right = (int(part) if part.isdecimal() else None for part in parts)
    return left, right


def device_arch() -> Arch:
    """The arch of the first GPU.

    Raises:
        DriverError: there is no GPU, or no kernels for it.
    """
    from ..device import driver

    known = ", ".join(arch.value for arch in Arch)
    if not driver.available():
        raise DriverError(f"no GPU here to take the arch from; add --arch, one of {known}")
    found = Arch.for_capability(*driver.capability(0))
    if found is None:
        raise DriverError(f"there are no kernels for GPU 0; add --arch, one of {known}")
    return found


def for_tuning(chosen: Selection) -> Selection:
    """What ``fmha tune`` is about: where nothing is said, the plain bf16 kernels of this GPU's first target.

    Raises:
        DriverError: no arch is given and there is no GPU.
    """
    chosen = replace(chosen, op=chosen.op or (Op.FWD,))
    if chosen.names:
        return chosen
    return replace(
        chosen,
        arch=chosen.arch or device_arch().targets[:1],
        dtype=chosen.dtype or (DType.BF16,),
        mask=chosen.mask or (Mask.BAND,),
        score=chosen.score or (Score.PLAIN,),
        kv=chosen.kv or (KvLayout.CONTIGUOUS,),
    )


def device(word: str) -> str:
    """The device that ``--device`` names, looked for before any work: "emulator" or "cuda:N".

    Raises:
        InputError: another word.
        DriverError: no such GPU.
    """
    from ..device import driver

    kind, _, index = word.partition(":")
    if kind == "emulator":
        return word
    if kind != "cuda" or not (index or "0").isdecimal():
        raise InputError(f"--device {word} is unknown; it is cuda, cuda:N or emulator")
    try:
        driver.device_info(int(index or 0))
    except DriverError as error:
        raise DriverError(
            f"no GPU to verify on ({error}); `--device emulator` runs the kernels on the CPU",
            code=error.code,
        ) from error
    return f"cuda:{index or 0}"


def without(option: str, arguments: Sequence[str]) -> list[str]:
    """Arguments less one option and its value."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument != option and not argument.startswith(f"{option}="):
            kept.append(argument)
        skip = argument == option
    return kept

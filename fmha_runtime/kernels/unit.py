# SPDX-License-Identifier: Apache-2.0
"""What a kernel's translation unit says: a header, its traits, its struct, the function that is its body."""

from __future__ import annotations

from typing import NamedTuple

from .spec import DType

ELEMENT = {DType.FP16: "fmha::Fp16", DType.BF16: "fmha::Bf16"}
"""The C++ name of an element type."""


class Unit(NamedTuple):
    """The parts of the unit that ``sources.render`` writes. Names are inside the namespace ``fmha``."""

    header: str
    """Inside ``kernel_src/fmha``."""
    traits: str
    params: str
    body: str


def template(name: str, *arguments: object) -> str:
    """``name<arguments>`` as C++ writes it; trailing ``False`` are left out, as the defaults that they are."""
    words = list(arguments)
    while words and words[-1] is False:
        words.pop()
    return f"{name}<{', '.join(str(word).lower() if isinstance(word, bool) else str(word) for word in words)}>"

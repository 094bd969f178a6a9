# SPDX-License-Identifier: Apache-2.0
"""The cases a kernel is verified on: awkward shapes crossed with its features. ``inputs.py`` makes their tensors.

Case ids are positions in one fixed list, the same for every kernel, and inputs are seeded by kernel
name and case id: ``fmha verify --case NAME/7`` replays exactly one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from ...errors import InputError
from ...kernels.spec import DType, KernelSpec, KvLayout, Mask, Op, Score
from ...problem.arguments import PAGE_SIZES

Band = tuple[bool, "tuple[int | None, int | None] | None"]  # (causal, window)

SHAPES = (
    *((1, 1), (3, 3), (1, 257), (64, 32), (113, 203), (128, 217), (239, 1), (799, 3)),
    *((1023, 1024), (1024, 1023)),
)
HEADS = ((1, 1), (6, 6), (6, 2), (8, 1), (32, 8))
BANDS: tuple[Band, ...] = (
    (False, None),
    (True, None),
    (False, (64, None)),
    (False, (None, 16)),
    (False, (17, 5)),
    (False, (0, 0)),
    (False, (10_000, 10_000)),
    (True, (127, None)),
)
LAYOUTS = ("bshd", "bhsd", "sliced", "packed")

# Warp-wide matrix products that a case may cost on the emulator, at about a million a second.
EMULATOR_BUDGET = {"full": 600_000, "quick": 150_000}


@dataclass(frozen=True)
class Case:
    """One problem. Lengths are per sequence; a dense case has the same length in every sequence."""

    id: int
    lens_q: tuple[int, ...]
    lens_k: tuple[int, ...]
    heads: int
    kv_heads: int
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    varlen: bool = False
    used_k: tuple[int, ...] | None = None
    layout: str = "bshd"
    scale_factor: float = 1.0  # of the default scale
    qk_size: float = 1.0  # standard deviation of q and k
    v_size: float = 1.0
    softcap: float = 0.0
    slopes: str = ""  # ALiBi slopes of "heads", or of "batch" and heads
    sinks: float = 0.0  # standard deviation of the sinks; 0: none
    chunk: int | None = None
    page_size: int = 0  # 0: K and V are contiguous
    mask: float = 0.0  # share of keys that a packed mask shows; 0: none
    mask_of: str = "all"  # one mask for "all", or of "heads", "batch", "both"
    options: bool = False  # also check that every option changes the output
    quick: bool = False

    def __str__(self) -> str:
        if self.varlen:
            text = f"varlen q={_join(self.lens_q)} k={_join(self.lens_k)}"
        else:
            text = f"b={len(self.lens_q)} sq={self.lens_q[0]} sk={self.lens_k[0]}"
        text += f" h={self.heads}/{self.kv_heads}" + " causal" * self.causal
        text += "" if self.window is None else f" window={self.window}"
        text += "" if self.used_k is None else f" seqused_k={_join(self.used_k)}"
        text += "" if self.scale_factor == 1 else f" scale x{self.scale_factor}"
        text += "" if self.qk_size == 1 else f" q,k x{self.qk_size}"
        text += "" if self.v_size == 1 else f" v x{self.v_size}"
        text += f" softcap={self.softcap}" if self.softcap else ""
        text += f" alibi per {self.slopes}" if self.slopes else ""
        text += f" sinks x{self.sinks}" if self.sinks else ""
        text += f" chunk={self.chunk}" if self.chunk else ""
        text += f" pages of {self.page_size}" if self.page_size else ""
        text += f" mask of {self.mask_of} {self.mask}" if self.mask else ""
        return f"{text} {self.layout}" + " options" * self.options

    @property
    def normal(self) -> bool:
        """Whether the inputs are standard normal, which the relative L2 limits are for.

        A large sink takes nearly all the weight and leaves outputs among fp16's subnormal numbers, whose relative error
        is that of the format.
        """
        return self.qk_size == 1 and self.v_size == 1 and self.sinks <= 2

    def scale(self, spec: KernelSpec) -> float | None:
        """The scale to ask for; None is the default."""
        return None if self.scale_factor == 1 else self.scale_factor * spec.head_dim**-0.5

    def products(self, spec: KernelSpec) -> int:
        """Warp-wide m16n8k16 products, in whole 64x64 tiles and without regard to the mask."""
        tiles = sum(-(-q // 64) * -(-k // 64) for q, k in zip(self.lens_q, self.lens_k, strict=True))
        return self.heads * tiles * 2 * (spec.head_dim + spec.head_dim_v)


def cases(spec: KernelSpec) -> tuple[Case, ...]:
    """Every case of a kernel, ``cases(spec)[i].id == i``.

    Raises:
        InputError: no cases are written for kernels with this mask, score or KV layout.
    """
    if spec.dtype is DType.E4M3:
        raise InputError(
            f"there are no verification cases for {spec.name}: only 16-bit types are covered; "
            "add its cases to ops/forward/cases.py"
        )
    if spec.op is Op.DECODE:
        return _cases(_MIXED, spec.kv, (1, 16, 24, 64, 4, 528))
    return _cases(((spec.mask, spec.score),), spec.kv, PAGE_SIZES)


# Every mask and score of a kernel that decides at run time. Five and the other cycles of a list have no common factor.
_MIXED = (
    (Mask.BAND, Score.PLAIN),
    (Mask.PACKED, Score.PLAIN),
    (Mask.BAND, Score.ALIBI),
    (Mask.BAND, Score.SOFTCAP),
    (Mask.PACKED, Score.SOFTCAP),
)


@cache
def _cases(features: tuple[tuple[Mask, Score], ...], kv: KvLayout, pages: tuple[int, ...]) -> tuple[Case, ...]:
    return tuple(
        Case(id=i, **settings, **_features(settings, i, *features[i % len(features)], kv, pages))
        for i, settings in enumerate(_settings())
    )


def _features(
    settings: dict[str, Any], i: int, mask: Mask, score: Score, kv: KvLayout, pages: tuple[int, ...]
) -> dict[str, Any]:
    """What the kernel's features make of case ``i``; takes from ``settings`` what they exclude."""
    more: dict[str, Any] = {}
    if score is Score.SOFTCAP:
        more["softcap"] = (30.0, 5.0, 50.0, 1e5)[i % 4]
    if score is Score.ALIBI:
        more["slopes"] = ("heads", "batch")[i % 2]
    if mask is Mask.PACKED:
        more["mask"] = (0.5, 0.01, 0.95)[i % 3]
        large = settings["lens_q"][0] * settings["lens_k"][0] > 1 << 20
        more["mask_of"] = "all" if large else ("all", "heads", "batch", "both")[i % 4]
    if kv is KvLayout.PAGED:
        more["page_size"] = pages[i % len(pages)]
        if settings.get("layout") == "packed":  # a pool of pages is no slice of a projection
            settings["layout"] = ("bshd", "bhsd", "sliced")[i % 3]
    return more


def _settings() -> Iterator[dict[str, Any]]:
    """The list. Append only: ids are part of what people quote."""
    for i, (sq, sk) in enumerate(SHAPES):
        for j, (causal, window) in enumerate(BANDS):
            heads, kv_heads = HEADS[(i + j) % len(HEADS)]
            batch = 1 if sq > 500 else 1 + (i + j) % 3
            layout = LAYOUTS[(i + 2 * j) % len(LAYOUTS)]
            yield {
                **_dense(batch, sq, sk, heads, kv_heads, causal, window),
                "layout": "sliced" if layout == "packed" and sq != sk else layout,
                "scale_factor": (1.0, 1.0, 1.7)[(i + j) % 3],
                "quick": (i + j) % 4 == 0,
            }
    # Fewer keys than the tensor holds, the rest NaN: none at all, fewer than queries, all.
    for causal, window in BANDS:
        yield {
            **_dense(4, 113, 203, 6, 2, causal, window),
            "used_k": (203, 0, 64, 101),
            "quick": causal,
        }
    yield {**_dense(3, 1, 257, 8, 1), "used_k": (1, 257, 128), "quick": True}
    yield {**_dense(2, 64, 32, 6, 6, True), "used_k": (17, 32), "layout": "bhsd"}
    # Packed sequences of any length, none included, on either side.
    ragged = ((1, 0, 57, 130, 0, 3), (5, 9, 57, 200, 0, 3))
    alike = ((113, 1, 0, 64, 129), (113, 1, 0, 64, 129))
    keyless = ((70, 0, 33), (0, 12, 65))
    for i, (lens_q, lens_k) in enumerate((ragged, alike, keyless)):
        for j, (causal, window) in enumerate(BANDS):
            heads, kv_heads = HEADS[(i + j) % 4]
            yield {
                **{"lens_q": lens_q, "lens_k": lens_k, "heads": heads, "kv_heads": kv_heads},
                **{"causal": causal, "window": window, "varlen": True},
                "used_k": tuple(n - n // 3 for n in lens_k) if j % 2 else None,
                "layout": "packed" if lens_q == lens_k else ("bshd", "bhsd", "sliced")[j % 3],
                "quick": (i + j) % 3 == 0,
            }
    # Fused QKV projections.
    for n, heads, kv_heads, causal in ((128, 6, 6, False), (257, 6, 2, True), (65, 8, 1, True)):
        yield {**_dense(2, n, n, heads, kv_heads, causal), "layout": "packed", "quick": n == 65}
    # Sizes that make the softmax nearly one-hot, or flat.
    for qk_size, v_size in ((5.0, 100.0), (0.01, 1.0)):
        for causal in (False, True):
            yield {
                **_dense(1, 128, 217, 6, 2, causal),
                **{"qk_size": qk_size, "v_size": v_size, "quick": causal},
            }
    yield {**_dense(2, 48, 96, 6, 2), "options": True, "quick": True}
    # As large as real models use them.
    yield {**_dense(2, 2048, 2048, 32, 8, True), "layout": "packed"}
    yield _dense(1, 4096, 4096, 8, 1)
    yield {**_dense(1, 3000, 5001, 6, 2, True, (255, None)), "layout": "sliced"}
    yield _dense(4, 1, 8191, 32, 8, True)
    yield _dense(300, 3, 5, 8, 8, True)
    yield {
        **{"lens_q": (1500, 0, 4096, 33, 777), "lens_k": (1500, 0, 4096, 33, 777)},
        **{"heads": 32, "kv_heads": 8, "causal": True, "varlen": True, "quick": True},
    }

    # A key without a value in every row, small and overwhelming.
    for i, size in enumerate((1.0, 30.0)):
        for causal in (False, True):
            yield {**_dense(2, 113, 70, 6, 2, causal), "sinks": size, "quick": causal == bool(i)}
    yield {
        **{"lens_q": ragged[0], "lens_k": ragged[1], "heads": 8, "kv_heads": 1},
        **{"causal": True, "varlen": True, "sinks": 2.0},
    }
    # Chunks smaller and larger than a tile, on and off its edges.
    for i, (chunk, sq, sk) in enumerate(
        (
            (1, 33, 65),
            (37, 113, 203),
            (64, 128, 217),
            (100, 239, 300),
            (256, 300, 200),
            (8192, 70, 99),
        )
    ):
        for causal in (False, True):
            yield {
                **_dense(2, sq, sk, 6, 2, causal, (20, None) if i == 3 else None),
                **{"chunk": chunk, "sinks": float(i == 2), "quick": causal and i in (1, 3)},
            }
    yield {**_dense(1, 4096, 8192, 8, 1, True), "chunk": 2048}


def _dense(
    batch: int,
    sq: int,
    sk: int,
    heads: int,
    kv_heads: int,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
) -> dict[str, Any]:
    return {
        **{"lens_q": (sq,) * batch, "lens_k": (sk,) * batch, "heads": heads, "kv_heads": kv_heads},
        **{"causal": causal, "window": window},
    }


def _join(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))

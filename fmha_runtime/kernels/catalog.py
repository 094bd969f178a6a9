# SPDX-License-Identifier: Apache-2.0
"""Which kernels exist and with which tile. The only file that says so: re-tune in its table."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

from ..errors import InputError, UnsupportedProblem
from .spec import HEAD_DIMS, Arch, DType, KernelSpec, KvLayout, Mask, Op, Score

_TILE = re.compile(r"(\d+)x(\d+) w(\d+) s(\d+) c(\d+)( q)?")


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: query rows and keys of a step, warps of a CTA, K/V stages in shared
    memory.

    ``ctas_per_sm`` is the second number of ``__launch_bounds__``; ``q_in_regs`` keeps Q's fragments
    in registers.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    ctas_per_sm: int
    q_in_regs: bool = False

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return self.warps * 32

    def __str__(self) -> str:
        text = f"{self.block_m}x{self.block_n} w{self.warps} s{self.stages} c{self.ctas_per_sm}"
        return text + (" q" if self.q_in_regs else "")

    @classmethod
    def parse(cls, text: str) -> Tile:
        """The tile that ``str()`` writes as ``text``.

        Raises:
            InputError: the text is not a tile, or one that the kernels cannot be instantiated with.
        """
        found = _TILE.fullmatch(text)
        if found is None:
            raise InputError(
                f"{text!r} is not a tile; the form is "
                "'BLOCK_MxBLOCK_N wWARPS sSTAGES cCTAS_PER_SM[ q]', for example '128x64 w4 s2 c2'"
            )
        m, n, warps, stages, ctas = (int(number) for number in found.groups()[:5])
        # mma.sync kernels give each warp whole m16 tiles; Hopper's have a warpgroup a 64 rows and one more to produce.
        # The mask packer's several warps share 16 rows.
        packer = (m, n) == (64, 2048) and warps % 4 == 0
        whole = warps > 0 and (m % (16 * warps) == 0 or (m % 64 == 0 and warps == m // 16 + 4) or packer)
        if not whole or ctas < 1 or stages < 2 or m < 1 or n < 1 or n % 16:
            raise InputError(
                f"tile {text!r} cannot be built: block_m must be a multiple of 16 * warps, "
                "block_n of 16, with at least 2 stages and 1 CTA per SM"
            )
        return cls(m, n, warps, stages, ctas, found[6] is not None)


# One line a head-dim pair: sm80 (163 KiB of shared memory), sm90 (227 KiB), and sm86, sm89, sm120
# (99 KiB).
_COLUMN = {Arch.SM80: 0, Arch.SM90: 1, Arch.SM86: 2, Arch.SM89: 2, Arch.SM120: 2}
# sm90 was swept on an H200 on 2026-11-21 (docs/notes/tiles_sm80_family.md); the others take the same cut as far as
# their shared memory goes and have not been timed on their own hardware.
_TILES: dict[tuple[int, int], tuple[str, str, str]] = {
    (32, 32): ("128x64 w4 s2 c2 q", "128x64 w4 s2 c2 q", "128x64 w4 s2 c2 q"),
    (40, 40): ("128x96 w4 s2 c2", "128x96 w4 s2 c2", "128x96 w4 s2 c2"),
    (48, 48): ("128x96 w4 s2 c2", "128x96 w4 s2 c2", "128x96 w4 s2 c2"),
    (64, 64): ("64x64 w2 s2 c4", "64x64 w2 s2 c4", "128x64 w4 s2 c2"),
    (72, 72): ("128x64 w4 s2 c2", "128x64 w4 s2 c2", "64x64 w4 s2 c1"),
    (80, 80): ("128x64 w4 s2 c2", "128x64 w4 s2 c2", "64x64 w4 s2 c1"),
    (96, 96): ("64x64 w4 s2 c2", "128x64 w4 s2 c2", "64x64 w4 s2 c1"),
    (104, 104): ("128x48 w4 s2 c2", "128x48 w4 s2 c2", "64x64 w4 s2 c1"),
    (128, 128): ("64x64 w4 s2 c2 q", "64x64 w4 s2 c2 q", "64x64 w4 s2 c1 q"),
    (160, 160): ("64x64 w4 s2 c1", "64x64 w4 s2 c2", "64x48 w4 s2 c1"),
    (192, 192): ("64x48 w4 s2 c1", "64x48 w4 s2 c2", "64x32 w4 s2 c1"),
    (256, 256): ("128x48 w8 s2 c1", "128x64 w8 s2 c1", "64x32 w4 s2 c1"),
    (192, 128): ("64x64 w4 s2 c1", "128x32 w4 s2 c2", "64x32 w4 s2 c1"),
}

# Hopper's own kernels (TMA, wgmma), as `fmha tune` chose them in bf16 on an H200 on 2026-11-21 (docs/performance.md).
_HOPPER_TILES: dict[tuple[int, int], str] = {
    (32, 32): "256x80 w20 s8 c1",
    (40, 40): "256x80 w20 s6 c1",
    (48, 48): "192x128 w16 s3 c1",
    (64, 64): "192x128 w16 s3 c1",
    (72, 72): "256x64 w20 s3 c1",
    (80, 80): "192x112 w16 s3 c1",
    (96, 96): "192x112 w16 s3 c1",
    (104, 104): "192x96 w16 s3 c1",
    (128, 128): "192x64 w16 s4 c1",
    (160, 160): "192x64 w16 s3 c1",
    (192, 192): "128x112 w12 s2 c1",
    (256, 256): "128x80 w12 s2 c1",
    (192, 128): "128x128 w12 s2 c1",
}

SHORT_KEYS = 1024
"""Up to this many keys a short row comes before its long twin (dispatch.py)."""

# Cuts of Hopper's plain kernels that are faster where tiles are few, and 5 to 18 % slower at 16k tokens. Measured on an
# H200 on 2026-11-21: bf16, 512 tokens, TFLOP/s full/causal, the long cut -> this one. Head dim 160 had one until its
# long cut lost the spills of its producer: 1.13 of cuDNN's speed against 1.18 to 1.22 now.
_HOPPER_SHORT_TILES: dict[tuple[int, int], str] = {
    (32, 32): "256x64 w20 s8 c1",  # 246/159 -> 266/179
    (40, 40): "256x64 w20 s8 c1",  # 279/177 -> 294/193
    (48, 48): "256x64 w20 s8 c1",  # 321/210 -> 345/230
    (64, 64): "256x64 w20 s4 c1",  # 411/254 -> 429/292
    (80, 80): "256x48 w20 s4 c1",  # 376/231 -> 403/262
    (96, 96): "192x64 w16 s4 c1",  # 408/267 -> 453/299
    (104, 104): "192x64 w16 s4 c1",  # 376/248 -> 407/261
    (192, 192): "128x64 w12 s3 c1",  # 473/298 -> 508/327
    (256, 256): "128x64 w12 s2 c1",  # 495/320 -> 510/332
}

# Where softcap, packed masks and pages are faster with another cut: chosen by `fmha tune` (2048 tokens, softcap 8192 as
# well) but for a few cuts that spill more, which docs/performance.md shows in bold, and d 128 with pages, where 192x64
# is 2 % faster with many queries and 20 % slower with one. The first of "packed paged", "packed", "softcap paged",
# "softcap", "paged" with an entry decides. A copy from a page brings as many rows as the largest power of two that
# divides block_n, or a page: 64 is better than 112. What no entry says is the plain cut.
_HOPPER_FEATURE_TILES: dict[tuple[tuple[int, int], str], str] = {
    ((32, 32), "softcap"): "256x80 w20 s3 c1",
    ((40, 40), "softcap"): "256x64 w20 s8 c1",
    ((48, 48), "softcap"): "256x64 w20 s6 c1",
    ((64, 64), "softcap"): "192x96 w16 s3 c1",
    ((80, 80), "softcap"): "192x96 w16 s3 c1",
    ((96, 96), "softcap"): "192x80 w16 s3 c1",
    ((104, 104), "softcap"): "192x80 w16 s3 c1",
    ((128, 128), "softcap"): "128x128 w12 s3 c1",
    ((192, 192), "softcap"): "128x64 w12 s3 c1",
    ((32, 32), "packed"): "256x64 w20 s8 c1",
    ((40, 40), "packed"): "256x64 w20 s6 c1",
    ((48, 48), "packed"): "256x64 w20 s6 c1",
    ((80, 80), "packed"): "192x96 w16 s3 c1",
    ((96, 96), "packed"): "192x96 w16 s3 c1",
    ((128, 128), "packed"): "128x128 w12 s3 c1",
    ((160, 160), "packed"): "128x112 w12 s2 c1",
    ((192, 192), "packed"): "128x64 w12 s3 c1",
    ((192, 128), "packed"): "192x80 w16 s3 c1",
    ((32, 32), "paged"): "256x64 w20 s8 c1",
    ((40, 40), "paged"): "256x64 w20 s8 c1",
    ((80, 80), "paged"): "192x64 w16 s3 c1",
    ((96, 96), "paged"): "192x64 w16 s3 c1",
    ((104, 104), "paged"): "192x64 w16 s3 c1",
    ((128, 128), "paged"): "128x128 w12 s3 c1",
    ((192, 192), "paged"): "128x64 w12 s3 c1",
    ((192, 128), "paged"): "192x64 w16 s3 c1",
    ((256, 256), "paged"): "128x64 w12 s2 c1",
    # Not timed: cuts of 64 rows a copy that spill little.
    ((80, 80), "packed paged"): "192x64 w16 s3 c1",
    ((96, 96), "packed paged"): "192x64 w16 s3 c1",
    ((160, 160), "packed paged"): "128x64 w12 s3 c1",
    ((192, 128), "packed paged"): "128x64 w12 s3 c1",
    ((32, 32), "softcap paged"): "256x64 w20 s8 c1",
    ((72, 72), "softcap paged"): "192x64 w16 s3 c1",
    ((80, 80), "softcap paged"): "192x64 w16 s3 c1",
    ((96, 96), "softcap paged"): "192x64 w16 s3 c1",
    ((104, 104), "softcap paged"): "192x64 w16 s3 c1",
    ((160, 160), "softcap paged"): "128x64 w12 s3 c1",
}

# Where a feature needs registers that the plain cut does not leave, another cut; chosen by "no spills", not timed yet.
# Columns as above, None: the plain one. The first word of packed, softcap, alibi, paged with an entry decides.
_FEATURE_TILES: dict[tuple[tuple[int, int], str], tuple[str | None, str | None, str | None]] = {
    ((48, 48), "packed"): ("128x64 w4 s2 c2", "128x64 w4 s2 c2", "128x64 w4 s2 c2"),
    ((72, 72), "packed"): ("64x64 w4 s2 c2", "64x64 w4 s2 c2", "64x64 w4 s2 c1"),
    ((80, 80), "packed"): ("64x64 w4 s2 c2", "64x64 w4 s2 c2", "64x64 w4 s2 c1"),
    ((96, 96), "packed"): ("64x64 w4 s2 c2", "64x64 w4 s2 c2", "64x64 w4 s2 c1"),
    ((96, 96), "softcap"): (None, "128x48 w4 s2 c2", None),
    ((96, 96), "alibi"): (None, "128x48 w4 s2 c2", None),
    ((96, 96), "paged"): (None, "128x48 w4 s2 c2", None),
    ((104, 104), "packed"): ("64x64 w4 s2 c2", "64x64 w4 s2 c2", "64x64 w4 s2 c1"),
    ((104, 104), "softcap"): ("64x64 w4 s2 c2", "64x64 w4 s2 c2", "64x64 w4 s2 c1"),
    ((160, 160), "packed"): ("64x48 w4 s2 c1", "64x48 w4 s2 c2", None),
    ((192, 128), "packed"): ("64x48 w4 s2 c1", "64x48 w4 s2 c2", None),
    ((192, 128), "softcap"): (None, "64x64 w4 s2 c2", None),
    ((192, 128), "alibi"): (None, "64x64 w4 s2 c2", None),
    ((192, 128), "paged"): (None, "64x64 w4 s2 c2", None),
    ((256, 256), "packed"): (None, "128x32 w8 s2 c1", None),
    ((256, 256), "softcap"): (None, "128x48 w8 s2 c1", None),
    ((256, 256), "alibi"): (None, "128x48 w8 s2 c1", None),
    ((256, 256), "paged"): (None, "128x48 w8 s2 c1", None),
}

# ptxas wants more registers for sm120 than for sm86 and sm89: (packed, the others), None: as those.
_SM120_TILES: dict[tuple[int, int], tuple[str, str | None]] = {
    (40, 40): ("128x64 w4 s2 c2", "128x64 w4 s2 c2"),
    (48, 48): ("128x64 w4 s2 c2", "128x64 w4 s2 c2"),
    (64, 64): ("64x64 w4 s2 c2", None),
    (192, 192): ("64x16 w4 s2 c1", None),
    (256, 256): ("64x16 w4 s2 c1", None),
}

# One word of the "any" bits is 32 blocks of 64 x 64; two blocks of a warp in flight keep it within 64 registers.
_PACK_TILE = "64x2048 w16 s2 c2"
_PACK_ARCHS = (Arch.SM80, Arch.SM86, Arch.SM89, Arch.SM90, Arch.SM120)

_FEATURES: tuple[tuple[Mask, Score, KvLayout], ...] = tuple(
    (mask, score, kv)
    for mask in Mask
    for score in Score
    for kv in KvLayout
    if mask is Mask.BAND or score is Score.PLAIN
)
"""Masks, scores and KV layouts that are built for every head dim and target."""

_PRODUCER = "in the producer, which has 32 to 56 registers: its set-up of a tile, a word around a copy"
_SOFTCAP = "of a set-up, and of the path for scores near the cap"
_FASTER = "faster on the H200 than every tile without spills"
_ALLOWED_SPILLS: dict[str, tuple[int, str]] = {
    f"fmha_fwd_{kernel.format(dtype)}": (size, why)
    for dtype in ("fp16", "bf16")
    for why, kernels in {
        _PRODUCER: {
            "sm90a_{}_d64_packed": 108,
            "sm90a_{}_d64_packed_paged": 164,
            "sm90a_{}_d64_paged": 84,
            "sm90a_{}_d64_alibi_paged": 84,
            "sm90a_{}_d72_packed": 120,
            "sm90a_{}_d72_packed_paged": 164,
            "sm90a_{}_d72_paged": 72,
            "sm90a_{}_d72_alibi_paged": 72,
            "sm90a_{}_d80": 28,
            "sm90a_{}_d80_alibi": 28,
            "sm90a_{}_d80_softcap": 28,
            "sm90a_{}_d96": 28,
            "sm90a_{}_d96_alibi": 28,
            "sm90a_{}_d104": 28,
            "sm90a_{}_d104_alibi": 28,
            "sm90a_{}_d160": 20,
            "sm90a_{}_d160_alibi": 20,
            "sm90a_{}_d160_paged": 132,
            "sm90a_{}_d160_alibi_paged": 132,
            "sm90a_{}_d160_softcap": 28,
        },
        _SOFTCAP: {
            "sm90a_{}_d32_softcap": 36,
            "sm90a_{}_d48_softcap": 8,
            "sm90a_{}_d48_softcap_paged": 60,
            "sm90a_{}_d64_softcap": 8,
            "sm90a_{}_d72_softcap": 16,
            "sm90a_{}_d128_softcap_paged": 8,
        },
        # Timed when it was 164, 84 and 24 bytes, before attention_chunk.
        _FASTER: {"sm90_{}_d96": 200, "sm90_{}_d192x128": 84, "sm90_{}_d256": 148},
    }.items()
    for kernel, size in kernels.items()
}
"""Kernel name -> (bytes, why that many are worth it). Everything else must not spill at all."""


@cache
def enumerate_specs(arch: Arch | None = None) -> tuple[KernelSpec, ...]:
    """The kernels of the catalogue, of one arch or of all, sorted by name."""
    archs = [each for each in Arch if arch is None or each is arch]
    specs = [
        KernelSpec(Op.FWD, each, dtype, *dims, mask, score, kv)
        for each in archs
        for dtype in (DType.FP16, DType.BF16)
        for dims in HEAD_DIMS
        for mask, score, kv in _FEATURES
    ]
    specs += [short for spec in specs if exists(short := replace(spec, short=True))]
    specs += [pack_spec(each) for each in archs if each in _PACK_ARCHS]
    return tuple(sorted(specs, key=lambda spec: spec.name))


def pack_spec(arch: Arch) -> KernelSpec:
    """The kernel that packs masks, of one arch."""
    return KernelSpec(Op.PACK, arch, DType.U8, 0, 0)


def exists(spec: KernelSpec) -> bool:
    """Whether the catalogue has this kernel."""
    if spec.op is Op.PACK:
        return spec.arch in _PACK_ARCHS and spec == pack_spec(spec.arch)
    return (
        spec.op is Op.FWD
        and spec.dtype in (DType.FP16, DType.BF16)
        and (spec.head_dim, spec.head_dim_v) in _TILES
        and (spec.mask, spec.score, spec.kv) in _FEATURES
        and (not spec.short or _has_short(spec))
    )


def _has_short(spec: KernelSpec) -> bool:
    """Whether there is a cut of this kernel for short sequences."""
    plain = (spec.mask, spec.score, spec.kv) == (Mask.BAND, Score.PLAIN, KvLayout.CONTIGUOUS)
    return spec.arch is Arch.SM90A and plain and (spec.head_dim, spec.head_dim_v) in _HOPPER_SHORT_TILES


def tile(spec: KernelSpec) -> Tile:
    """The tile that the catalogue gives this kernel.

    Raises:
        UnsupportedProblem: the catalogue does not have the kernel.
        InputError: its tile does not fit the arch's shared memory.
    """
    if not exists(spec):
        raise UnsupportedProblem(
            f"the catalogue has no kernel {spec.name}; `fmha list` shows the {len(enumerate_specs())} that it has",
            problem=spec,
        )
    dims = (spec.head_dim, spec.head_dim_v)
    if spec.op is Op.PACK:
        text = _PACK_TILE
    elif spec.arch is not Arch.SM90A:
        text = _mma_tile(spec)
    elif spec.short:
        text = _HOPPER_SHORT_TILES[dims]
    else:
        text = _hopper_feature_tile(spec) or _HOPPER_TILES[dims]
    chosen = Tile.parse(text)
    smem_bytes(spec, chosen)
    return chosen


def _hopper_feature_tile(spec: KernelSpec) -> str | None:
    """The cut that a packed mask, softcap or pages ask for, if one of them does."""
    dims = (spec.head_dim, spec.head_dim_v)
    mask, score, kv = spec.mask.value, spec.score.value, spec.kv.value
    words = [f"{mask} {kv}", mask, f"{score} {kv}", score, kv]
    return next((_HOPPER_FEATURE_TILES[dims, word] for word in words if (dims, word) in _HOPPER_FEATURE_TILES), None)


def _mma_tile(spec: KernelSpec) -> str:
    dims, column = (spec.head_dim, spec.head_dim_v), _COLUMN[spec.arch]
    if spec.arch is Arch.SM120 and dims in _SM120_TILES:
        text = _SM120_TILES[dims][spec.mask is not Mask.PACKED]
        if text is not None:
            return text
    for word in (spec.mask.value, spec.score.value, spec.kv.value):
        special = _FEATURE_TILES.get((dims, word))
        if special is not None and (text := special[column]) is not None:
            return text
    return _TILES[dims][column]


def smem_bytes(spec: KernelSpec, tile: Tile) -> int:
    """Dynamic shared memory of one CTA in bytes; the kernel asserts the same number (kSmemBytes of its traits).

    Raises:
        InputError: more than one CTA may use on this arch.
    """
    if spec.op is Op.PACK:
        return 4 * tile.warps
    need = _hopper_smem(spec, tile) if spec.arch is Arch.SM90A else _smem(spec, tile)
    if need > spec.arch.smem_limit:
        raise InputError(
            f"tile {tile} of {spec.name} needs {need} bytes of shared memory and "
            f"{spec.arch.value} allows {spec.arch.smem_limit} per CTA; "
            "use fewer rows, keys or stages"
        )
    return need


def _smem(spec: KernelSpec, tile: Tile) -> int:
    """Q and the K stages are as deep as the instruction wants (a multiple of 16), V is exact; O reuses Q's rows."""
    depth = -(-spec.head_dim // 16) * 16
    elements = tile.block_m * depth + tile.stages * tile.block_n * (depth + spec.head_dim_v)
    return spec.dtype.itemsize * elements


def _hopper_smem(spec: KernelSpec, tile: Tile) -> int:
    """Q (of two tiles where there is room), K and V in column groups as wide as the swizzle span, and 1024 bytes of
    barriers and assignments."""
    columns = 32 if spec.head_dim <= 32 else 64
    depth, width = (-(-d // columns) * columns for d in (spec.head_dim, spec.head_dim_v))
    q_tile = spec.dtype.itemsize * tile.block_m * depth
    one = q_tile + spec.dtype.itemsize * tile.stages * tile.block_n * (depth + width) + 1024
    return one + q_tile if one + q_tile <= spec.arch.smem_limit else one


def allowed_spill_bytes(spec: KernelSpec) -> int:
    """Bytes of register spills (stores plus loads) that the build accepts of this kernel."""
    return _ALLOWED_SPILLS.get(spec.name, (0, ""))[0]

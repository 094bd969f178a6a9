# SPDX-License-Identifier: Apache-2.0
"""The tuned numbers of attention kernels: which tile each has, and which may spill registers. Re-tune here."""

from __future__ import annotations

from ..spec import Arch

# One line a head-dim pair: sm80 (163 KiB of shared memory), sm90 (227 KiB), and sm86, sm89, sm120
# (99 KiB).
COLUMN = {Arch.SM80: 0, Arch.SM90: 1, Arch.SM86: 2, Arch.SM89: 2, Arch.SM120: 2}
# sm90 was swept on an H200 on 2026-11-21 (docs/notes/tiles_sm80_family.md); the others take the same cut as far as
# their shared memory goes and have not been timed on their own hardware.
TILES: dict[tuple[int, int], tuple[str, str, str]] = {
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
HOPPER_TILES: dict[tuple[int, int], str] = {
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
HOPPER_SHORT_TILES: dict[tuple[int, int], str] = {
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
# is 2 % faster with many queries and 20 % slower with one. The first of "packed softcap paged", "packed softcap",
# "packed paged", "packed", "softcap paged", "softcap", "paged" with an entry decides. A copy from a page brings as many
# rows as the largest power of two that divides block_n, or a page: 64 is better than 112. What no entry says is the
# plain cut.
HOPPER_FEATURE_TILES: dict[tuple[tuple[int, int], str], str] = {
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
    # Not timed: cuts that do not spill.
    ((128, 128), "packed softcap"): "128x96 w12 s3 c1",
    ((128, 128), "packed softcap paged"): "128x64 w12 s3 c1",
    ((256, 256), "packed softcap"): "128x64 w12 s2 c1",
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
FEATURE_TILES: dict[tuple[tuple[int, int], str], tuple[str | None, str | None, str | None]] = {
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
SM120_TILES: dict[tuple[int, int], tuple[str, str | None]] = {
    (40, 40): ("128x64 w4 s2 c2", "128x64 w4 s2 c2"),
    (48, 48): ("128x64 w4 s2 c2", "128x64 w4 s2 c2"),
    (64, 64): ("64x64 w4 s2 c2", None),
    (192, 192): ("64x16 w4 s2 c1", None),
    (256, 256): ("64x16 w4 s2 c1", None),
}

_PRODUCER = "in the producer, which has 32 to 56 registers: its set-up of a tile, a word around a copy"
_SOFTCAP = "of a set-up, and of the path for scores near the cap"
_FASTER = "faster on the H200 than every tile without spills"
ALLOWED_SPILLS: dict[str, tuple[int, str]] = {
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

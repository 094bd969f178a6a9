# SPDX-License-Identifier: Apache-2.0
"""The kernels that pack masks: one an arch."""

from __future__ import annotations

from ..byte_family import ByteFamily
from ..spec import Op
from .params import PackMaskParams

# One word of the "any" bits is 32 blocks of 64 x 64; two blocks of a warp in flight keep it within 64 registers.
FAMILY = ByteFamily(
    Op.PACK, "64x2048 w16 s2 c2", "pack/packer.cuh", "PackMaskTraits", True, PackMaskParams, "pack_mask", smem_a_warp=4
)
spec = FAMILY.spec

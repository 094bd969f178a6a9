# SPDX-License-Identifier: Apache-2.0
"""The kernels that copy new keys and values into caches: one an arch."""

from __future__ import annotations

from ..byte_family import ByteFamily
from ..spec import Op
from .params import AppendParams

# A warp copies a token, a CTA four of them. The other numbers of the tile mean nothing here.
FAMILY = ByteFamily(
    Op.APPEND, "64x16 w4 s2 c4", "append/appender.cuh", "AppendTraits", False, AppendParams, "append_kv"
)
spec = FAMILY.spec

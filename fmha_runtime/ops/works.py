# SPDX-License-Identifier: Apache-2.0
"""Which ops need more of a launch than a grid of query tiles."""

from __future__ import annotations

from ..kernels.spec import Op
from .decode.work import DecodeWork

WORK: dict[Op, type[DecodeWork]] = {Op.DECODE: DecodeWork}
"""What shares out the work of an op's launches; none for those with a CTA or a queue entry a query tile."""

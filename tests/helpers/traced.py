# SPDX-License-Identifier: Apache-2.0
"""What tests of traced calls compare: results of one tensor or of several, by bits."""

from __future__ import annotations

import torch


def flat(result):
    return result if isinstance(result, tuple) else (result,)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))

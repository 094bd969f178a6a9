# SPDX-License-Identifier: Apache-2.0
"""How fast masks are packed: the kernel beside the same in torch's operations and beside a copy of the mask's bytes.

GB/s count the mask's bytes once, whoever moves them; the copy reads and writes each. Exits with 1 when the kernel reads
the largest aligned mask slower than the copy reads it, half of what the memory can do: then something else holds it up.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import fmha_runtime as fmha
from fmha_runtime.bench.run import CudaTimer
from fmha_runtime.problem import packed_mask

SHAPES = ((1, 1, 1024, 1024), (1, 1, 8192, 8192), (4, 16, 4096, 4096), (4, 16, 4095, 4095), (8, 1, 64, 8192))


def microseconds(call: Callable[[], Any], timer: CudaTimer, repeats: int = 20) -> float:
    """Median device time with a cold L2."""
    call()
    return statistics.median(timer.microseconds([timer.begin(call) for _ in range(repeats)]))


def main() -> int:
    timer = CudaTimer("cuda")
    copied = packed = 0.0
    print("mask                      kernel             torch's operations  copy")
    for shape in SHAPES:
        mask = torch.rand(shape, device="cuda") < 0.5
        target = torch.empty_like(mask)
        each = (
            microseconds(lambda m=mask: fmha.pack_mask(m), timer),
            microseconds(lambda m=mask: packed_mask.pack(m), timer, 3),
            microseconds(lambda m=mask, t=target: t.copy_(m), timer),
        )
        speeds = [mask.numel() / us / 1e3 for us in each]
        cells = (f"{us:9.1f} us {speed:5.0f} GB/s" for us, speed in zip(each, speeds, strict=True))
        print(f"{'x'.join(map(str, shape)):20} {'  '.join(cells)}")
        if mask.numel() == 4 * 16 * 4096 * 4096:
            packed, copied = speeds[0], speeds[2]
    bound = packed >= copied  # the copy moves two bytes for each byte that it counts
    print(f"{'ok' if bound else 'FAIL'}: {packed:.0f} GB/s read, the copy reads and writes {2 * copied:.0f} GB/s")
    return 0 if bound else 1


if __name__ == "__main__":
    raise SystemExit(main())

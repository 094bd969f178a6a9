# SPDX-License-Identifier: Apache-2.0
"""A small benchmark record, as a measurement would leave it."""

from __future__ import annotations

from fmha_runtime.bench.record import BenchRecord, HostTime, Timing


def example() -> BenchRecord:
    meta = {
        **{"gpu": "Some GPU", "driver": "580", "torch": "2.11", "cudnn": 91900},
        **{"commit": "abcdef", "date": "2026-11-21T10:00:00+00:00"},
    }
    cells = (
        Timing("bf16_d64_s512_n", "ours", 10.0, 9.0, 200.0, 20, 64.0, "fmha_fwd_sm90_bf16_d64"),
        Timing("bf16_d64_s512_n", "cudnn", 5.0, 5.0, 400.0, 20, 64.0),
        Timing("bf16_d64_s512_n", "flash", 20.0, 19.0, 100.0, 20, 64.0),
        Timing("bf16_d80_s512_c", "ours", 10.0, 9.0, 300.0, 20, 64.0, "fmha_fwd_sm90_bf16_d80"),
        Timing("bf16_d80_s512_c", "cudnn", absent="no such head dim"),
        Timing("bf16_d80_s512_c", "flash", 5.0, 5.0, 150.0, 20, 64.0),
    )
    host = (HostTime("b1", "ours", 9.5), HostTime("b1", "cudnn", absent="not there"))
    return BenchRecord(meta, cells, host)

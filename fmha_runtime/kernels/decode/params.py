# SPDX-License-Identifier: Apache-2.0
"""The parameter block of a decode kernel: the Python side of params_decode.h, checked field by field by a test."""

from __future__ import annotations

import ctypes

from ..forward.params import FwdParams


class DecodeParams(ctypes.Structure):
    """By-value argument of the decode kernels."""

    _fields_ = [
        ("fwd", FwdParams),
        ("partials", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
        ("ctas", ctypes.c_int32),
        ("least_tiles", ctypes.c_int32),
        ("page_size", ctypes.c_int32),
        ("page_multiplier", ctypes.c_int32),
        ("page_shift", ctypes.c_int32),
    ]

# SPDX-License-Identifier: Apache-2.0
"""The parameter block of a mask packer: the Python side of the struct in its header, checked by a test."""

from __future__ import annotations

import ctypes


class PackMaskParams(ctypes.Structure):
    """By-value argument of the mask packer; PackMaskParams of its header. Strides are bytes."""

    _fields_ = [
        ("mask", ctypes.c_void_p),
        ("words", ctypes.c_void_p),
        ("any", ctypes.c_void_p),
        ("cu_seqlens_q", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("col_stride", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("cols", ctypes.c_int32),
        ("sequences", ctypes.c_int32),
        ("row_blocks", ctypes.c_int32),
        ("col_blocks", ctypes.c_int32),
    ]

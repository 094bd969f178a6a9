# SPDX-License-Identifier: Apache-2.0
"""The parameter block of the kernel that fills caches: the Python side of its header's struct, checked by a test."""

from __future__ import annotations

import ctypes


class ByteStrides(ctypes.Structure):
    """Byte strides of one tensor seen as [batch or page, row, head, dim]."""

    _fields_ = [(axis, ctypes.c_int64) for axis in ("batch", "row", "head")]


class AppendParams(ctypes.Structure):
    """By-value argument; field meanings are in append/appender.cuh."""

    _fields_ = [
        ("k_new", ctypes.c_void_p),
        ("v_new", ctypes.c_void_p),
        ("k_cache", ctypes.c_void_p),
        ("v_cache", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("cu_seqlens", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("page_table", ctypes.c_void_p),
        ("k_new_stride", ByteStrides),
        ("v_new_stride", ByteStrides),
        ("k_cache_stride", ByteStrides),
        ("v_cache_stride", ByteStrides),
        ("table_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int32),
        ("sequences", ctypes.c_int32),
        ("per_sequence", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("k_chunks", ctypes.c_int32),
        ("v_chunks", ctypes.c_int32),
        ("pages", ctypes.c_int32),
        ("page_size", ctypes.c_int32),
        ("room", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    ]

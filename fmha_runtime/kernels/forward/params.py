# SPDX-License-Identifier: Apache-2.0
"""The parameter block of an attention kernel: the Python side of params.h, checked field by field by a test."""

from __future__ import annotations

import ctypes
import struct

ABI = 2
"""Must equal FMHA_ABI in params.h; a cubin with another number is never launched."""

UNLIMITED = 1 << 30
"""Window bound that hides nothing (kUnlimited in params.h)."""


class Strides(ctypes.Structure):
    """Element strides of one tensor seen as [batch, row, head, dim]."""

    _fields_ = [
        ("batch", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("head", ctypes.c_int64),
    ]


class FwdParams(ctypes.Structure):
    """By-value argument of every forward kernel; field meanings are in params.h."""

    _fields_ = [
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("o", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("cu_seqlens_q", ctypes.c_void_p),
        ("cu_seqlens_k", ctypes.c_void_p),
        ("seqused_k", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("alibi_slopes", ctypes.c_void_p),
        ("page_table", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("mask_any", ctypes.c_void_p),
        ("q_stride", Strides),
        ("k_stride", Strides),
        ("v_stride", Strides),
        ("o_stride", Strides),
        ("lse_batch_stride", ctypes.c_int64),
        ("lse_head_stride", ctypes.c_int64),
        ("page_table_stride", ctypes.c_int64),
        ("mask_batch_stride", ctypes.c_int64),
        ("mask_head_stride", ctypes.c_int64),
        ("batch", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("heads_per_kv", ctypes.c_int32),
        ("seqlen_q", ctypes.c_int32),
        ("seqlen_k", ctypes.c_int32),
        ("window_left", ctypes.c_int32),
        ("window_right", ctypes.c_int32),
        ("m_blocks", ctypes.c_int32),
        ("section_heads", ctypes.c_int32),
        ("longest_first", ctypes.c_int32),
        ("attention_chunk", ctypes.c_int32),
        ("chunk_multiplier", ctypes.c_int32),
        ("chunk_shift", ctypes.c_int32),
        ("alibi_batch_stride", ctypes.c_int32),
        ("page_bits", ctypes.c_int32),
        ("mask_row_blocks", ctypes.c_int32),
        ("mask_col_blocks", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("scale_log2", ctypes.c_float),
        ("tanh_scale", ctypes.c_float),
    ]


# The addresses lie at the start of the block, so that one call writes them: (block, 0, q, k, ...) in the order of the
# fields, 0 for null. A call without sinks, slopes, pages and mask changes the first eight only.
write_addresses = struct.Struct("=8Q").pack_into
write_all_addresses = struct.Struct("=13Q").pack_into
# All behind them is written by one call, too: (block, GEOMETRY, every stride, every int, every float).
write_geometry = struct.Struct("=17q17i3f").pack_into
GEOMETRY = FwdParams.q_stride.offset


class TensorMap(ctypes.Structure):
    """128 opaque bytes that tensor_map.py fills; kernels want them at multiples of 64."""

    _fields_ = [("opaque", ctypes.c_uint64 * 16)]


class FwdTmaParams(ctypes.Structure):
    """By-value argument of the TMA kernels. Aligned to 64 bytes in C++, so place it accordingly."""

    _fields_ = [
        ("q_map", TensorMap),
        ("k_map", TensorMap),
        ("v_map", TensorMap),
        ("fwd", FwdParams),
        ("ctas", ctypes.c_int32),
        ("padding", ctypes.c_uint8 * (-(ctypes.sizeof(FwdParams) + 4) % 64)),
    ]


class FwdSm90Params(ctypes.Structure):
    """By-value argument of Hopper's kernels: params_sm90.h."""

    _fields_ = [
        ("tma", FwdTmaParams),
        ("queue", ctypes.c_void_p),
        ("padding", ctypes.c_uint8 * 56),
    ]

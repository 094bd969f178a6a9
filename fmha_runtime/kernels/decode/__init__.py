# SPDX-License-Identifier: Apache-2.0
"""Decoding: which kernels exist, their tiles, their struct."""

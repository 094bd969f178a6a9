# SPDX-License-Identifier: Apache-2.0
"""Attention: which kernels exist, their tiles, their struct."""

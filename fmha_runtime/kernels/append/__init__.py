# SPDX-License-Identifier: Apache-2.0
"""Copies into caches: which kernels exist, their tile, their struct."""

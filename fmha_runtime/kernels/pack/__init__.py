# SPDX-License-Identifier: Apache-2.0
"""Mask packers: which exist, their tile, their struct."""

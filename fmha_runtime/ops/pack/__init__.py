# SPDX-License-Identifier: Apache-2.0
"""Packing masks: one call, its cases."""

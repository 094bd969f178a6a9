# SPDX-License-Identifier: Apache-2.0
"""Attention: one call, its reference, its cases."""

# SPDX-License-Identifier: Apache-2.0
"""Timing kernels beside other libraries."""

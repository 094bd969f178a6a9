# SPDX-License-Identifier: Apache-2.0
"""Merging partial attention results."""

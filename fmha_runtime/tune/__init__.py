# SPDX-License-Identifier: Apache-2.0
"""Choosing tiles by measuring them."""

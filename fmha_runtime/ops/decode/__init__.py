# SPDX-License-Identifier: Apache-2.0
"""Decoding: how the keys of a batch are shared out."""

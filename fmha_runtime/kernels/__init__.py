# SPDX-License-Identifier: Apache-2.0
"""What is compiled: names, tiles, sources, and what is known of their builds."""

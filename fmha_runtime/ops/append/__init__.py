# SPDX-License-Identifier: Apache-2.0
"""New keys and values into caches: one call, its reference, its cases."""

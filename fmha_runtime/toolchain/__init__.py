# SPDX-License-Identifier: Apache-2.0
"""Who compiles, and where the result goes. Only this folder starts processes."""

# SPDX-License-Identifier: Apache-2.0
"""Running kernels on their cases."""

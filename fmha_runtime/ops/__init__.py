# SPDX-License-Identifier: Apache-2.0
"""What is run and checked, op by op."""

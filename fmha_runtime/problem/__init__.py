# SPDX-License-Identifier: Apache-2.0
"""What was asked: the checks of a call and the choice of a kernel."""

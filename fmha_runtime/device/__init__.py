# SPDX-License-Identifier: Apache-2.0
"""Where kernels run: the GPU through the driver, the CPU through the emulator."""

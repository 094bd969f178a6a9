// SPDX-License-Identifier: Apache-2.0
// CPU twin of kernel_src/fmha/ptx/bytes.cuh.
#pragma once
#include "common.cuh"

namespace fmha {

FMHA_DEVICE uint32_t ld_global_nc_u8(const uint8_t* src) { return emu::ld_global_u8(src); }
FMHA_DEVICE Vec4 ld_global_nc_v4(const void* src) { return ld_global_v4(src); }

}  // namespace fmha

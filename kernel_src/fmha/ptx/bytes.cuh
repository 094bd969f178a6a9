// SPDX-License-Identifier: Apache-2.0
// Loads of single bytes and of vectors from memory that is constant while the kernel runs (ld.global.nc), by
// intrinsics, which the compiler knows and may move. kernel_src/emulator/ptx/bytes.cuh is its twin.
#pragma once
#include <ptx/common.cuh>

namespace fmha {

FMHA_DEVICE uint32_t ld_global_nc_u8(const uint8_t* src) { return __ldg(src); }

// 16-byte aligned.
FMHA_DEVICE Vec4 ld_global_nc_v4(const void* src) {
    const uint4 v = __ldg(static_cast<const uint4*>(src));
    return Vec4{{v.x, v.y, v.z, v.w}};
}

}  // namespace fmha

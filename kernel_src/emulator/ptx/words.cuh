// SPDX-License-Identifier: Apache-2.0
// CPU twin of kernel_src/fmha/ptx/words.cuh.
#pragma once
#include <ptx/common.cuh>

namespace fmha {

FMHA_DEVICE uint32_t atomic_inc_acq_rel(uint32_t* word, uint32_t last) { return emu::atomic_inc_acq_rel(word, last); }
FMHA_DEVICE float ld_global_written_f32(const float* src) { return emu::ld_global_f32(src); }
FMHA_DEVICE uint32_t to_bits(float x) { return emu::float_bits(x); }
FMHA_DEVICE float from_bits(uint32_t x) { return emu::bits_float(x); }

}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// Single words: counters by which the CTAs of one launch find each other, floats as bits.
// kernel_src/emulator/ptx/words.cuh is its twin.
#pragma once
#include <ptx/common.cuh>

namespace fmha {

// Counts up to `last` and from there back to 0; returns the count before. What this CTA wrote before, behind a barrier,
// is seen by whoever finds it counted; what others had counted is seen by this CTA, behind a barrier.
FMHA_DEVICE uint32_t atomic_inc_acq_rel(uint32_t* word, uint32_t last) {
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(__cvta_generic_to_global(word)), "r"(last)
                 : "memory");
    return old;
}

// A float that another CTA may have written: not through the cache of constant memory, as ld_global_f32 is.
FMHA_DEVICE float ld_global_written_f32(const float* src) {
    float x;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(__cvta_generic_to_global(src)));
    return x;
}

FMHA_DEVICE uint32_t to_bits(float x) { return __float_as_uint(x); }
FMHA_DEVICE float from_bits(uint32_t x) { return __uint_as_float(x); }

}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// Online softmax with conditional rescaling (FlashAttention-4): most tiles leave O untouched.
#pragma once
#include "blocks/softmax.cuh"

namespace fmha {

// The maximum of a row is kept until a score exceeds it by a factor of more than 2^kHeadroom. Meanwhile P may reach
// 2^kHeadroom, and the result differs only by the rounding of P: the largest weight of a row is no longer exactly 1.
// Each lane compares the scores that it holds, and one vote of the warp decides. Only when the vote says yes do the
// four lanes of a row exchange their maxima, set a new maximum and rescale O.
template <int kHeadroom>
struct LazySoftmax : Softmax<1> {
    // Turns S into P in place. Returns whether O must be multiplied by `shrink`, the same answer in all lanes. kMasked:
    // rows may still have seen no key at all.
    template <bool kMasked, int kNTiles>
    FMHA_DEVICE bool step(float (&s)[1][kNTiles][4], float (&shrink)[1][2], float scale_log2) {
        float peak[2];
        bool grown = false;
        FMHA_UNROLL
        for (int half = 0; half < 2; ++half) {
            peak[half] = row_max[0][half];
            FMHA_UNROLL
            for (int nt = 0; nt < kNTiles; ++nt) {
                peak[half] = fmaxf(peak[half], fmaxf(s[0][nt][half * 2], s[0][nt][half * 2 + 1]));
            }
            grown |= (peak[half] - row_max[0][half]) * scale_log2 >
                     static_cast<float>(kHeadroom);  // -inf - -inf is NaN: not grown
        }
        const bool rescale = warp_any(grown);
        if (rescale) {
            FMHA_UNROLL
            for (int half = 0; half < 2; ++half) {
                peak[half] = fmaxf(peak[half], shfl_xor(peak[half], 1));
                peak[half] = fmaxf(peak[half], shfl_xor(peak[half], 2));
                shrink[0][half] = exp2_approx(row_max[0][half] * scale_log2 - base<kMasked>(peak[half], scale_log2));
                row_max[0][half] = peak[half];
                row_sum[0][half] *= shrink[0][half];
            }
        }
        FMHA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const float from = base<kMasked>(row_max[0][half], scale_log2);
            float sum = 0.f;
            FMHA_UNROLL
            for (int nt = 0; nt < kNTiles; ++nt) {
                FMHA_UNROLL
                for (int c = 0; c < 2; ++c) {
                    float& x = s[0][nt][half * 2 + c];
                    x = exp2_approx(x * scale_log2 - from);
                    sum += x;
                }
            }
            row_sum[0][half] += sum;
        }
        return rescale;
    }

    // -inf - -inf is NaN: a row without keys keeps 0 as its base, and every exp2 gives 0.
    template <bool kMasked>
    FMHA_DEVICE static float base(float peak, float scale_log2) {
        return kMasked && peak == kMinusInfinity ? 0.f : peak * scale_log2;
    }
};

}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// What happens to a score between q.k and the mask. Scores stay unscaled: the softmax multiplies them by
// FwdParams::scale_log2 in the same instruction that subtracts the maximum.
#pragma once
#include <ptx/common.cuh>

#include "params.h"
#include "forward/traits.cuh"

namespace fmha {

// tanh(x), good to about 2^-22 of 1. The one-instruction tanh.approx is good to 2^-11 of its value, of which a cap of
// 30 makes 1.5 % of a weight. Tried with the emulator's worst case of it: relative L2 4.8e-4 in fp16 (allowed 4e-4) and
// errors of 7e-3 in the LSE (allowed 1e-3), so one more ex2 and rcp are the price.
FMHA_DEVICE float tanh_exp2(float x) {
    constexpr float kTwoLog2E = 2.88539008177792681f;
    return 1.f - 2.f * rcp_approx(1.f + exp2_approx(x * kTwoLog2E));
}

// The score of one head, with what it needs of the parameters.
template <Score kScore>
struct ScoreMod {
    float slope = 0.f;  // of the unscaled scores
    float tanh_scale = 0.f;
    int diagonal = 0;

    FMHA_DEVICE ScoreMod(const FwdParams& p, int batch, int head, int diagonal_) {
        if constexpr (kScore == Score::kAlibi) {
            slope = ld_global_f32(p.alibi_slopes + batch * static_cast<int64_t>(p.alibi_batch_stride) + head) / p.scale;
            diagonal = diagonal_;
        }
        if constexpr (kScore == Score::kSoftcap) {
            tanh_scale = p.tanh_scale;
        }
    }

    // On the fragments of S: thread layout as in mask.cuh.
    template <int kMTiles, int kNTiles>
    FMHA_DEVICE void apply(float (&s)[kMTiles][kNTiles][4], int warp_row, int col0, int lane) const {
        if constexpr (kScore == Score::kAlibi) {
            FMHA_UNROLL
            for (int mt = 0; mt < kMTiles; ++mt) {
                FMHA_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const int row = warp_row + mt * 16 + half * 8 + lane / 4;
                    const float past = static_cast<float>(row + diagonal - col0 - 2 * (lane % 4));
                    FMHA_UNROLL
                    for (int nt = 0; nt < kNTiles; ++nt) {
                        s[mt][nt][half * 2] -= slope * fabsf(past - (nt * 8));
                        s[mt][nt][half * 2 + 1] -= slope * fabsf(past - (nt * 8 + 1));
                    }
                }
            }
        }
        if constexpr (kScore == Score::kSoftcap) {
            FMHA_UNROLL
            for (int mt = 0; mt < kMTiles; ++mt) {
                FMHA_UNROLL
                for (int nt = 0; nt < kNTiles; ++nt) {
                    FMHA_UNROLL
                    for (int i = 0; i < 4; ++i) {
                        s[mt][nt][i] = tanh_exp2(s[mt][nt][i] * tanh_scale);
                    }
                }
            }
        }
    }
};

}  // namespace fmha

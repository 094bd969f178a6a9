// SPDX-License-Identifier: Apache-2.0
// The steps between the first product and the mask: ALiBi and softcap. Scores stay unscaled: the softmax multiplies
// them by FwdParams::scale_log2 in the same instruction that subtracts the maximum.
#pragma once
#include <ptx/common.cuh>

#include "blocks/traits.cuh"
#include "params.h"

namespace fmha {

// tanh(x) with an absolute error of about 2^-22. The one-instruction tanh.approx has a relative error of 2^-11; with a
// cap of 30 that is 1.5 % of a weight. The emulator's worst case of it gave a relative L2 error of 4.8e-4 in fp16
// (allowed 4e-4) and errors of 7e-3 in the LSE (allowed 1e-3). So one ex2 and one rcp are paid.
FMHA_DEVICE float tanh_exp2(float x) {
    constexpr float kTwoLog2E = 2.88539008177792681f;
    return 1.f - 2.f * rcp_approx(1.f + exp2_approx(x * kTwoLog2E));
}

// Caps from here on make the absolute error of tanh_exp2 count: times 1000 it is 2.4e-4 of a score.
constexpr float kLargeCap = 1000.f;

// tanh(x) with a relative error of 2^-16. Scores far below a large cap are nearly x itself, and 1 - 2 / (1 + e) loses
// their digits.
FMHA_DEVICE float tanh_of_small(float x) {
    const float near = x - x * x * x * (1.f / 3.f);  // the next term is 2/15 x^5: 1e-7 of x at 0.03
    return fabsf(x) < 0.03f ? near : tanh_exp2(x);
}

// The score modification of one head, with the parameters that it needs.
template <Score kScore>
struct ScoreMod {
    float slope = 0.f;  // in units of the unscaled scores
    float tanh_scale = 0.f;
    bool large_cap = false;
    int diagonal = 0;

    FMHA_DEVICE ScoreMod(const FwdParams& p, int batch, int head, int diagonal_) {
        if constexpr (kScore == Score::kAlibi) {
            slope = ld_global_f32(p.alibi_slopes + batch * static_cast<int64_t>(p.alibi_batch_stride) + head) / p.scale;
            diagonal = diagonal_;
        }
        if constexpr (kScore == Score::kSoftcap) {
            constexpr float kLog2E = 1.44269504088896341f;
            tanh_scale = p.tanh_scale;
            large_cap = p.scale_log2 > kLargeCap * kLog2E;  // scale_log2 is the cap times log2(e)
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
            if (large_cap) {
                cap(s, [](float x) { return tanh_of_small(x); });
            } else {
                cap(s, [](float x) { return tanh_exp2(x); });
            }
        }
    }

    template <int kMTiles, int kNTiles, typename Tanh>
    FMHA_DEVICE void cap(float (&s)[kMTiles][kNTiles][4], Tanh tanh) const {
        FMHA_UNROLL
        for (int mt = 0; mt < kMTiles; ++mt) {
            FMHA_UNROLL
            for (int nt = 0; nt < kNTiles; ++nt) {
                FMHA_UNROLL
                for (int i = 0; i < 4; ++i) {
                    s[mt][nt][i] = tanh(s[mt][nt][i] * tanh_scale);
                }
            }
        }
    }
};

}  // namespace fmha

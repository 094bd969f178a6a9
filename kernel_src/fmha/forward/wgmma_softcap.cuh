// SPDX-License-Identifier: Apache-2.0
// Softcap on the fragments of S: tanh without the special function unit wherever the scores are far below the cap.
#pragma once
#include "blocks/lazy_softmax.cuh"
#include "blocks/score.cuh"

namespace fmha {

// Odd polynomial on [-kTanhReach, kTanhReach], fitted to tanh(x) / x in x * x (weighted least squares, reweighted
// towards equal errors). Its relative error is within 2e-7 in fp32; tanh_exp2 has an absolute error of 2^-22.
constexpr float kTanhReach = 0.625f;

FMHA_DEVICE float tanh_polynomial(float x) {
    const float u = x * x;
    float p = 0.015195369720458984f * u - 0.051947902888059616f;
    p = p * u + 0.13308174908161163f;
    p = p * u - 0.3333234190940857f;
    return x * (p * u) + x;
}

// Caps all scores of a tile. An ex2 or rcp occupies the special function unit for eight cycles a warp, and the softmax
// needs that unit too: the seven instructions of the polynomial are cheaper. One vote per tile chooses between the two.
// Only masked tiles and tiles that step_capped cannot take as one polynomial come here.
template <int kNTiles>
FMHA_DEVICE void apply_softcap(float (&s)[1][kNTiles][4], float tanh_scale) {
    float largest = 0.f;
    FMHA_UNROLL
    for (int nt = 0; nt < kNTiles; ++nt) {
        FMHA_UNROLL
        for (int i = 0; i < 4; ++i) {
            largest = fmaxf(largest, fabsf(s[0][nt][i]));
        }
    }
    const auto each = [&](auto tanh) {
        FMHA_UNROLL
        for (int nt = 0; nt < kNTiles; ++nt) {
            FMHA_UNROLL
            for (int i = 0; i < 4; ++i) {
                s[0][nt][i] = tanh(s[0][nt][i] * tanh_scale);
            }
        }
    };
    if (warp_any(largest * tanh_scale > kTanhReach)) {
        each([](float x) { return tanh_exp2(x); });
    } else {
        each([](float x) { return tanh_polynomial(x); });
    }
}

// Softmax of capped scores. For a tile without masked scores, and with all of them far below the cap, one polynomial of
// four instructions a score does the cap, the scale and the subtraction of the maximum. The largest |score| shows that
// the polynomial is accurate there. It also shows that no maximum has to be raised, because a cap keeps the order and
// makes no score larger.
template <int kHeadroom>
struct CappedSoftmax : LazySoftmax<kHeadroom> {
    static constexpr float kReach = 0.35f;   // of |x|, where the polynomial is within 3e-6 of tanh(x), relatively
    static constexpr float kLargest = 1e9f;  // its square does not overflow

    // step<false>() of LazySoftmax with the cap before it; the maximum is that of tanh().
    template <int kNTiles>
    FMHA_DEVICE bool step_capped(float (&s)[1][kNTiles][4], float (&shrink)[1][2], float tanh_scale, float scale_log2) {
        bool far = false;
        FMHA_UNROLL
        for (int half = 0; half < 2; ++half) {
            float largest = 0.f;
            FMHA_UNROLL
            for (int nt = 0; nt < kNTiles; ++nt) {
                largest = fmaxf(largest, fmaxf(fabsf(s[0][nt][half * 2]), fabsf(s[0][nt][half * 2 + 1])));
            }
            const float x = largest * tanh_scale;
            const bool stays = (x - this->row_max[0][half]) * scale_log2 <= static_cast<float>(kHeadroom);
            far |= !(x <= kReach && stays && largest <= kLargest);
        }
        if (warp_any(far)) {
            apply_softcap(s, tanh_scale);
            return this->template step<false>(s, shrink, scale_log2);
        }
        // tanh(x) / x in x * x, fitted like tanh_polynomial, with both scales inside.
        const float square = tanh_scale * tanh_scale;
        const float linear = tanh_scale * scale_log2;
        const float c0 = 0.9999971389770508f * linear;
        const float c1 = -0.3329095244407654f * (linear * square);
        const float c2 = 0.12395026534795761f * (linear * square * square);
        FMHA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const float from = this->row_max[0][half] * scale_log2;
            float sum = 0.f;
            FMHA_UNROLL
            for (int nt = 0; nt < kNTiles; ++nt) {
                FMHA_UNROLL
                for (int i = 0; i < 2; ++i) {
                    float& x = s[0][nt][half * 2 + i];
                    const float u = x * x;
                    x = exp2_approx(((c2 * u + c1) * u + c0) * x - from);
                    sum += x;
                }
            }
            this->row_sum[0][half] += sum;
        }
        return false;
    }
};

}  // namespace fmha

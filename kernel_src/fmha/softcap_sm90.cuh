// SPDX-License-Identifier: Apache-2.0
// Softcap on the fragments of S: tanh without the special function unit wherever the scores are far below the cap.
#pragma once
#include "score.cuh"

namespace fmha {

// Odd polynomial on [-kTanhReach, kTanhReach], fitted to tanh(x) / x in x * x (weighted least squares, reweighted
// towards equal errors): within 2e-7 of its value in fp32, where score.cuh's tanh is within 2^-22 of 1.
constexpr float kTanhReach = 0.625f;

FMHA_DEVICE float tanh_polynomial(float x) {
    const float u = x * x;
    float p = 0.015195369720458984f * u - 0.051947902888059616f;
    p = p * u + 0.13308174908161163f;
    p = p * u - 0.3333234190940857f;
    return x * (p * u) + x;
}

// Each ex2 and rcp takes the unit eight cycles a warp, and the softmax needs it too; the polynomial's seven
// instructions are cheaper. One vote a tile says which it is.
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

}  // namespace fmha

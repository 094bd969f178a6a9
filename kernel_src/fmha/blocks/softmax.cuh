// SPDX-License-Identifier: Apache-2.0
// Online softmax in the exp2 domain (FlashAttention-2, algorithm 1, with log2(e) folded into the scale).
#pragma once
#include "blocks/mask.cuh"

namespace fmha {

// Running maximum and sum of the rows that a thread holds: two of each m16 tile. The maximum is of the raw scores; the
// sum is of this thread's columns only until finish() adds up the four lanes of a row.
template <int kMTiles>
struct Softmax {
    float row_max[kMTiles][2];
    float row_sum[kMTiles][2];

    FMHA_DEVICE Softmax() {
        FMHA_UNROLL
        for (int mt = 0; mt < kMTiles; ++mt) {
            row_max[mt][0] = row_max[mt][1] = kMinusInfinity;
            row_sum[mt][0] = row_sum[mt][1] = 0.f;
        }
    }

    // A sink is a key without a value: it takes its share of the weights and adds nothing to O. It comes first, so that
    // nothing overflows, however large it is. `sink` is a logit in natural units. Returns whether it is so large that
    // it has all the weight: no key matters then, and steps whose maximum is infinite would give NaN.
    FMHA_DEVICE bool add_sink(float sink, float scale_log2, int lane) {
        constexpr float kLog2E = 1.44269504088896341f;
        if (sink == kMinusInfinity) {
            return false;
        }
        const float raw = sink * kLog2E / scale_log2;
        FMHA_UNROLL
        for (int mt = 0; mt < kMTiles; ++mt) {
            row_max[mt][0] = row_max[mt][1] = raw;
            row_sum[mt][0] = row_sum[mt][1] = lane % 4 == 0 ? 1.f : 0.f;  // the sum is over the four lanes of a row
        }
        return raw == -kMinusInfinity;
    }

    // Turns S into P in place and returns in `shrink` the factor by which O must be multiplied. kMasked: rows may still
    // have seen no key at all.
    template <bool kMasked, int kNTiles>
    FMHA_DEVICE void step(float (&s)[kMTiles][kNTiles][4], float (&shrink)[kMTiles][2], float scale_log2) {
        FMHA_UNROLL
        for (int mt = 0; mt < kMTiles; ++mt) {
            FMHA_UNROLL
            for (int half = 0; half < 2; ++half) {
                float peak = row_max[mt][half];
                FMHA_UNROLL
                for (int nt = 0; nt < kNTiles; ++nt) {
                    peak = fmaxf(peak, fmaxf(s[mt][nt][half * 2], s[mt][nt][half * 2 + 1]));
                }
                peak = fmaxf(peak, shfl_xor(peak, 1));
                peak = fmaxf(peak, shfl_xor(peak, 2));
                const float old = row_max[mt][half];
                // -inf - -inf is NaN: a row without keys keeps 0 as its base, and every exp2 below gives 0.
                const float base = kMasked && peak == kMinusInfinity ? 0.f : peak * scale_log2;
                shrink[mt][half] = exp2_approx(old * scale_log2 - base);
                row_max[mt][half] = peak;
                float sum = 0.f;
                FMHA_UNROLL
                for (int nt = 0; nt < kNTiles; ++nt) {
                    FMHA_UNROLL
                    for (int c = 0; c < 2; ++c) {
                        float& x = s[mt][nt][half * 2 + c];
                        x = exp2_approx(x * scale_log2 - base);
                        sum += x;
                    }
                }
                row_sum[mt][half] = row_sum[mt][half] * shrink[mt][half] + sum;
            }
        }
    }

    template <int kVTiles>
    FMHA_DEVICE static void rescale(float (&o)[kMTiles][kVTiles][4], const float (&shrink)[kMTiles][2]) {
        FMHA_UNROLL
        for (int mt = 0; mt < kMTiles; ++mt) {
            FMHA_UNROLL
            for (int vt = 0; vt < kVTiles; ++vt) {
                FMHA_UNROLL
                for (int i = 0; i < 4; ++i) {
                    o[mt][vt][i] *= shrink[mt][i / 2];
                }
            }
        }
    }

    // Completes the row sums and divides O by them. Rows that saw no key become 0.
    template <int kVTiles>
    FMHA_DEVICE void finish(float (&o)[kMTiles][kVTiles][4]) {
        FMHA_UNROLL
        for (int mt = 0; mt < kMTiles; ++mt) {
            FMHA_UNROLL
            for (int half = 0; half < 2; ++half) {
                float sum = row_sum[mt][half];
                sum += shfl_xor(sum, 1);
                sum += shfl_xor(sum, 2);
                row_sum[mt][half] = sum;
                const float inverse = sum == 0.f ? 0.f : rcp_approx(sum);
                FMHA_UNROLL
                for (int vt = 0; vt < kVTiles; ++vt) {
                    o[mt][vt][half * 2] *= inverse;
                    o[mt][vt][half * 2 + 1] *= inverse;
                }
            }
        }
    }

    // Natural log of the sum of exponentials of the scaled scores; -inf for a row that saw no key.
    FMHA_DEVICE float lse(int mt, int half, float scale_log2) const {
        constexpr float kLn2 = 0.693147180559945309f;
        const float sum = row_sum[mt][half];
        return sum == 0.f ? kMinusInfinity : (row_max[mt][half] * scale_log2 + log2_approx(sum)) * kLn2;
    }
};

}  // namespace fmha

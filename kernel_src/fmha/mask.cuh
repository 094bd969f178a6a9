// SPDX-License-Identifier: Apache-2.0
// Masks on the fragments of S. Thread layout of an m16n8 accumulator: rows lane / 4 and lane / 4 + 8, columns
// 2 * (lane % 4) and the next (PTX ISA, "Matrix fragments for mma.m16n8k16").
#pragma once
#include "seqlen.cuh"

namespace fmha {

constexpr float kMinusInfinity = -__builtin_huge_valf();

template <int kMTiles, int kNTiles>
FMHA_DEVICE void apply_band(float (&s)[kMTiles][kNTiles][4], const Band& band, int warp_row, int col0, int lane) {
    const int first_col = col0 + 2 * (lane % 4);
    FMHA_UNROLL
    for (int mt = 0; mt < kMTiles; ++mt) {
        FMHA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + mt * 16 + half * 8 + lane / 4;
            // One unsigned compare tests both ends. An empty row has width 0 and loses every column.
            const int begin = band.begin(row);
            const int end = band.end(row);
            const uint32_t width = end > begin ? end - begin : 0;
            const uint32_t first = static_cast<uint32_t>(first_col - begin);
            FMHA_UNROLL
            for (int nt = 0; nt < kNTiles; ++nt) {
                FMHA_UNROLL
                for (int c = 0; c < 2; ++c) {
                    float& x = s[mt][nt][half * 2 + c];
                    x = first + (nt * 8 + c) < width ? x : kMinusInfinity;
                }
            }
        }
    }
}

}  // namespace fmha

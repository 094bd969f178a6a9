// SPDX-License-Identifier: Apache-2.0
// Stores O and the log-sum-exp of a warp's rows.
#pragma once
#include "blocks/softmax.cuh"
#include "blocks/traits.cuh"

namespace fmha {

// Fragments go through the warp's own slab of shared memory, so that global stores are whole 16-byte chunks of a row.
template <class Traits>
FMHA_DEVICE void store_output(const float (&o)[Traits::kMTiles][Traits::kVTiles][4], uint32_t slab, uint16_t* out,
                              int64_t row_stride, int warp_row, int q_len, int lane) {
    using Tile = typename Traits::VTile;
    sync_warp();  // the slab held Q, which other lanes may still be reading
    FMHA_UNROLL
    for (int mt = 0; mt < Traits::kMTiles; ++mt) {
        FMHA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = mt * 16 + half * 8 + lane / 4;
            FMHA_UNROLL
            for (int vt = 0; vt < Traits::kVTiles; ++vt) {
                const float* pair = &o[mt][vt][half * 2];
                st_shared_u32(slab + Tile::offset(row, vt) + (lane % 4) * 4,
                              pack2<typename Traits::Element>(pair[0], pair[1]));
            }
        }
    }
    sync_warp();
    for (int i = lane; i < Traits::kWarpRows * Traits::kVChunks; i += 32) {
        const int row = i / Traits::kVChunks;
        const int chunk = i % Traits::kVChunks;
        if (warp_row + row < q_len) {
            st_global_v4(out + (warp_row + row) * row_stride + chunk * kChunkElements,
                         ld_shared_v4(slab + Tile::offset(row, chunk)));
        }
    }
}

// 4 x 4 transpose among the four lanes of a quad: lane i ends with what every lane held in x[i], in lane order.
FMHA_DEVICE void quad_transpose(uint32_t (&x)[4], int lane) {
    const bool odd = lane % 2 != 0;
    const bool high = lane / 2 % 2 != 0;
    FMHA_UNROLL
    for (int i = 0; i < 4; i += 2) {
        const uint32_t got = shfl_xor(odd ? x[i] : x[i + 1], 1);
        x[i] = odd ? got : x[i];
        x[i + 1] = odd ? x[i + 1] : got;
    }
    FMHA_UNROLL
    for (int i = 0; i < 2; ++i) {
        const uint32_t got = shfl_xor(high ? x[i] : x[i + 2], 2);
        x[i] = high ? got : x[i];
        x[i + 2] = high ? x[i + 2] : got;
    }
}

// store_output without shared memory, for one m16 tile. A quad holds 8 columns of a row in its four lanes. Four such n8
// tiles are transposed among the lanes, so that each lane stores one 16-byte chunk.
template <class Element, int kVTiles>
FMHA_DEVICE void store_rows(const float (&o)[1][kVTiles][4], uint16_t* out, int64_t row_stride, int warp_row, int q_len,
                            int lane) {
    FMHA_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int row = warp_row + half * 8 + lane / 4;
        FMHA_UNROLL
        for (int vt = 0; vt < kVTiles; vt += 4) {
            uint32_t x[4];
            FMHA_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int tile = vt + i < kVTiles ? vt + i : 0;  // tiles past the last are not stored
                x[i] = pack2<Element>(o[0][tile][half * 2], o[0][tile][half * 2 + 1]);
            }
            quad_transpose(x, lane);
            const int chunk = vt + lane % 4;
            if (row < q_len && chunk < kVTiles) {
                st_global_v4(out + row * row_stride + chunk * kChunkElements, Vec4{{x[0], x[1], x[2], x[3]}});
            }
        }
    }
}

template <int kMTiles>
FMHA_DEVICE void store_lse(const Softmax<kMTiles>& softmax, float* lse, float scale_log2, int warp_row, int q_len,
                           int lane) {
    FMHA_UNROLL
    for (int mt = 0; mt < kMTiles; ++mt) {
        FMHA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + mt * 16 + half * 8 + lane / 4;
            if (lane % 4 == 0 && row < q_len) {
                st_global_f32(lse + row, softmax.lse(mt, half, scale_log2));
            }
        }
    }
}

}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// K and V tiles from a pool of pages by the copy engine. The tensor map of a pool has dims (head dim, row of the page,
// head, page), and its box is the largest piece of a tile that no page boundary can cut: both are powers of two.
#pragma once
#include <ptx/sm90.cuh>

#include "forward/wgmma_traits.cuh"
#include "params.h"

namespace fmha {

// log2 of the rows of a piece. The host encodes the tensor maps of K and V with boxes of that many rows.
template <class Traits>
FMHA_DEVICE int piece_bits(int page_bits) {
    constexpr int kTileBits = __builtin_ctz(Traits::kBlockN);
    return page_bits < kTileBits ? page_bits : kTileBits;
}

// The page of a token. Entries of the page table at or past the end of the sequence may be anything; tokens there get
// page -1, which lies outside the tensor and therefore reads as zeros.
FMHA_DEVICE int page_of(const FwdParams& p, int token, int k_len, int batch) {
    const int32_t* table = p.page_table + batch * p.page_table_stride;
    return token < k_len ? ld_global_s32(table + (token >> p.page_bits)) : -1;
}

// Loads a whole tile of one sequence, piece by piece. The tile begins with `first_token`, which is in `page`. Pieces
// past the end of the sequence are loaded as well, because `bar` expects the bytes of a full tile.
template <class Traits>
FMHA_DEVICE void load_pages(const FwdParams& p, uint32_t to, int groups, const TensorMap* map, uint32_t bar, int page,
                            int first_token, int k_len, int kv_head, int batch) {
    const int rows = 1 << piece_bits<Traits>(p.page_bits);
    FMHA_UNROLL_1
    for (int row = 0; row < Traits::kBlockN; row += rows) {
        const int next_page = page_of(p, first_token + row + rows, k_len, batch);  // under the copies below
        const int page_row = (first_token + row) & ((1 << p.page_bits) - 1);
        for (int g = 0; g < groups; ++g) {
            tma_load_4d(to + g * Traits::kKvGroupBytes + row * Traits::kRowBytes, map, bar, g * Traits::kGroupColumns,
                        page_row, kv_head, page);
        }
        page = next_page;
    }
}

}  // namespace fmha

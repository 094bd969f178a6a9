// SPDX-License-Identifier: Apache-2.0
// K and V tiles of one head, from tensors or from a pool of pages.
#pragma once
#include "blocks/seqlen.cuh"
#include "blocks/tile_copy.cuh"
#include "params.h"

namespace fmha {

// TileCopy for a pool [page, row of the page, head, dim]. The pages of a tile's rows are looked up first, all at once.
// Rows at or past the end of the sequence are not looked up, because their entries may be anything.
template <int kRows, class Tile, int kValidChunks, int kThreads>
struct PagedTileCopy {
    static constexpr int kRowsPerPass = rows_per_pass(kThreads, kValidChunks);
    static constexpr int kPasses = (kRows + kRowsPerPass - 1) / kRowsPerPass;
    static_assert(kThreads >= kValidChunks, "a row must not have more chunks than the CTA has threads");

    const uint16_t* source;  // this thread's chunk of row 0 of page 0
    int64_t page_stride;     // elements
    int64_t row_stride;
    int page_bits;
    int row;
    int chunk;

    FMHA_DEVICE PagedTileCopy(const uint16_t* base, const Strides& stride, int page_bits_, int thread)
        : page_stride(stride.batch),
          row_stride(stride.row),
          page_bits(page_bits_),
          row(thread / kValidChunks),
          chunk(thread % kValidChunks) {
        source = base + chunk * kChunkElements;
    }

    // The pages of this thread's rows of the tile that starts at `first_row`.
    FMHA_DEVICE void find(int32_t (&pages)[kPasses], const int32_t* table, int first_row, int end_row) const {
        FMHA_UNROLL
        for (int i = 0; i < kPasses; ++i) {
            const int token = first_row + row + i * kRowsPerPass;
            pages[i] = token < end_row ? ld_global_s32(table + (token >> page_bits)) : 0;
        }
    }

    FMHA_DEVICE void load(uint32_t smem, const int32_t (&pages)[kPasses], int first_row, int end_row) const {
        if (row >= kRowsPerPass) {
            return;
        }
        FMHA_UNROLL
        for (int i = 0; i < kPasses; ++i) {
            const int tile_row = row + i * kRowsPerPass;
            if (kRows % kRowsPerPass == 0 || tile_row < kRows) {
                const int token = first_row + tile_row;
                const int page_row = token & ((1 << page_bits) - 1);
                const uint16_t* from = source + pages[i] * page_stride + page_row * row_stride;
                cp_async_16(smem + Tile::offset(tile_row, chunk), from, token < end_row);
            }
        }
    }
};

// K and V of one head, tile by tile.
template <class Traits, bool kPaged = Traits::kPaged>
struct KvSource;

template <class Traits>
struct KvSource<Traits, false> {
    TileCopy<Traits::kBlockN, typename Traits::QkTile, Traits::kQkValidChunks, Traits::kThreads> k;
    TileCopy<Traits::kBlockN, typename Traits::VTile, Traits::kVChunks, Traits::kThreads> v;

    FMHA_DEVICE KvSource(const FwdParams& p, const SeqlenInfo& seq, int batch, int kv_head, int thread)
        : k(head(p.k, p.k_stride, seq, batch, kv_head), p.k_stride.row, thread),
          v(head(p.v, p.v_stride, seq, batch, kv_head), p.v_stride.row, thread) {}

    FMHA_DEVICE static const uint16_t* head(const void* base, const Strides& stride, const SeqlenInfo& seq, int batch,
                                            int kv_head) {
        return static_cast<const uint16_t*>(base) + batch * stride.batch + seq.k_row * stride.row +
               kv_head * stride.head;
    }

    // Copies tile `n_block` of K to `smem` and that of V behind it.
    FMHA_DEVICE void load(uint32_t smem, int n_block, int k_len) const {
        k.load(smem, n_block * Traits::kBlockN, k_len);
        v.load(smem + Traits::kKBytes, n_block * Traits::kBlockN, k_len);
    }
};

template <class Traits>
struct KvSource<Traits, true> {
    using KCopy = PagedTileCopy<Traits::kBlockN, typename Traits::QkTile, Traits::kQkValidChunks, Traits::kThreads>;
    using VCopy = PagedTileCopy<Traits::kBlockN, typename Traits::VTile, Traits::kVChunks, Traits::kThreads>;
    KCopy k;
    VCopy v;
    const int32_t* table;  // the pages of this sequence

    FMHA_DEVICE KvSource(const FwdParams& p, const SeqlenInfo&, int batch, int kv_head, int thread)
        : k(static_cast<const uint16_t*>(p.k) + kv_head * p.k_stride.head, p.k_stride, p.page_bits, thread),
          v(static_cast<const uint16_t*>(p.v) + kv_head * p.v_stride.head, p.v_stride, p.page_bits, thread),
          table(p.page_table + batch * p.page_table_stride) {}

    FMHA_DEVICE void load(uint32_t smem, int n_block, int k_len) const {
        const int first_row = n_block * Traits::kBlockN;
        int32_t pages[KCopy::kPasses];
        k.find(pages, table, first_row, k_len);
        k.load(smem, pages, first_row, k_len);
        if constexpr (Traits::kQkValidChunks == Traits::kVChunks) {  // a thread has the same rows of K and V
            v.load(smem + Traits::kKBytes, pages, first_row, k_len);
        } else {
            int32_t v_pages[VCopy::kPasses];
            v.find(v_pages, table, first_row, k_len);
            v.load(smem + Traits::kKBytes, v_pages, first_row, k_len);
        }
    }
};

}  // namespace fmha

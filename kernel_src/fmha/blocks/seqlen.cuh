// SPDX-License-Identifier: Apache-2.0
// Lengths of one sequence, and the KV tiles that a query tile needs.
#pragma once
#include <ptx/common.cuh>

#include "params.h"

namespace fmha {

// Where one sequence of the batch lies and how long it is, whether the tensors are dense or varlen (cu_seqlens) and
// whether all of K is used (seqused_k).
struct SeqlenInfo {
    int q_len;
    int k_len;
    int64_t q_row;  // first row of the sequence in Q and O (0 for dense tensors, which move by batch stride)
    int64_t k_row;

    FMHA_DEVICE SeqlenInfo(const FwdParams& p, int batch) : q_len(p.seqlen_q), k_len(p.seqlen_k), q_row(0), k_row(0) {
        if (p.cu_seqlens_q != nullptr) {
            const int begin = ld_global_s32(p.cu_seqlens_q + batch);
            q_len = ld_global_s32(p.cu_seqlens_q + batch + 1) - begin;
            q_row = begin;
        }
        if (p.cu_seqlens_k != nullptr) {
            const int begin = ld_global_s32(p.cu_seqlens_k + batch);
            k_len = ld_global_s32(p.cu_seqlens_k + batch + 1) - begin;
            k_row = begin;
        }
        if (p.seqused_k != nullptr) {
            const int used = ld_global_s32(p.seqused_k + batch);
            k_len = used < k_len ? used : k_len;
        }
    }
};

// Keys that query row `row` sees: [begin(row), end(row)). Causal masks, windows, attention chunks and the length of K
// are all in here. Rows are aligned to the bottom right, so query i sits at key position i + k_len - q_len.
struct Band {
    int k_len;
    int diagonal;  // k_len - q_len
    int left;
    int right;
    int chunk;  // 0: none
    int chunk_multiplier;
    int chunk_shift;

    FMHA_DEVICE Band(const FwdParams& p, const SeqlenInfo& seq)
        : k_len(seq.k_len),
          diagonal(seq.k_len - seq.q_len),
          left(p.window_left),
          right(p.window_right),
          chunk(p.attention_chunk),
          chunk_multiplier(p.chunk_multiplier),
          chunk_shift(p.chunk_shift) {}

    FMHA_DEVICE int begin(int row) const {
        int b = row + diagonal - left;
        if (chunk != 0) {
            const int first = chunk_begin(row);
            b = b > first ? b : first;
        }
        return b > 0 ? b : 0;
    }
    FMHA_DEVICE int end(int row) const {
        int e = row + diagonal + right + 1;
        if (chunk != 0) {
            const int past = chunk_begin(row) + chunk;
            e = e < past ? e : past;
        }
        return e < k_len ? (e > 0 ? e : 0) : k_len;
    }

    // First position of the chunk that holds a query: position / chunk * chunk, by a product with the reciprocal, which
    // takes few registers. Rounded down, so that a query before position 0 has a chunk that ends there.
    FMHA_DEVICE int chunk_begin(int row) const {
        const int64_t product = static_cast<int64_t>(2 * (row + diagonal) + 1) * chunk_multiplier;
        return (static_cast<int>(product >> 32) >> chunk_shift) * chunk;
    }
};

// Half-open range [begin, end) of KV tiles that rows [row_begin, row_end) need, and inside it the tiles
// [full_begin, full_end) that every one of these rows sees completely: those need no mask.
struct KvRange {
    int begin;
    int end;
    int full_begin;
    int full_end;

    FMHA_DEVICE KvRange(const Band& band, int row_begin, int row_end, int block_n) {
        begin = band.begin(row_begin) / block_n;
        end = (band.end(row_end - 1) + block_n - 1) / block_n;
        full_begin = (band.begin(row_end - 1) + block_n - 1) / block_n;
        full_end = band.end(row_begin) / block_n;
    }
    FMHA_DEVICE bool needs_mask(int n_block) const { return n_block < full_begin || n_block >= full_end; }
};

}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// The structs that the host fills and kernels read: the ABI between the Python package and the cubins. Plain C++ on
// purpose: a test compiles this file for the host and compares its offsets with those of Python.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define FMHA_ABI 2

namespace fmha {

// Element strides of one tensor seen as [batch, row, head, dim]; dim is contiguous. For varlen tensors batch is 0, for
// a pool of pages it is the step from page to page.
struct Strides {
    int64_t batch;
    int64_t row;
    int64_t head;
};

struct FwdParams {
    const void* q;
    const void* k;
    const void* v;
    void* o;
    float* lse;                   // null: not wanted
    const int32_t* cu_seqlens_q;  // [batch + 1], null: dense
    const int32_t* cu_seqlens_k;  // [batch + 1], null: dense
    const int32_t* seqused_k;     // [batch], null: all of K is used
    const float* sinks;           // [heads], null: none
    const float* alibi_slopes;    // alibi kernels: [heads], or [batch, heads] by alibi_batch_stride
    const int32_t* page_table;    // paged kernels: [batch, pages of a sequence]
    const uint32_t* mask;         // packed kernels: mask bits in fragment order (mask.cuh)
    const uint32_t* mask_any;     // packed kernels: a bit per block of 64 x 64, 1 if any bit of the block is set
    Strides q_stride;
    Strides k_stride;
    Strides v_stride;
    Strides o_stride;
    int64_t lse_batch_stride;  // in floats; rows are contiguous
    int64_t lse_head_stride;
    int64_t page_table_stride;  // entries of one sequence
    int64_t mask_batch_stride;  // in row blocks of 64; 0: one mask for all
    int64_t mask_head_stride;
    int32_t batch;
    int32_t heads;             // query heads
    int32_t heads_per_kv;      // query heads that share one KV head
    int32_t seqlen_q;          // dense: rows of Q; varlen: upper bound
    int32_t seqlen_k;          // dense: rows of K; varlen: upper bound
    int32_t window_left;       // keys visible to the left of the diagonal; kUnlimited: all
    int32_t window_right;      // keys visible to the right of the diagonal; kUnlimited: all
    int32_t m_blocks;          // query tiles per head
    int32_t section_heads;     // heads whose tiles run side by side (scheduler.cuh)
    int32_t longest_first;     // 1: later query tiles (more keys under a causal mask) first
    int32_t attention_chunk;   // queries see only keys of their own chunk of this many positions; 0: all
    int32_t chunk_multiplier;  // (2 * position + 1) * multiplier >> 32 >> shift is position / attention_chunk
    int32_t chunk_shift;
    int32_t alibi_batch_stride;  // 0: all sequences share the slopes
    int32_t page_bits;           // log2 of the tokens of a page
    int32_t mask_row_blocks;     // size of a mask in blocks of 64 rows and of 64 columns (varlen: of all sequences)
    int32_t mask_col_blocks;
    float scale;       // softmax scale
    float scale_log2;  // factor on a finished score: scale * log2(e); softcap kernels: cap * log2(e)
    float tanh_scale;  // softcap kernels: scale / cap
};

// Large enough for every sequence, small enough that row + offset + window stays inside an int32.
constexpr int32_t kUnlimited = 1 << 30;

// A CUtensorMap under another name: 128 opaque bytes that the copy engine reads from the parameter space.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

// Argument of the TMA kernels. Each map has dims (head dim, row, head, batch); varlen tensors have one batch.
struct FwdTmaParams {
    TensorMap q_map;
    TensorMap k_map;
    TensorMap v_map;
    FwdParams fwd;
    int32_t ctas;  // size of the grid: CTAs that share the tiles (tile_queue.cuh)
};

static_assert(sizeof(FwdParams) == 320, "FwdParams and its Python mirror must agree: bump FMHA_ABI with any change");

}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// Packs a mask of one byte per query and key, nonzero = attend. The results are the words that PackedMask of mask.cuh
// reads, in the order that it documents, and one bit per block of 64 x 64 that says whether any bit of the block is
// set.
#pragma once
#include <ptx/bytes.cuh>
#include <ptx/common.cuh>

namespace fmha {

// Plain C++, filled by the host. Strides are bytes.
struct PackMaskParams {
    const uint8_t* mask;
    uint32_t* words;              // [batch * heads, row_blocks, col_blocks, 128]
    uint32_t* any;                // [batch * heads, row_blocks, ceil(col_blocks / 32)]
    const int32_t* cu_seqlens_q;  // [sequences + 1]; null: dense
    int64_t batch_stride;
    int64_t head_stride;
    int64_t row_stride;
    int64_t col_stride;
    int32_t heads;
    int32_t rows;  // dense: queries; varlen: tokens of all sequences
    int32_t cols;
    int32_t sequences;
    int32_t row_blocks;
    int32_t col_blocks;
};

static_assert(sizeof(PackMaskParams) == 88, "PackMaskParams and its Python mirror must agree.");

// A CTA packs 64 rows x 2048 columns: one word of `any`, so that nothing is combined across CTAs. Four warps hold the
// 16 rows each of a block; kWarps / 4 such groups share the 32 blocks, kDepth blocks of a group at a time in flight.
template <int kWarps_, int kDepth_>
struct PackMaskTraits {
    static constexpr int kWarps = kWarps_;
    static constexpr int kDepth = kDepth_;
    static constexpr int kGroups = kWarps / 4;
    static constexpr int kBlocks = 32;
    static constexpr int kSmemBytes = kWarps * 4;

    static_assert(kWarps % 4 == 0, "A block's 64 rows belong to four warps.");
    static_assert(kBlocks % (kGroups * kDepth) == 0, "Every warp packs equally many blocks.");
};

// Rows [first, end) of the mask fill the 64 rows of a row block, the rest is empty.
struct PackRows {
    int first;
    int end;

    FMHA_DEVICE PackRows(const PackMaskParams& p, int row_block) : first(row_block * 64), end(p.rows) {
        if (p.cu_seqlens_q == nullptr) return;
        // Sequence b begins at row block cu_seqlens_q[b] / 64 + b. The row block belongs to the last sequence that
        // begins at it or before it. Tokens past the last sequence count as one more sequence.
        int low = 0;
        int high = p.sequences;
        while (low < high) {
            const int middle = (low + high + 1) / 2;
            const bool before = ld_global_s32(p.cu_seqlens_q + middle) / 64 + middle <= row_block;
            low = before ? middle : low;
            high = before ? high : middle - 1;
        }
        const int begin = ld_global_s32(p.cu_seqlens_q + low);
        first = begin + (row_block - begin / 64 - low) * 64;
        if (low < p.sequences) {
            const int next = ld_global_s32(p.cu_seqlens_q + low + 1);
            end = next < end ? next : end;
        }
    }
};

// The bytes of 16 columns of one row as they come from memory: two aligned vectors that hold them from byte `shift` on,
// or, with shift 0, the 16 bytes themselves in `low`.
struct Columns {
    Vec4 low;
    Vec4 high;
    int shift;
};

// Loads no byte twice from memory (the overlap of neighbouring lanes hits the L1), and none outside the row.
FMHA_DEVICE Columns load_columns(const uint8_t* row, int64_t col_stride, int col, int cols) {
    Columns c{};
    if (col_stride == 1 && col + 16 <= cols) {
        const uint8_t* from = row + col;
        const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 16);
        if (shift == 0) {
            c.low = ld_global_nc_v4(from);
            return c;
        }
        if (col >= shift && col - shift + 32 <= cols) {
            c.low = ld_global_nc_v4(from - shift);
            c.high = ld_global_nc_v4(from - shift + 16);
            c.shift = shift;
            return c;
        }
    }
    const uint8_t* from = row + col * col_stride;
    FMHA_UNROLL
    for (int i = 0; i < 16; ++i) {
        if (col + i < cols) c.low.x[i / 4] |= ld_global_nc_u8(from) << (i % 4 * 8);
        from += col_stride;
    }
    return c;
}

// The 16 bytes in order.
FMHA_DEVICE Vec4 aligned(const Columns& c) {
    if (c.shift == 0) return c.low;
    uint32_t x[8];
    FMHA_UNROLL
    for (int i = 0; i < 4; ++i) {
        x[i] = c.low.x[i];
        x[i + 4] = c.high.x[i];
    }
    FMHA_UNROLL
    for (int i = 0; i < 6; ++i) x[i] = c.shift & 8 ? x[i + 2] : x[i];
    FMHA_UNROLL
    for (int i = 0; i < 5; ++i) x[i] = c.shift & 4 ? x[i + 1] : x[i];
    Vec4 v;
    FMHA_UNROLL
    for (int i = 0; i < 4; ++i) {
        const uint64_t pair = static_cast<uint64_t>(x[i + 1]) << 32 | x[i];
        v.x[i] = static_cast<uint32_t>(pair >> (c.shift % 4 * 8));
    }
    return v;
}

// The top bit of every byte that is not 0.
FMHA_DEVICE uint32_t nonzero(uint32_t x) { return (((x & 0x7f7f7f7fu) + 0x7f7f7f7fu) | x) & 0x80808080u; }

// Lane t of a quad has columns 16 t to 16 t + 15 of rows g (upper) and g + 8 (lower): two groups n of eight columns.
// For each of the quad's lanes u this is eight bits, 4 * n + 2 * half + k of column 8 n + 2 u + k, in byte 0, 2, 1, 3
// of the result for u = 0, 1, 2, 3.
FMHA_DEVICE uint32_t squeeze(const Vec4& upper, const Vec4& lower) {
    uint32_t part[2];
    FMHA_UNROLL
    for (int i = 0; i < 2; ++i) {
        const uint32_t bits = nonzero(upper.x[i]) >> 7 | nonzero(lower.x[i]) >> 5 | nonzero(upper.x[2 + i]) >> 3 |
                              nonzero(lower.x[2 + i]) >> 1;
        part[i] = (bits | bits >> 7) & 0x00ff00ffu;  // neighbouring columns, k = 0 and 1, into one byte
    }
    return part[0] | part[1] << 8;
}

// Byte i of lane t becomes byte t of lane i, within a quad.
FMHA_DEVICE uint32_t quad_bytes_transpose(uint32_t x, int lane) {
    const uint32_t near = shfl_xor(x, 1);
    x = lane & 1 ? (x & 0xff00ff00u) | (near >> 8 & 0x00ff00ffu) : (x & 0x00ff00ffu) | (near << 8 & 0xff00ff00u);
    const uint32_t far = shfl_xor(x, 2);
    return lane & 2 ? (x & 0xffff0000u) | far >> 16 : (x & 0x0000ffffu) | far << 16;
}

template <class Traits>
FMHA_DEVICE void pack_mask(const PackMaskParams& p) {
    const int thread = static_cast<int>(thread_idx());
    const int warp = thread / 32;
    const int lane = thread % 32;
    const int any_words = (p.col_blocks + Traits::kBlocks - 1) / Traits::kBlocks;
    const int tile = static_cast<int>(block_idx()) % any_words;
    const int line = static_cast<int>(block_idx()) / any_words;  // of `any`: (batch, head, row block)
    const int plane = line / p.row_blocks;
    const int row_block = line - plane * p.row_blocks;
    const int batch = plane / p.heads;
    const int head = plane - batch * p.heads;

    const PackRows rows(p, row_block);
    const int row = rows.first + warp % 4 * 16 + lane / 4;
    const uint8_t* upper = p.mask + batch * p.batch_stride + head * p.head_stride + row * p.row_stride;
    const uint8_t* lower = upper + 8 * p.row_stride;
    const int upper_cols = row < rows.end ? p.cols : 0;
    const int lower_cols = row + 8 < rows.end ? p.cols : 0;
    // The transposition leaves the words of the quad's lanes 1 and 2 in each other's place.
    const int place = warp % 4 * 32 + lane / 4 * 4 + lane % 2 * 2 + lane % 4 / 2;
    uint32_t* out = p.words + static_cast<int64_t>(line) * p.col_blocks * 128 + place;

    uint32_t seen = 0;
    FMHA_UNROLL_1
    for (int first = warp / 4 * Traits::kDepth; first < Traits::kBlocks; first += Traits::kGroups * Traits::kDepth) {
        Columns bytes[Traits::kDepth][2];
        FMHA_UNROLL
        for (int i = 0; i < Traits::kDepth; ++i) {
            const int col = (tile * Traits::kBlocks + first + i) * 64 + lane % 4 * 16;
            bytes[i][0] = load_columns(upper, p.col_stride, col, upper_cols);
            bytes[i][1] = load_columns(lower, p.col_stride, col, lower_cols);
        }
        FMHA_UNROLL
        for (int i = 0; i < Traits::kDepth; ++i) {
            const int block = tile * Traits::kBlocks + first + i;
            const uint32_t word = quad_bytes_transpose(squeeze(aligned(bytes[i][0]), aligned(bytes[i][1])), lane);
            if (block < p.col_blocks) st_global_u32(out + static_cast<int64_t>(block) * 128, word);
            seen |= static_cast<uint32_t>(word != 0) << (first + i);
        }
    }
    FMHA_UNROLL
    for (int distance = 16; distance > 0; distance /= 2) seen |= shfl_xor(seen, distance);
    if (lane == 0) st_shared_u32(smem_base() + warp * 4, seen);
    sync_cta();
    if (thread == 0) {
        uint32_t all = 0;
        FMHA_UNROLL
        for (int i = 0; i < Traits::kWarps; i += 4) {
            const Vec4 four = ld_shared_v4(smem_base() + i * 4);
            all |= four.x[0] | four.x[1] | four.x[2] | four.x[3];
        }
        st_global_u32(p.any + static_cast<int64_t>(line) * any_words + tile, all);
    }
}

}  // namespace fmha

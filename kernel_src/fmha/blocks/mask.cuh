// SPDX-License-Identifier: Apache-2.0
// Masks on the fragments of S. Thread layout of an m16n8 accumulator: rows lane / 4 and lane / 4 + 8, columns
// 2 * (lane % 4) and the next (PTX ISA, "Matrix fragments for mma.m16n8k16").
#pragma once
#include "blocks/seqlen.cuh"

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

// apply_band for one m16 tile, one end of the band at a time: a KV tile crosses the right end of the band, the left
// end, or both. Columns are compile-time constants, so a column costs a compare with an immediate and a select.
template <int kNTiles>
FMHA_DEVICE void apply_band_sides(float (&s)[1][kNTiles][4], const Band& band, bool right, bool left, int warp_row,
                                  int col0, int lane) {
    const int first_col = col0 + 2 * (lane % 4);
    FMHA_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int row = warp_row + half * 8 + lane / 4;
        if (right) {
            const int columns = band.end(row) - first_col;
            FMHA_UNROLL
            for (int nt = 0; nt < kNTiles; ++nt) {
                FMHA_UNROLL
                for (int c = 0; c < 2; ++c) {
                    float& x = s[0][nt][half * 2 + c];
                    x = nt * 8 + c < columns ? x : kMinusInfinity;
                }
            }
        }
        if (left) {
            const int columns = band.begin(row) - first_col;
            FMHA_UNROLL
            for (int nt = 0; nt < kNTiles; ++nt) {
                FMHA_UNROLL
                for (int c = 0; c < 2; ++c) {
                    float& x = s[0][nt][half * 2 + c];
                    x = nt * 8 + c >= columns ? x : kMinusInfinity;
                }
            }
        }
    }
}

// One head's packed mask: a bit for every query and key, 1 = seen. A block of 64 rows x 64 columns is 128 words, one
// for each thread of the four warps that hold its fragments (16 rows each): bit 4 * n + i of a thread's word is its
// element i of the n-th m16n8 accumulator. So a warp reads 16 rows x 64 columns as one coalesced word per lane,
// whichever instruction made the fragments. Blocks lie row-major; a varlen sequence begins at row block first_row / 64
// + batch, which leaves every sequence room for its last, partial block without a table of offsets.
// The pack_mask kernel and the host's packer write this layout.
struct PackedMask {
    const uint32_t* words;
    const uint32_t* any;  // per row block, a bit per column block: 1 if any bit of that block is set
    int row_blocks;       // of this sequence; queries outside see nothing
    int col_blocks;

    FMHA_DEVICE PackedMask(const FwdParams& p, const SeqlenInfo& seq, int batch, int head)
        : row_blocks(p.mask_row_blocks), col_blocks(p.mask_col_blocks) {
        int64_t first = batch * p.mask_batch_stride + head * p.mask_head_stride;
        if (p.cu_seqlens_q != nullptr) {
            const int skip = static_cast<int>(seq.q_row / 64) + batch;
            first += skip;
            row_blocks -= skip;
        }
        words = p.mask + first * col_blocks * 128;
        any = p.mask_any + first * any_stride();
    }

    FMHA_DEVICE int any_stride() const { return (col_blocks + 31) / 32; }

    // Whether a tile of kRows x kCols has a bit set. May say yes for an empty tile that shares a block with its
    // neighbour.
    template <int kRows, int kCols>
    FMHA_DEVICE bool visible(int row_begin, int n_block) const {
        static_assert(kRows % 64 == 0, "a query tile is whole row blocks");
        const int last = ((n_block + 1) * kCols - 1) / 64;
        uint32_t found = 0;
        for (int block = n_block * kCols / 64; block <= last && block < col_blocks; ++block) {
            FMHA_UNROLL
            for (int i = 0; i < kRows / 64; ++i) {
                const int row_block = row_begin / 64 + i;
                if (row_block < row_blocks) {
                    found |= load(any + row_block * any_stride() + block / 32) >> (block % 32) & 1;
                }
            }
        }
        return found != 0;
    }

    template <int kMTiles, int kNTiles>
    FMHA_DEVICE void apply(float (&s)[kMTiles][kNTiles][4], int warp_row, int col0, int lane) const {
        FMHA_UNROLL
        for (int mt = 0; mt < kMTiles; ++mt) {
            const int row = warp_row + mt * 16;
            const uint32_t* from = words + static_cast<int64_t>(row / 64) * col_blocks * 128 + row % 64 * 2 + lane;
            const bool inside = row / 64 < row_blocks;
            FMHA_UNROLL
            for (int first = 0; first < kNTiles; first += 8) {
                const int block = col0 / 64 + first / 8;
                uint32_t bits = inside && block < col_blocks ? load(from + block * 128) : 0;
                if constexpr (kNTiles % 8 != 0) {  // the tile may begin inside a block: eight bits per 16 columns
                    const uint32_t next = inside && block + 1 < col_blocks ? load(from + (block + 1) * 128) : 0;
                    bits = static_cast<uint32_t>((static_cast<uint64_t>(next) << 32 | bits) >> (col0 % 64 / 2));
                }
                FMHA_UNROLL
                for (int nt = first; nt < first + 8 && nt < kNTiles; ++nt) {
                    FMHA_UNROLL
                    for (int i = 0; i < 4; ++i) {
                        s[mt][nt][i] = bits >> ((nt - first) * 4 + i) & 1 ? s[mt][nt][i] : kMinusInfinity;
                    }
                }
            }
        }
    }

    FMHA_DEVICE static uint32_t load(const uint32_t* from) {
        return static_cast<uint32_t>(ld_global_s32(reinterpret_cast<const int32_t*>(from)));
    }
};

// The PackedMask of a kernel with packed masks; an unused 0 in any other kernel.
template <bool kPacked>
FMHA_DEVICE auto packed_mask(const FwdParams& p, const SeqlenInfo& seq, int batch, int head) {
    if constexpr (kPacked) {
        return PackedMask(p, seq, batch, head);
    } else {
        return 0;
    }
}

}  // namespace fmha

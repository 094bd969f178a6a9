// SPDX-License-Identifier: Apache-2.0
// Packed masks in the wgmma kernels: which KV tiles have a bit set at all, and the mask on the fragments of S. mask.cuh
// documents the layout. The words of a tile are loaded while a product runs, and the scores are selected one by one
// only if the mask hides one of them.
#pragma once
#include "blocks/mask.cuh"
#include "forward/wgmma_traits.cuh"

namespace fmha {

// The KV tiles of kRowBlocks blocks of 64 query rows, right to left. The producer walks over the tiles that the whole
// query tile needs and tells the consumers the next one (SmemSm90::next_tile). A consumer only looks up which of them
// its own rows need.
template <class Traits, int kRowBlocks, bool kPacked = Traits::kPacked>
struct TileWalk;

// Without a packed mask every tile of the band's range has visible keys.
template <class Traits, int kRowBlocks>
struct TileWalk<Traits, kRowBlocks, false> {
    FMHA_DEVICE TileWalk(const FwdParams&, const SeqlenInfo&, int, int, int, int) {}
    FMHA_DEVICE int left_of(int n_block) const { return n_block - 1; }
};

// With a packed mask the tiles without a bit are left out.
template <class Traits, int kRowBlocks>
struct TileWalk<Traits, kRowBlocks, true> {
    const FwdParams& p;
    int row_block;   // the first row block, counted over all masks
    int row_blocks;  // from there to the end of this mask
    int begin;       // the leftmost tile of the band's range

    FMHA_DEVICE TileWalk(const FwdParams& p_, const SeqlenInfo& seq, int batch, int head, int row_begin, int begin_)
        : p(p_), row_blocks(p.mask_row_blocks - row_begin / 64), begin(begin_) {
        row_block = static_cast<int>(batch * p.mask_batch_stride + head * p.mask_head_stride) + row_begin / 64;
        if (p.cu_seqlens_q != nullptr) {
            const int skip = static_cast<int>(seq.q_row / 64) + batch;
            row_block += skip;
            row_blocks -= skip;
        }
    }

    // The next tile with a bit, or a tile left of `begin` if there is none. A tile that shares a block with its
    // neighbour may turn out to be empty.
    FMHA_DEVICE int left_of(int n_block) const {
        const int last_block = p.mask_col_blocks - 1;
        const int first_block = begin * Traits::kBlockN / 64;
        int block = (n_block * Traits::kBlockN - 1) / 64;
        block = block < last_block ? block : last_block;
        while (n_block > begin && block >= first_block) {
            const uint32_t left = load(block / 32) << (31 - block % 32);  // this block's bit on top
            if (left != 0) {
                const int found = block - __builtin_clz(left);
                const int tile = (found * 64 + 63) / Traits::kBlockN;
                return tile < n_block ? tile : n_block - 1;
            }
            block = block / 32 * 32 - 1;
        }
        return begin - 1;
    }

    // The leftmost tile with a bit, given that there is one.
    FMHA_DEVICE int leftmost() const {
        int block = begin * Traits::kBlockN / 64;
        while (block < p.mask_col_blocks) {
            const uint32_t right = load(block / 32) >> (block % 32);
            if (right != 0) {
                block += 31 - __builtin_clz(right & -right);  // its lowest bit
                break;
            }
            block = (block / 32 + 1) * 32;
        }
        const int tile = block * 64 / Traits::kBlockN;
        return tile > begin ? tile : begin;
    }

    // The bits of 32 column blocks, combined over the row blocks. All lanes get the same word, and warp_uniform tells
    // the compiler so: a loop that tests it needs no divergent branches.
    FMHA_DEVICE uint32_t load(int index) const {
        const int stride = (p.mask_col_blocks + 31) / 32;
        const uint32_t* any = p.mask_any + static_cast<int64_t>(row_block) * stride + index;
        uint32_t seen = 0;
        FMHA_UNROLL
        for (int i = 0; i < kRowBlocks; ++i) {
            seen |= i < row_blocks ? PackedMask::load(any + i * stride) : 0;
        }
        return static_cast<uint32_t>(warp_uniform(static_cast<int>(seen)));
    }
};

// The mask on the 16 rows of a warp.
template <class Traits, bool kPacked = Traits::kPacked>
struct MaskRows;

template <class Traits>
struct MaskRows<Traits, false> {
    FMHA_DEVICE MaskRows(const TileWalk<Traits, 1>&, int) {}
};

template <class Traits>
struct MaskRows<Traits, true> {
    // A tile begins at a multiple of kAlign columns: its bits are in up to kWords words of a lane.
    static constexpr int kLowBit = Traits::kBlockN & -Traits::kBlockN;
    static constexpr int kAlign = kLowBit < 64 ? kLowBit : 64;
    static constexpr int kWords = (64 - kAlign + Traits::kBlockN + 63) / 64;
    static constexpr int kChunks = (Traits::kBlockN + 63) / 64;  // of 64 columns; the last one may have fewer

    uint32_t words[kWords];
    uint32_t coming[kWords];  // of the next tile: loaded a whole step ahead, to hide the latency of global memory

    const uint32_t* from;  // this lane's word of column block 0
    int col_blocks;        // 0 for rows below the mask, which see nothing

    // `rows` is the walk of the warpgroup's 64 query rows.
    FMHA_DEVICE MaskRows(const TileWalk<Traits, 1>& rows, int thread)
        : from(rows.p.mask + static_cast<int64_t>(rows.row_block) * rows.p.mask_col_blocks * 128 + thread),
          col_blocks(0 < rows.row_blocks ? rows.p.mask_col_blocks : 0) {}

    // Loads the words of the next tile. step() makes them the words of the present one.
    FMHA_DEVICE void load(int n_block) {
        const uint32_t block = static_cast<uint32_t>(n_block) * Traits::kBlockN / 64;
        FMHA_UNROLL
        for (int i = 0; i < kWords; ++i) {
            const uint32_t at = block + i;
            coming[i] = at < static_cast<uint32_t>(col_blocks) ? PackedMask::load(from + at * 128) : 0;
        }
    }

    FMHA_DEVICE void step() {
        FMHA_UNROLL
        for (int i = 0; i < kWords; ++i) {
            words[i] = coming[i];
        }
    }

    // The words of chunk i, shifted to where the tile begins; columns past the tile count as seen.
    FMHA_DEVICE uint32_t chunk(int i, int n_block) const {
        uint32_t bits = words[i];
        if constexpr (kAlign != 64) {
            const uint64_t next = i + 1 < kWords ? words[i + 1] : 0;
            bits = static_cast<uint32_t>((next << 32 | bits) >>
                                         (static_cast<uint32_t>(n_block) * Traits::kBlockN % 64 / 2));
        }
        constexpr int kRest = Traits::kBlockN % 64;
        return i == kChunks - 1 && kRest != 0 ? bits | ~0u << kRest / 2 % 32 : bits;
    }

    FMHA_DEVICE void apply(float (&s)[1][Traits::kNTiles][4], int n_block) const {
        uint32_t bits[kChunks];
        uint32_t all = ~0u;
        FMHA_UNROLL
        for (int i = 0; i < kChunks; ++i) {
            bits[i] = chunk(i, n_block);
            all &= bits[i];
        }
        if (warp_any(all != ~0u)) {  // most tiles hide nothing
            FMHA_UNROLL
            for (int nt = 0; nt < Traits::kNTiles; ++nt) {
                FMHA_UNROLL
                for (int i = 0; i < 4; ++i) {
                    s[0][nt][i] = bits[nt / 8] >> (nt % 8 * 4 + i) & 1 ? s[0][nt][i] : kMinusInfinity;
                }
            }
        }
    }
};

}  // namespace fmha

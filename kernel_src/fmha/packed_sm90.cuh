// SPDX-License-Identifier: Apache-2.0
// Packed masks on the wgmma kernels: which KV tiles have a bit set at all, and the bits themselves on the fragments of
// S. The layout of a mask is in mask.cuh; here its words come early, under the products, and are looked at only where
// one of them hides something.
#pragma once
#include "mask.cuh"
#include "traits_sm90.cuh"

namespace fmha {

// One word of a mask's summary, of 32 column blocks.
struct SeenBlocks {
    int index = -1;
    uint32_t bits = 0;
};

// The KV tiles of some blocks of 64 query rows, right to left. Producer and consumers walk over those of the whole
// query tile alike, each on its own; a consumer also looks where its own rows have any.
template <class Traits, int kRowBlocks, bool kPacked = Traits::kPacked>
struct TileWalk;

// A band has work in every tile of its range.
template <class Traits, int kRowBlocks>
struct TileWalk<Traits, kRowBlocks, false> {
    FMHA_DEVICE TileWalk(const FwdParams&, const SeqlenInfo&, int, int, int, int) {}
    FMHA_DEVICE int left_of(int n_block) const { return n_block - 1; }
    FMHA_DEVICE int left_of(int n_block, SeenBlocks&) const { return n_block - 1; }
};

// A packed mask leaves out the tiles without a bit.
template <class Traits, int kRowBlocks>
struct TileWalk<Traits, kRowBlocks, true> {
    const FwdParams& p;
    int row_block;   // the first one, among those of all masks
    int row_blocks;  // from there to the end of this mask
    int begin;       // the leftmost tile that the band leaves

    FMHA_DEVICE TileWalk(const FwdParams& p_, const SeqlenInfo& seq, int batch, int head, int row_begin, int begin_)
        : p(p_), row_blocks(p.mask_row_blocks - row_begin / 64), begin(begin_) {
        row_block = static_cast<int>(batch * p.mask_batch_stride + head * p.mask_head_stride) + row_begin / 64;
        if (p.cu_seqlens_q != nullptr) {
            const int skip = static_cast<int>(seq.q_row / 64) + batch;
            row_block += skip;
            row_blocks -= skip;
        }
    }

    // The next tile with a bit; left of `begin`: there is none. A tile that shares a block with its neighbour may turn
    // out to be empty. Who has registers to spare keeps the word from call to call.
    FMHA_DEVICE int left_of(int n_block, SeenBlocks& word) const {
        const int last_block = p.mask_col_blocks - 1;
        const int first_block = begin * Traits::kBlockN / 64;
        int block = (n_block * Traits::kBlockN - 1) / 64;
        block = block < last_block ? block : last_block;
        while (n_block > begin && block >= first_block) {
            if (block / 32 != word.index) {
                word.index = block / 32;
                word.bits = load(word.index);
            }
            const uint32_t left = word.bits << (31 - block % 32);  // this block's bit on top
            if (left != 0) {
                const int found = block - __builtin_clz(left);
                const int tile = (found * 64 + 63) / Traits::kBlockN;
                return tile < n_block ? tile : n_block - 1;
            }
            block = block / 32 * 32 - 1;
        }
        return begin - 1;
    }
    FMHA_DEVICE int left_of(int n_block) const {
        SeenBlocks word;
        return left_of(n_block, word);
    }

    // The same for the whole warp, and the compiler is told: a loop that continues on it stays uniform.
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
struct MaskRows<Traits, false> {};

template <class Traits>
struct MaskRows<Traits, true> {
    // A tile begins at a multiple of kAlign columns: its bits are in up to kWords words of a lane.
    static constexpr int kLowBit = Traits::kBlockN & -Traits::kBlockN;
    static constexpr int kAlign = kLowBit < 64 ? kLowBit : 64;
    static constexpr int kWords = (64 - kAlign + Traits::kBlockN + 63) / 64;
    static constexpr int kChunks = (Traits::kBlockN + 63) / 64;  // of 64 columns, the last one maybe less

    uint32_t words[kWords];
    uint32_t coming[kWords];  // of the next tile: on their way for a whole step, because they come from far

    // Asks for the words of a tile, which become those of the present one with the next call of step(). `rows` are
    // those of the warpgroup.
    FMHA_DEVICE void load(const TileWalk<Traits, 1>& rows, int n_block, int thread) {
        const int block = n_block * Traits::kBlockN / 64;
        const int cols = rows.p.mask_col_blocks;
        const int64_t first = static_cast<int64_t>(rows.row_block) * cols + block;
        const uint32_t* from = rows.p.mask + first * 128 + thread;
        const int there = 0 < rows.row_blocks ? cols - block : 0;  // below and right of the mask is nothing
        FMHA_UNROLL
        for (int i = 0; i < kWords; ++i) {
            coming[i] = i < there ? PackedMask::load(from + i * 128) : 0;
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
            bits = static_cast<uint32_t>((next << 32 | bits) >> (n_block * Traits::kBlockN % 64 / 2));
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
        if (warp_any(all != ~0u)) {  // tiles without a hole are the most
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

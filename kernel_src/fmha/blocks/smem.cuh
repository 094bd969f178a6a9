// SPDX-License-Identifier: Apache-2.0
// The layout of a tile in shared memory. Every use of the swizzle goes through this file.
#pragma once
#include <ptx/common.cuh>

namespace fmha {

constexpr int kChunkBytes = 16;  // what cp.async, ldmatrix and a vector store move at a time
constexpr int kChunkElements = 8;

// Rows of kChunks 16-byte chunks without padding. ldmatrix reads the same chunk of eight consecutive rows, and shared
// memory serves eight 16-byte chunks at once only if their addresses differ modulo 128 bytes. With kChunks odd they do.
// Each factor of two in kChunks (up to eight) folds the rows onto half as many positions, which one XOR of a row bit
// into the chunk index undoes. The XOR stays inside the row, so every head dim keeps its exact size.
template <int kChunks>
struct SmemTile {
    static constexpr int kFoldBits = kChunks % 8 == 0 ? 3 : kChunks % 4 == 0 ? 2 : kChunks % 2 == 0 ? 1 : 0;
    static constexpr int kFoldMask = (1 << kFoldBits) - 1;
    static constexpr int kRowBytes = kChunks * kChunkBytes;

    FMHA_DEVICE static uint32_t offset(int row, int chunk) {
        const int flip = (row >> (3 - kFoldBits)) & kFoldMask;
        return static_cast<uint32_t>(row * kRowBytes + (chunk ^ flip) * kChunkBytes);
    }

    // From the address of (row, chunk) with chunk 0 or 1 to that of (row + kRows, chunk + kMoreChunks). The row bits
    // that flip repeat every eight rows, and the flip touches the low chunk bits only, so a step costs at most one XOR
    // with a constant: no table of addresses occupies registers.
    template <int kRows, int kMoreChunks>
    FMHA_DEVICE static uint32_t step(uint32_t address) {
        static_assert(kRows % 8 == 0 && kMoreChunks % 2 == 0, "the flip must stay what it was");
        constexpr int kLow = kMoreChunks & kFoldMask;
        return (address ^ (kLow * kChunkBytes)) + (kRows * kRowBytes + (kMoreChunks - kLow) * kChunkBytes);
    }
};

}  // namespace fmha

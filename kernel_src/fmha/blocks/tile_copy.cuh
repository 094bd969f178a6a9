// SPDX-License-Identifier: Apache-2.0
// Copies a tile of rows from global to shared memory with cp.async.
#pragma once
#include <ptx/sm80.cuh>

#include "blocks/smem.cuh"

namespace fmha {

// Rows that one pass of the CTA covers: a multiple of eight (or a power of two below), so that the swizzle repeats from
// pass to pass and the address in shared memory moves by a constant.
constexpr int rows_per_pass(int threads, int chunks) {
    const int rows = threads / chunks;
    return rows >= 8 ? rows / 8 * 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
}

// A thread keeps one 16-byte column and walks down the rows; threads left over stay idle rather than cross rows.
template <int kRows, class Tile, int kValidChunks, int kThreads>
struct TileCopy {
    static constexpr int kRowsPerPass = rows_per_pass(kThreads, kValidChunks);
    static_assert(kThreads >= kValidChunks, "a row must not have more chunks than the CTA has threads");

    const uint16_t* source;  // this thread's chunk of row 0
    int64_t row_stride;      // elements
    int row;
    int chunk;

    FMHA_DEVICE TileCopy(const uint16_t* base, int64_t row_stride_, int thread)
        : row_stride(row_stride_), row(thread / kValidChunks), chunk(thread % kValidChunks) {
        source = base + row * row_stride + chunk * kChunkElements;
    }

    // Rows [first_row, first_row + kRows) of the tensor; rows at or past `end_row` arrive as zeros and are not read, so
    // that what lies behind a sequence (0 * NaN) never reaches the result.
    FMHA_DEVICE void load(uint32_t smem, int first_row, int end_row) const {
        if (row >= kRowsPerPass) {
            return;
        }
        const uint16_t* from = source + first_row * row_stride;
        const int rows_left = end_row - first_row - row;
        FMHA_UNROLL
        for (int done = 0; done < kRows; done += kRowsPerPass) {
            if (kRows % kRowsPerPass == 0 || row + done < kRows) {
                cp_async_16(smem + Tile::offset(row + done, chunk), from, done < rows_left);
            }
            from += kRowsPerPass * row_stride;
        }
    }
};

// Zeroes the chunks that no copy writes: the surplus of a head dim that is not a multiple of 16.
template <class Tile, int kChunks, int kValidChunks, int kThreads>
FMHA_DEVICE void zero_surplus(uint32_t smem, int rows, int thread) {
    if constexpr (kValidChunks < kChunks) {
        for (int row = thread; row < rows; row += kThreads) {
            FMHA_UNROLL
            for (int chunk = kValidChunks; chunk < kChunks; ++chunk) {
                st_shared_v4(smem + Tile::offset(row, chunk), Vec4{{0, 0, 0, 0}});
            }
        }
    }
}

}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// Warp-wide operations: shuffles, ldmatrix and mma.sync. Each lane deposits its operands in its own
// column of the warp's exchange arrays; the last lane to arrive computes all results.
#include <string.h>

#include "convert.h"
#include "state.h"

namespace fmha {
namespace emu {

// --- shuffles

template <class Source>
static uint32_t shuffle(Op op, uint32_t x, uint32_t argument, Source source) {
    Thread* thread = self();
    Warp* warp = thread->warp;
    warp->in[0][thread->lane] = x;
    warp->in[1][thread->lane] = argument;
    meet(thread, op, [source](Warp* w) {
        for (uint32_t lane = 0; lane < 32; ++lane) w->out[0][lane] = w->in[0][source(lane, w->in[1][lane]) % 32];
    });
    return warp->out[0][thread->lane];
}

uint32_t shfl_xor(uint32_t x, int lane_mask) {
    return shuffle(Op::kShflXor, x, static_cast<uint32_t>(lane_mask),
                   [](uint32_t lane, uint32_t m) { return lane ^ m; });
}

uint32_t shfl_idx(uint32_t x, int lane) {
    return shuffle(Op::kShflIdx, x, static_cast<uint32_t>(lane), [](uint32_t, uint32_t from) { return from; });
}

int warp_any(int x) {
    Thread* thread = self();
    Warp* warp = thread->warp;
    warp->in[0][thread->lane] = x != 0;
    meet(thread, Op::kWarpAny, [](Warp* w) {
        uint32_t any = 0;
        for (uint32_t lane = 0; lane < 32; ++lane) any |= w->in[0][lane];
        for (uint32_t lane = 0; lane < 32; ++lane) w->out[0][lane] = any;
    });
    return static_cast<int>(warp->out[0][thread->lane]);
}

// --- ldmatrix

template <int kMatrices, bool kTrans>
static void ldmatrix(Op op, uint32_t (&r)[kMatrices], uint32_t addr) {
    Thread* thread = self();
    Warp* warp = thread->warp;
    warp->in[0][thread->lane] = addr;
    meet(thread, op, [op](Warp* w) {
        for (int i = 0; i < kMatrices; ++i) {
            uint16_t matrix[8][8];
            for (int row = 0; row < 8; ++row)
                memcpy(matrix[row], warp_read_row(w->lanes[8 * i + row], op, w->in[0][8 * i + row]), 16);
            for (uint32_t lane = 0; lane < 32; ++lane) {
                const uint32_t g = lane / 4, t = lane % 4 * 2;
                const uint32_t lo = kTrans ? matrix[t][g] : matrix[g][t];
                const uint32_t hi = kTrans ? matrix[t + 1][g] : matrix[g][t + 1];
                w->out[i][lane] = lo | hi << 16;
            }
        }
    });
    for (int i = 0; i < kMatrices; ++i) r[i] = warp->out[i][thread->lane];
}

void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr) { ldmatrix<4, false>(Op::kLdmatrixX4, r, addr); }
void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr) { ldmatrix<4, true>(Op::kLdmatrixX4Trans, r, addr); }
void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t addr) { ldmatrix<2, true>(Op::kLdmatrixX2Trans, r, addr); }

// --- mma

typedef float Row8 __attribute__((vector_size(32)));

// The fragments of 32 lanes laid end to end are row-major 8x8 matrices: lane 4g + t holds row g,
// columns 2t and 2t+1. So in[0..3] are the quadrants of A (rows 0-7 and 8-15 of depth 0-7, then of
// depth 8-15), in_b[0..1] the two halves of B transposed, and acc[0..1] the upper and lower half of
// D.
template <class From>
static void multiply(Warp* warp) {
    float a[4][64], b_t[2][64];
    uint16_t half[64];
    for (int r = 0; r < 4; ++r) {
        memcpy(half, warp->in[r], sizeof(half));
        for (int i = 0; i < 64; ++i) a[r][i] = From::convert(half[i]);
    }
    for (int r = 0; r < 2; ++r) {
        memcpy(half, warp->in_b[r], sizeof(half));
        for (int i = 0; i < 64; ++i) b_t[r][i] = From::convert(half[i]);
    }
    Row8 b[16];
    for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) b[k][n] = b_t[k / 8][n * 8 + k % 8];
    for (int m = 0; m < 16; ++m) {
        float* d = warp->acc[m / 8] + m % 8 * 8;
        const float* a_low = a[m / 8] + m % 8 * 8;
        const float* a_high = a[m / 8 + 2] + m % 8 * 8;
        Row8 even, odd = {};
        memcpy(&even, d, sizeof(even));
        for (int k = 0; k < 8; ++k) {
            even += a_low[k] * b[k];
            odd += a_high[k] * b[k + 8];
        }
        even += odd;
        memcpy(d, &even, sizeof(even));
    }
}

template <class From>
static void mma(Op op, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Thread* thread = self();
    Warp* warp = thread->warp;
    const uint32_t lane = thread->lane;
    for (int r = 0; r < 4; ++r) warp->in[r][lane] = a[r];
    warp->in_b[0][lane] = b0;
    warp->in_b[1][lane] = b1;
    memcpy(&warp->acc[0][2 * lane], d, 8);
    memcpy(&warp->acc[1][2 * lane], d + 2, 8);
    meet(thread, op, multiply<From>);
    memcpy(d, &warp->acc[0][2 * lane], 8);
    memcpy(d + 2, &warp->acc[1][2 * lane], 8);
}

void mma_m16n8k16_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma<FromFp16>(Op::kMmaFp16, d, a, b0, b1);
}

void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma<FromBf16>(Op::kMmaBf16, d, a, b0, b1);
}

}  // namespace emu
}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// wgmma: each warp computes its 16 of the 64 rows, at the wait that retires the batch, from what
// shared memory holds then. Until that wait the accumulators are NaN.
//
// The four warps of a warpgroup run on their own, and must in the end have issued the same.
#include <string.h>

#include "convert.h"
#include "state.h"

namespace fmha {
namespace emu {

// What an accumulator holds while a wgmma on it is in flight. A signalling NaN: arithmetic on it
// leaves other bits, so that a result stored back shows.
constexpr uint32_t kPoison = 0x7fadf00d;

// --- shared-memory descriptors

// "Matrix descriptor format" and "Strides" of the PTX manual's chapter on wgmma, for 16-bit
// elements.
struct Descriptor {
    uint32_t address, leading, stride;
    uint32_t span;  // bytes of a row of the swizzle atom
    uint32_t mask;  // of the address bits from 7 up that flip those from 4 up

    Descriptor(Thread* thread, uint64_t bits)
        : address((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {
        static const uint32_t spans[] = {16, 128, 64, 32};
        const uint32_t mode = static_cast<uint32_t>(bits >> 62);
        span = spans[mode];
        mask = span / 16 - 1;
        if (bits & 0x3ff1c000c000c000ull)
            fault(thread, Op::kWgmma, "descriptor 0x%016llx has bits set that mean nothing",
                  static_cast<unsigned long long>(bits));
        if (bits >> 49 & 7)
            fault(thread, Op::kWgmma,
                  "descriptor 0x%016llx has a base offset: align the tile to 8 rows of the swizzle "
                  "instead, the emulator models no other",
                  static_cast<unsigned long long>(bits));
    }

    // Depth contiguous: chunk `k_chunk` (0 or 1) of row `row`.
    uint32_t k_major(uint32_t row, uint32_t k_chunk) const {
        const uint32_t step = span == 16 ? leading : 16;
        return swizzle(address + row % 8 * span + row / 8 * stride + k_chunk * step);
    }

    // Rows or columns contiguous: eight of them from 8 * chunk on, at depth k.
    uint32_t mn_major(uint32_t chunk, uint32_t k) const {
        const uint32_t per_span = span / 16;
        const uint32_t across = chunk % per_span * 16;
        if (span == 16) return address + chunk * stride + k % 8 * 16 + k / 8 * leading;
        return swizzle(address + across + chunk / per_span * leading + k % 8 * span + k / 8 * stride);
    }

    uint32_t swizzle(uint32_t at) const { return at ^ (at >> 7 & mask) << 4; }
};

// --- registers

// Index into thread->registers.
static uint16_t track(Thread* thread, const void* address, uint32_t count) {
    uint32_t* words = static_cast<uint32_t*>(const_cast<void*>(address));
    std::vector<Registers>& all = thread->registers;
    for (size_t i = 0; i < all.size(); ++i)
        if (all[i].address == words && all[i].count == count) return static_cast<uint16_t>(i);
    all.push_back({words, count, 0, {}, {}});
    return static_cast<uint16_t>(all.size() - 1);
}

static bool same(const std::vector<uint32_t>& values, const uint32_t* words) {
    return !values.empty() && memcmp(values.data(), words, 4 * values.size()) == 0;
}

void wgmma_fence() {
    Thread* thread = self();
    for (Registers& known : thread->registers) known.at_fence.assign(known.address, known.address + known.count);
    meet(thread, Op::kWgmmaFence, [](Warp* warp) { warp->fenced = true; });
}

// Registers that no fence has looked at yet count as written before the latest one.
static void check_fence(Thread* thread, Registers& known, const char* what) {
    if (known.at_fence.empty())
        known.at_fence.assign(known.address, known.address + known.count);
    else if (!same(known.at_fence, known.address) && !same(known.left, known.address))
        fault(thread, Op::kWgmma, "%s was written by ordinary code after the latest wgmma_fence: fence between the two",
              what);
}

static void check_poisoned(Thread* thread, Op op, const Registers& d) {
    for (uint32_t i = 0; i < d.count; ++i)
        if (d.address[i] != kPoison)
            fault(thread, op, "accumulator register %u was written while a wgmma on it was in flight", i);
}

// Poisons the accumulator; if it is so already, it belongs to a wgmma in flight, and nobody may
// have touched it.
static uint16_t seize_accumulator(Thread* thread, float* d, uint32_t count) {
    const uint16_t index = track(thread, d, count);
    Registers& known = thread->registers[index];
    if (known.in_flight++ != 0) {
        check_poisoned(thread, Op::kWgmma, known);
    } else {
        check_fence(thread, known, "the accumulator");
        known.left.assign(known.address, known.address + count);  // what the operation starts from
        for (uint32_t i = 0; i < count; ++i) known.address[i] = kPoison;
    }
    return index;
}

// --- issue

static void issue(Thread* thread, Warp* warp) {
    Cta* cta = thread->cta;
    const uint32_t group = warp->index / 4, count = warp->issued + 1;
    WgmmaOp& op = warp->issuing;
    if (cta->warps.size() < group * 4 + 4)
        fault(thread, Op::kWgmma, "warps %u and up are no complete warpgroup of four", group * 4);
    const WgmmaStep step = {op.from_registers ? 0 : op.a, op.b, op.n,
                            1u * op.bf16 | 2u * op.from_registers | 4u * op.accumulate};
    std::vector<WgmmaStep>& steps = cta->steps[group];
    if (warp->issued == steps.size())
        steps.push_back(step);
    else if (!(steps[warp->issued] == step))
        fault(thread, Op::kWgmma,
              "the warps of a warpgroup must execute the same: operation %u of warp %u differs "
              "from that of another warp (descriptor B 0x%016llx, theirs 0x%016llx)",
              count, warp->index, static_cast<unsigned long long>(op.b),
              static_cast<unsigned long long>(steps[warp->issued].b));
    refresh_warp(warp);
    if (!op.from_registers) {
        const Descriptor a(thread, op.a);
        for (uint32_t row = 0; row < 16; ++row)
            for (uint32_t chunk = 0; chunk < 2; ++chunk)
                note_wgmma_read(thread, a.k_major(warp->index % 4 * 16 + row, chunk), count);
        const Descriptor b(thread, op.b);
        for (uint32_t row = 0; row < op.n; ++row)
            for (uint32_t chunk = 0; chunk < 2; ++chunk) note_wgmma_read(thread, b.k_major(row, chunk), count);
    } else {
        const Descriptor b(thread, op.b);
        for (uint32_t chunk = 0; chunk < op.n / 8; ++chunk)
            for (uint32_t k = 0; k < 16; ++k) note_wgmma_read(thread, b.mn_major(chunk, k), count);
    }
    warp->ops.push_back(op);
    warp->issued = count;
}

static void wgmma(const WgmmaOp& mine, float* d, const uint32_t* a) {
    Thread* thread = self();
    Warp* warp = thread->warp;
    WgmmaOp& op = warp->issuing;
    const uint32_t lane = thread->lane;
    const bool first = warp->arrived == 0 || warp->op != Op::kWgmma;
    if (!first && (op.b != mine.b || op.a != mine.a || op.n != mine.n || op.bf16 != mine.bf16 ||
                   op.accumulate != mine.accumulate || op.from_registers != mine.from_registers))
        fault(thread, Op::kWgmma, "its operands differ from those of another lane of the warp");
    if (first) op = mine;
    if (!warp->fenced) fault(thread, Op::kWgmma, "no wgmma_fence before the first wgmma");
    op.d[lane] = seize_accumulator(thread, d, mine.n / 2);
    if (a != nullptr) {
        op.a_registers[lane] = track(thread, a, 4);
        check_fence(thread, thread->registers[op.a_registers[lane]], "operand A");
        memcpy(op.a_value[lane], a, 16);
    }
    meet(thread, Op::kWgmma, [thread](Warp* w) { issue(thread, w); });
}

void wgmma_ss(bool bf16, uint32_t n, float* d, uint64_t a, uint64_t b, int accumulate) {
    WgmmaOp op = {};
    op.bf16 = bf16;
    op.accumulate = accumulate != 0;
    op.n = n;
    op.a = a;
    op.b = b;
    wgmma(op, d, nullptr);
}

void wgmma_rs_trans(bool bf16, uint32_t n, float* d, const uint32_t* a, uint64_t b, int accumulate) {
    WgmmaOp op = {};
    op.bf16 = bf16;
    op.from_registers = true;
    op.accumulate = accumulate != 0;
    op.n = n;
    op.b = b;
    wgmma(op, d, a);
}

void wgmma_commit() {
    meet(self(), Op::kWgmmaCommit, [](Warp* warp) { warp->batches.push_back(warp->issued); });
}

// --- arithmetic

constexpr uint32_t kMaxN = 256;
typedef float Row8 __attribute__((vector_size(32)));

struct Tile {
    float d[16][kMaxN];
    float a[16][16];
    float b[16][kMaxN];  // [depth][column]
};

// Lane 4g + t holds rows g and g + 8, columns 8j + 2t and the next.
static float& element(Tile& tile, uint32_t lane, uint32_t i) {
    return tile.d[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
}

static void load_accumulator(const WgmmaOp& op, Thread* const* lanes, Tile& tile) {
    for (uint32_t lane = 0; lane < 32; ++lane) {
        const uint32_t* left = lanes[lane]->registers[op.d[lane]].left.data();
        for (uint32_t i = 0; i < op.n / 2; ++i) memcpy(&element(tile, lane, i), left + i, 4);
    }
}

// Hands the accumulator to the program, unless a later batch goes on with it.
static void store_accumulator(const WgmmaOp& op, Thread* const* lanes, Tile& tile, uint32_t done) {
    for (uint32_t lane = 0; lane < 32; ++lane) {
        Registers& d = lanes[lane]->registers[op.d[lane]];
        for (uint32_t i = 0; i < op.n / 2; ++i) memcpy(&d.left[i], &element(tile, lane, i), 4);
        d.in_flight -= done;
        if (d.in_flight != 0) continue;
        check_poisoned(lanes[lane], Op::kWgmmaWait, d);
        memcpy(d.address, d.left.data(), 4 * d.left.size());
    }
}

template <class From>
static void load_operands(Thread* thread, const WgmmaOp& op, Tile& tile) {
    const unsigned char* smem = thread->cta->smem.get() - kSmemBase;
    uint16_t half[8];
    if (op.from_registers) {
        for (uint32_t lane = 0; lane < 32; ++lane)
            for (uint32_t r = 0; r < 4; ++r)
                for (uint32_t i = 0; i < 2; ++i)
                    tile.a[lane / 4 + r % 2 * 8][r / 2 * 8 + lane % 4 * 2 + i] =
                        From::convert(static_cast<uint16_t>(op.a_value[lane][r] >> 16 * i & 0xffff));
        const Descriptor b(thread, op.b);
        for (uint32_t k = 0; k < 16; ++k)
            for (uint32_t chunk = 0; chunk < op.n / 8; ++chunk) {
                memcpy(half, smem + b.mn_major(chunk, k), 16);
                for (int i = 0; i < 8; ++i) tile.b[k][chunk * 8 + i] = From::convert(half[i]);
            }
        return;
    }
    const Descriptor a(thread, op.a), b(thread, op.b);
    for (uint32_t chunk = 0; chunk < 2; ++chunk) {
        for (uint32_t row = 0; row < 16; ++row) {
            memcpy(half, smem + a.k_major(thread->warp->index % 4 * 16 + row, chunk), 16);
            for (int i = 0; i < 8; ++i) tile.a[row][chunk * 8 + i] = From::convert(half[i]);
        }
        for (uint32_t column = 0; column < op.n; ++column) {
            memcpy(half, smem + b.k_major(column, chunk), 16);
            for (int i = 0; i < 8; ++i) tile.b[chunk * 8 + i][column] = From::convert(half[i]);
        }
    }
}

// Two rows at a time, so that each load of B serves both.
static void multiply(Tile& tile, uint32_t n) {
    for (uint32_t m = 0; m < 16; m += 2)
        for (uint32_t column = 0; column < n; column += 8) {
            Row8 d0, d1, b;
            memcpy(&d0, tile.d[m] + column, sizeof(d0));
            memcpy(&d1, tile.d[m + 1] + column, sizeof(d1));
            for (int k = 0; k < 16; ++k) {
                memcpy(&b, tile.b[k] + column, sizeof(b));
                d0 += tile.a[m][k] * b;
                d1 += tile.a[m + 1][k] * b;
            }
            memcpy(tile.d[m] + column, &d0, sizeof(d0));
            memcpy(tile.d[m + 1] + column, &d1, sizeof(d1));
        }
}

static void check_operands_untouched(const WgmmaOp& op, Thread* const* lanes) {
    if (!op.from_registers) return;
    for (uint32_t lane = 0; lane < 32; ++lane) {
        const Registers& a = lanes[lane]->registers[op.a_registers[lane]];
        if (memcmp(a.address, op.a_value[lane], sizeof(op.a_value[lane])) != 0)
            fault(lanes[lane], Op::kWgmmaWait,
                  "a register of operand A was rewritten while the wgmma that reads it was in "
                  "flight");
    }
}

static void retire(Warp* warp, Thread* thread, uint32_t until) {
    static thread_local Tile tile;
    while (warp->retired < until) {
        // Operations on one accumulator that follow each other keep it in the tile.
        const WgmmaOp first = warp->ops.front();
        if (first.accumulate)
            load_accumulator(first, warp->lanes, tile);
        else
            memset(tile.d, 0, sizeof(tile.d));
        for (uint32_t done = 1;; ++done) {
            const WgmmaOp& op = warp->ops.front();
            check_operands_untouched(op, warp->lanes);
            if (op.bf16)
                load_operands<FromBf16>(thread, op, tile);
            else
                load_operands<FromFp16>(thread, op, tile);
            multiply(tile, op.n);
            warp->ops.pop_front();
            const bool goes_on = ++warp->retired < until && warp->ops.front().accumulate &&
                                 memcmp(warp->ops.front().d, first.d, sizeof(first.d)) == 0;
            if (goes_on) continue;
            store_accumulator(first, warp->lanes, tile, done);
            break;
        }
    }
}

void wgmma_wait(int pending) {
    Thread* thread = self();
    meet(thread, Op::kWgmmaWait, [thread, pending](Warp* warp) {
        Cta* cta = thread->cta;
        uint32_t until = warp->retired;
        for (; warp->batches.size() > static_cast<size_t>(pending); warp->batches.pop_front())
            until = warp->batches.front();
        if (until == warp->retired) return;
        retire(warp, thread, until);
        for (Thread* lane : warp->lanes) lane->knows[cta->wgmma_component(warp->index)] = static_cast<int32_t>(until);
        warp->knows[cta->wgmma_component(warp->index)] = static_cast<int32_t>(until);
    });
}

void check_wgmma_done(Thread* thread) {
    const Warp* warp = thread->warp;
    if (warp->ops.empty()) return;
    const uint32_t committed = warp->batches.empty() ? warp->retired : warp->batches.back();
    fault(thread, Op::kExit, "returns with %u wgmma in flight, %u of them never committed",
          warp->issued - warp->retired, warp->issued - committed);
}

void check_warpgroups_agree(Thread* thread) {
    for (const Warp& warp : thread->cta->warps)
        if (warp.issued != thread->cta->steps[warp.index / 4].size())
            fault(thread, Op::kExit,
                  "warp %u executed %u wgmma and another warp of its warpgroup %zu: the operation "
                  "needs all four",
                  warp.index, warp.issued, thread->cta->steps[warp.index / 4].size());
}

}  // namespace emu
}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// Memory: bounds and alignment of every access, cp.async that lands as late as it may, and the race
// detector of shared memory (clocks.cpp). Global memory is the caller's own; shared memory is a
// block per CTA that starts as NaN.
#include <stdio.h>
#include <string.h>

#include "state.h"

namespace fmha {
namespace emu {

// --- shared memory

uint32_t checked_offset(Thread* thread, Op op, uint32_t addr, uint32_t bytes, uint32_t align) {
    const uint32_t offset = addr - kSmemBase, size = thread->cta->request->smem;
    if (addr % align != 0) fault(thread, op, "shared memory offset 0x%x is not aligned to %u bytes", offset, align);
    if (addr < kSmemBase || offset >= size || size - offset < bytes)
        fault(thread, op, "shared memory offset 0x%x (%d) is outside the CTA's %u bytes", offset,
              static_cast<int>(offset), size);
    return offset;
}

// A component and what it did, as in "thread 5 (warp 0) wrote".
static void describe_writer(const Cta* cta, uint32_t component, char* text, size_t bytes) {
    if (component < cta->threads.size())
        snprintf(text, bytes, "thread %u (warp %u) wrote", component, component / 32);
    else
        snprintf(text, bytes, "the copy engine filled for the mbarrier at offset 0x%x",
                 cta->mbarriers[component - cta->mbarrier_component(0)].offset);
}

[[noreturn]] static void fault_race(Thread* thread, Op op, uint32_t offset, const char* what, uint32_t warp) {
    const char* missing = !thread->cta->mbarriers.empty() ? "mbarrier, named barrier or sync_cta"
                          : warp == thread->index / 32    ? "sync_warp or sync_cta"
                                                          : "sync_cta";
    fault(thread, op, "race at shared memory offset 0x%x, which %s with no %s in between", offset, what, missing);
}

[[noreturn]] static void fault_unordered_write(Thread* thread, Op op, uint32_t offset, uint32_t writer) {
    char what[96];
    describe_writer(thread->cta, writer, what, sizeof(what));
    fault_race(thread, op, offset, what, writer / 32);
}

[[noreturn]] static void fault_proxy(Thread* thread, Op op, uint32_t offset, uint32_t writer) {
    fault(thread, op,
          "shared memory offset 0x%x was written by thread %u with an ordinary store, and no "
          "fence_async_shared made it visible to the copy engine and the tensor cores",
          offset, writer);
}

static void check_in_flight(Thread* thread, Op op, uint32_t offset, const char* verb) {
    const Cta* cta = thread->cta;
    const Granule& granule = cta->shadow[offset / kGranule];
    if (granule.in_flight != 0)
        fault(thread, op, "%s shared memory offset 0x%x while a cp_async_16 of thread %u to it is in flight", verb,
              offset, granule.in_flight - 1u);
    if (granule.tile_in_flight != 0)
        fault(thread, op,
              "%s shared memory offset 0x%x while a tma_load_4d to it, for the mbarrier at offset "
              "0x%x, is in flight",
              verb, offset, cta->mbarriers[granule.tile_in_flight - 1u].offset);
}

// Whether a read of the warp `w` is ordered before the thread.
static bool read_is_ordered(const Thread* thread, uint32_t w, const Reads& reads, uint32_t* reader) {
    if (reads.clock <= thread->cta->synced) return true;
    const int32_t* knows = thread->knows + w * 32;
    const uint32_t own = thread->index / 32 == w ? 1u << thread->lane : 0;
    int32_t earliest = knows[0];  // over all lanes first: one vector loop
    for (int i = 1; i < 32; ++i) earliest = earliest < knows[i] ? earliest : knows[i];
    if (earliest >= reads.clock) return true;
    for (uint32_t lanes = reads.lanes & ~own; lanes != 0; lanes &= lanes - 1) {
        const uint32_t lane = static_cast<uint32_t>(__builtin_ctz(lanes));
        if (knows[lane] < reads.clock) {
            *reader = w * 32 + lane;
            return false;
        }
    }
    return true;
}

// Whether all of a granule was last written by threads before the latest sync_cta, after which
// everybody knows of it: by far the most frequent case.
static bool written_before_sync(const Cta* cta, const Granule& granule) {
    const int32_t synced = cta->synced;
    const int32_t* clock = granule.write_clock;
    const uint16_t* writer = granule.writer;
    const uint32_t threads = static_cast<uint32_t>(cta->threads.size());
    return (clock[0] <= synced) & (clock[1] <= synced) & (clock[2] <= synced) & (clock[3] <= synced) &
           (writer[0] <= threads) & (writer[1] <= threads) & (writer[2] <= threads) & (writer[3] <= threads);
}

[[noreturn]] static void fault_store(Thread* thread, Op op, uint32_t offset) {
    for (const Thread& reader : thread->cta->threads)
        for (const TileStore& store : reader.stores) {
            if (store.read || offset < store.tile.offset || offset - store.tile.offset >= store.tile.bytes) continue;
            fault(thread, op,
                  "writes shared memory offset 0x%x while a tma_store_4d of thread %u that reads it is in flight: that "
                  "thread must pass a tma_store_wait_read, and a barrier, before anybody writes there",
                  offset, reader.index);
        }
    __builtin_unreachable();
}

static void check_reads_before_write(Thread* thread, Op op, uint32_t offset) {
    Cta* cta = thread->cta;
    const size_t first = offset / kGranule * cta->warps.size();
    const Granule& granule = cta->shadow[offset / kGranule];
    if (granule.stores != 0) fault_store(thread, op, offset);
    for (uint32_t left = granule.readers; left != 0; left &= left - 1) {
        const uint32_t w = static_cast<uint32_t>(__builtin_ctz(left));
        uint32_t reader = 0;
        if (read_is_ordered(thread, w, cta->reads[first + w], &reader)) continue;
        char what[64];
        snprintf(what, sizeof(what), "thread %u (warp %u) read", reader, w);
        fault_race(thread, op, offset, what, w);
    }
    for (uint32_t left = granule.async_readers; left != 0; left &= left - 1) {
        const uint32_t w = static_cast<uint32_t>(__builtin_ctz(left));
        const int32_t operation = cta->wgmma_reads[first + w];
        if (operation > static_cast<int32_t>(cta->warps[w].retired))
            fault(thread, op,
                  "writes shared memory offset 0x%x while a wgmma of warp %u that reads it is in "
                  "flight",
                  offset, w);
        if (thread->knows[cta->wgmma_component(w)] >= operation) continue;
        char what[64];
        snprintf(what, sizeof(what), "a wgmma of warp %u read", w);
        fault_race(thread, op, offset, what, w);
    }
}

void note_write(Thread* thread, Op op, uint32_t offset, uint32_t words, bool async) {
    Granule& granule = thread->cta->shadow[offset / kGranule];
    check_in_flight(thread, op, offset, "writes");
    if (granule.barrier & words) fault(thread, op, "writes shared memory offset 0x%x, where an mbarrier lives", offset);
    check_reads_before_write(thread, op, offset);
    const bool settled = !async && written_before_sync(thread->cta, granule);
    for (int i = 0; i < 4 && !settled; ++i) {
        if (!(words >> i & 1) || granule.writer[i] == 0) continue;
        const uint32_t writer = granule.writer[i] - 1u;
        if (writer != thread->index && thread->knows[writer] < granule.write_clock[i])
            fault_unordered_write(thread, op, offset, writer);
        if (async && writer < thread->cta->threads.size() && thread->knows_async[writer] < granule.write_clock[i])
            fault_proxy(thread, op, offset, writer);
    }
    for (int i = 0; i < 4; ++i) {
        if (!(words >> i & 1)) continue;
        granule.writer[i] = static_cast<uint16_t>(thread->index + 1);
        granule.write_clock[i] = thread->clock();
    }
    granule.written |= static_cast<uint8_t>(words);
    if (words == 0xf) granule.readers = granule.async_readers = 0;  // all were ordered before
}

// Adds a read by some lanes of a warp at `clock`. Lanes that read before, which nothing orders
// before this read, keep their mark, under one clock: lanes' clocks run in step, so that this costs
// no precision but in kernels whose lanes arrive at barriers at different times.
static void add_read(Thread* thread, uint32_t offset, uint32_t lanes, int32_t clock) {
    Cta* cta = thread->cta;
    const uint32_t w = thread->index / 32;
    Granule& granule = cta->shadow[offset / kGranule];
    Reads& reads = cta->reads[offset / kGranule * cta->warps.size() + w];
    const bool first = !(granule.readers >> w & 1);
    granule.readers |= 1u << w;
    if (first || lanes == ~0u) {
        reads = {lanes, clock};
        return;
    }
    if (clock != reads.clock) {
        for (uint32_t left = reads.lanes; left != 0; left &= left - 1) {
            const int lane = __builtin_ctz(left);
            if (thread->knows[w * 32 + static_cast<uint32_t>(lane)] >= reads.clock) reads.lanes &= ~(1u << lane);
        }
        if (reads.lanes == 0 || clock > reads.clock) reads.clock = clock;
        // One number for all of them: nobody who is in the set may lag behind it, or what it publishes next (sync_warp,
        // say) would seem to leave its read out.
        for (uint32_t left = reads.lanes; left != 0; left &= left - 1) {
            Thread* lane = thread->warp->lanes[__builtin_ctz(left)];
            if (lane->clock() < reads.clock) {
                lane->clock() = reads.clock;
                thread->warp->stale = true;
            }
        }
        if (thread->clock() < reads.clock) {
            thread->clock() = reads.clock;
            thread->warp->stale = true;
        }
    }
    reads.lanes |= lanes;
}

static void check_readable(Thread* thread, Op op, uint32_t offset, bool written) {
    const Granule& granule = thread->cta->shadow[offset / kGranule];
    check_in_flight(thread, op, offset, "reads");
    if (granule.barrier != 0) fault(thread, op, "reads shared memory offset 0x%x, where an mbarrier lives", offset);
    if (written && granule.written != 0xf)
        fault(thread, op, "reads shared memory offset 0x%x, which nobody has written", offset);
}

// Notes a read of all 16 bytes by one thread.
static void note_read(Thread* thread, Op op, uint32_t offset) {
    const Granule& granule = thread->cta->shadow[offset / kGranule];
    check_readable(thread, op, offset, true);
    const bool settled = written_before_sync(thread->cta, granule);
    for (int i = 0; i < 4 && !settled; ++i) {
        const uint32_t writer = granule.writer[i] - 1u;
        if (writer != thread->index && thread->knows[writer] < granule.write_clock[i])
            fault_unordered_write(thread, op, offset, writer);
    }
    add_read(thread, offset, 1u << thread->lane, thread->clock());
}

// Notes a read by a whole warp, all of whose lanes must know of the writes; `thread` is blamed.
static void note_warp_read(Thread* thread, Op op, uint32_t offset, bool async) {
    const Cta* cta = thread->cta;
    const Warp* warp = thread->warp;
    const Granule& granule = cta->shadow[offset / kGranule];
    check_readable(thread, op, offset, true);
    const bool settled = !async && written_before_sync(cta, granule);
    for (int i = 0; i < 4 && !settled; ++i) {
        const uint32_t writer = granule.writer[i] - 1u;
        if (warp->knows[writer] < granule.write_clock[i]) fault_unordered_write(thread, op, offset, writer);
        if (async && writer < cta->threads.size() && warp->knows_async[writer] < granule.write_clock[i])
            fault_proxy(thread, op, offset, writer);
    }
}

const unsigned char* warp_read_row(Thread* thread, Op op, uint32_t addr) {
    const uint32_t offset = checked_offset(thread, op, addr, 16, 16);
    refresh_warp(thread->warp);
    note_warp_read(thread, op, offset, false);
    add_read(thread, offset, ~0u, thread->warp->clock);
    return thread->cta->smem.get() + offset;
}

void note_wgmma_read(Thread* thread, uint32_t addr, uint32_t operation) {
    const uint32_t offset = checked_offset(thread, Op::kWgmma, addr, 16, 16);
    Cta* cta = thread->cta;
    const uint32_t w = thread->index / 32;
    note_warp_read(thread, Op::kWgmma, offset, true);
    cta->shadow[offset / kGranule].async_readers |= 1u << w;
    cta->wgmma_reads[offset / kGranule * cta->warps.size() + w] = static_cast<int32_t>(operation);
}

void note_store_issued(Thread* thread, uint32_t offset, bool inside) {
    const Cta* cta = thread->cta;
    Granule& granule = thread->cta->shadow[offset / kGranule];
    check_readable(thread, Op::kTmaStore, offset, inside);  // what is outside the tensor goes nowhere
    for (int i = 0; i < 4; ++i) {
        if (granule.writer[i] == 0) continue;
        const uint32_t writer = granule.writer[i] - 1u;
        if (writer != thread->index && thread->knows[writer] < granule.write_clock[i])
            fault_unordered_write(thread, Op::kTmaStore, offset, writer);
        if (writer < cta->threads.size() && thread->knows_async[writer] < granule.write_clock[i])
            fault_proxy(thread, Op::kTmaStore, offset, writer);
    }
    ++granule.stores;
}

void note_store_read(Thread* thread, uint32_t offset) {
    --thread->cta->shadow[offset / kGranule].stores;
    add_read(thread, offset, 1u << thread->lane, thread->clock());
}

void ld_shared_v4(uint32_t (&r)[4], uint32_t addr) {
    Thread* thread = self();
    const uint32_t offset = checked_offset(thread, Op::kLdSharedV4, addr, 16, 16);
    note_read(thread, Op::kLdSharedV4, offset);
    memcpy(r, thread->cta->smem.get() + offset, 16);
}

void st_shared_v4(uint32_t addr, const uint32_t (&x)[4]) {
    Thread* thread = self();
    const uint32_t offset = checked_offset(thread, Op::kStSharedV4, addr, 16, 16);
    note_write(thread, Op::kStSharedV4, offset, 0xf, false);
    memcpy(thread->cta->smem.get() + offset, x, 16);
}

void st_shared_u32(uint32_t addr, uint32_t x) {
    Thread* thread = self();
    const uint32_t offset = checked_offset(thread, Op::kStSharedU32, addr, 4, 4);
    note_write(thread, Op::kStSharedU32, offset, 1u << offset % kGranule / 4, false);
    memcpy(thread->cta->smem.get() + offset, &x, 4);
}

// --- global memory

void check_global(Thread* thread, Op op, const void* pointer, uint64_t bytes, uint64_t align, bool store) {
    const Request& request = *thread->cta->request;
    const uint64_t address = reinterpret_cast<uint64_t>(pointer);
    if (address % align != 0)
        fault(thread, op, "global address 0x%llx is not aligned to %llu bytes",
              static_cast<unsigned long long>(address), static_cast<unsigned long long>(align));
    const Buffer* read_only = nullptr;
    const Buffer* nearest = nullptr;
    uint64_t nearest_gap = ~uint64_t{0};
    for (const Buffer* b = request.buffers; b != request.buffers + request.buffer_count; ++b) {
        const uint64_t end = b->address + b->bytes;
        if (address >= b->address && address < end && end - address >= bytes) {
            if (!store || b->writable) return;
            read_only = b;
        }
        const uint64_t gap = address < b->address ? b->address - address : address >= end ? address - end : 0;
        if (gap < nearest_gap) {
            nearest_gap = gap;
            nearest = b;
        }
    }
    if (nearest == nullptr) fault(thread, op, "touches global memory, but the launch named no buffer");
    const Buffer* b = read_only != nullptr ? read_only : nearest;
    fault(thread, op, "%s %llu bytes at byte offset %lld of buffer %d, which has %llu bytes%s",
          store ? "stores" : "reads", static_cast<unsigned long long>(bytes),
          static_cast<long long>(address - b->address), static_cast<int>(b - request.buffers),
          static_cast<unsigned long long>(b->bytes), read_only != nullptr ? " and is read-only" : "");
}

void ld_global_v4(uint32_t (&r)[4], const void* src) {
    check_global(self(), Op::kLdGlobalV4, src, 16, 16, false);
    memcpy(r, src, 16);
}

void st_global_v4(void* dst, const uint32_t (&x)[4]) {
    check_global(self(), Op::kStGlobalV4, dst, 16, 16, true);
    memcpy(dst, x, 16);
}

void st_global_u32(void* dst, uint32_t x) {
    check_global(self(), Op::kStGlobalU32, dst, 4, 4, true);
    memcpy(dst, &x, 4);
}

void st_global_f32(float* dst, float x) {
    check_global(self(), Op::kStGlobalF32, dst, 4, 4, true);
    memcpy(dst, &x, 4);
}

int32_t ld_global_s32(const int32_t* src) {
    check_global(self(), Op::kLdGlobalS32, src, 4, 4, false);
    return *src;
}

uint8_t ld_global_u8(const uint8_t* src) {
    check_global(self(), Op::kLdGlobalU8, src, 1, 1, false);
    return *src;
}

float ld_global_f32(const float* src) {
    check_global(self(), Op::kLdGlobalF32, src, 4, 4, false);
    return *src;
}

uint32_t atomic_add_global(uint32_t* word, uint32_t x) {
    check_global(self(), Op::kAtomicAddGlobal, word, 4, 4, true);
    return __atomic_fetch_add(word, x, __ATOMIC_RELAXED);
}

uint32_t atomic_inc_acq_rel(uint32_t* word, uint32_t last) {
    check_global(self(), Op::kAtomicIncAcqRel, word, 4, 4, true);
    uint32_t old = __atomic_load_n(word, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(word, &old, old >= last ? 0 : old + 1, false, __ATOMIC_ACQ_REL,
                                        __ATOMIC_RELAXED)) {
    }
    return old;
}

// --- cp.async

void cp_async_16(uint32_t dst_smem, const void* src, bool valid) {
    Thread* thread = self();
    const uint32_t offset = checked_offset(thread, Op::kCpAsync16, dst_smem, 16, 16);
    if (valid) check_global(thread, Op::kCpAsync16, src, 16, 16, false);
    note_write(thread, Op::kCpAsync16, offset, 0xf, false);
    thread->cta->shadow[offset / kGranule].in_flight = static_cast<uint16_t>(thread->index + 1);
    memset(thread->cta->smem.get() + offset, 0xff, 16);
    thread->copies.push_back({valid ? src : nullptr, offset, thread->committed});
}

void cp_async_commit() { ++self()->committed; }

void cp_async_wait(int pending) {
    Thread* thread = self();
    size_t landed = 0;
    for (; landed < thread->copies.size(); ++landed) {
        const Copy& copy = thread->copies[landed];
        if (static_cast<int64_t>(copy.group) >= static_cast<int64_t>(thread->committed) - pending) break;
        unsigned char* dst = thread->cta->smem.get() + copy.dst;
        if (copy.src != nullptr) {
            memcpy(dst, copy.src, 16);
        } else {
            memset(dst, 0, 16);
        }
        thread->cta->shadow[copy.dst / kGranule].in_flight = 0;
        note_write(thread, Op::kCpAsync16, copy.dst, 0xf, false);
    }
    thread->copies.erase(thread->copies.begin(), thread->copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

void check_no_copies_in_flight(Thread* thread) {
    if (!thread->copies.empty())
        fault(thread, Op::kExit, "returns with %zu cp_async_16 in flight, the first to shared memory offset 0x%x",
              thread->copies.size(), thread->copies.front().dst);
}

}  // namespace emu
}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// Memory: bounds and alignment of every access, cp.async that lands as late as it may, and the race
// detector of shared memory. Global memory is the caller's own; shared memory is a block per CTA
// that starts as NaN.
#include <string.h>

#include "state.h"

namespace fmha {
namespace emu {

// --- shared memory
// ---------------------------------------------------------------------------------------------------

static uint32_t checked_offset(Thread* thread, Op op, uint32_t addr, uint32_t bytes) {
    const uint32_t offset = addr - kSmemBase, size = thread->cta->request->smem;
    if (addr % bytes != 0)
        fault(thread, op, "shared memory offset 0x%x is not aligned to %u bytes", offset, bytes);
    if (addr < kSmemBase || offset >= size || size - offset < bytes)
        fault(thread, op, "shared memory offset 0x%x (%d) is outside the CTA's %u bytes", offset,
              static_cast<int>(offset), size);
    return offset;
}

[[noreturn]] static void fault_race(Thread* thread, Op op, uint32_t offset, const char* did,
                                    uint32_t who, bool several_warps = false) {
    const bool same_warp = who / 32 == thread->index / 32 && !several_warps;
    fault(thread, op,
          "race at shared memory offset 0x%x, which thread %u (warp %u)%s %s with no %s in between",
          offset, who, who / 32, several_warps ? " and other warps" : "", did,
          same_warp ? "sync_warp or sync_cta" : "sync_cta");
}

// Whether what `other` did in warp epoch `warp_epoch` of the current CTA epoch may run at the same
// time as `thread` now.
static bool unordered(const Thread* thread, uint32_t other, uint32_t warp_epoch) {
    return other / 32 != thread->index / 32 || warp_epoch == thread->warp->epoch;
}

static void note_write(Thread* thread, Op op, uint32_t offset, uint32_t words) {
    const Cta* cta = thread->cta;
    Granule& granule = thread->cta->shadow[offset / kGranule];
    if (granule.in_flight != 0)
        fault(
            thread, op,
            "writes shared memory offset 0x%x while a cp_async_16 of thread %u to it is in flight",
            offset, granule.in_flight - 1u);
    if (granule.read_epoch == cta->epoch) {
        const uint32_t reader = granule.reader - 1u;
        const bool same_warp = reader / 32 == thread->index / 32;
        if (granule.many_warps || (unordered(thread, reader, granule.read_warp_epoch) &&
                                   (!same_warp || granule.many_lanes || reader != thread->index)))
            fault_race(thread, op, offset, "read", reader, granule.many_warps);
    }
    if (granule.write_epoch == cta->epoch) {
        for (int i = 0; i < 4; ++i) {
            const uint32_t writer = granule.writer[i] - 1u;
            if ((words >> i & 1) && granule.writer[i] != 0 && writer != thread->index &&
                unordered(thread, writer, granule.write_warp_epoch[i]))
                fault_race(thread, op, offset, "wrote", writer);
        }
    } else {
        granule.write_epoch = cta->epoch;
        memset(granule.writer, 0, sizeof(granule.writer));
    }
    for (int i = 0; i < 4; ++i) {
        if (!(words >> i & 1)) continue;
        granule.writer[i] = static_cast<uint16_t>(thread->index + 1);
        granule.write_warp_epoch[i] = thread->warp->epoch;
    }
    granule.written |= static_cast<uint8_t>(words);
}

// Notes a read of all 16 bytes, by one thread or, for the .aligned collectives, by its whole warp.
static void note_read(Thread* thread, Op op, uint32_t offset, bool whole_warp) {
    const Cta* cta = thread->cta;
    Granule& granule = thread->cta->shadow[offset / kGranule];
    if (granule.in_flight != 0)
        fault(thread, op,
              "reads shared memory offset 0x%x while a cp_async_16 of thread %u to it is in flight",
              offset, granule.in_flight - 1u);
    if (granule.written != 0xf)
        fault(thread, op, "reads shared memory offset 0x%x, which nobody has written", offset);
    if (granule.write_epoch == cta->epoch) {
        for (int i = 0; i < 4; ++i) {
            const uint32_t writer = granule.writer[i] - 1u;
            if (granule.writer[i] != 0 && (whole_warp || writer != thread->index) &&
                unordered(thread, writer, granule.write_warp_epoch[i]))
                fault_race(thread, op, offset, "wrote", writer);
        }
    }
    const uint32_t reader = granule.reader - 1u;
    if (granule.read_epoch == cta->epoch && reader / 32 != thread->index / 32) {
        granule.many_warps = 1;
    } else if (granule.read_epoch == cta->epoch && granule.read_warp_epoch == thread->warp->epoch) {
        granule.many_lanes |= whole_warp || reader != thread->index;
    } else {
        if (granule.read_epoch != cta->epoch) granule.many_warps = 0;
        granule.read_epoch = cta->epoch;
        granule.read_warp_epoch = thread->warp->epoch;
        granule.reader = static_cast<uint16_t>(thread->index + 1);
        granule.many_lanes = whole_warp;
    }
}

const unsigned char* warp_read_row(Thread* thread, Op op, uint32_t addr) {
    const uint32_t offset = checked_offset(thread, op, addr, 16);
    note_read(thread, op, offset, true);
    return thread->cta->smem.get() + offset;
}

void ld_shared_v4(uint32_t (&r)[4], uint32_t addr) {
    Thread* thread = self();
    const uint32_t offset = checked_offset(thread, Op::kLdSharedV4, addr, 16);
    note_read(thread, Op::kLdSharedV4, offset, false);
    memcpy(r, thread->cta->smem.get() + offset, 16);
}

void st_shared_v4(uint32_t addr, const uint32_t (&x)[4]) {
    Thread* thread = self();
    const uint32_t offset = checked_offset(thread, Op::kStSharedV4, addr, 16);
    note_write(thread, Op::kStSharedV4, offset, 0xf);
    memcpy(thread->cta->smem.get() + offset, x, 16);
}

void st_shared_u32(uint32_t addr, uint32_t x) {
    Thread* thread = self();
    const uint32_t offset = checked_offset(thread, Op::kStSharedU32, addr, 4);
    note_write(thread, Op::kStSharedU32, offset, 1u << offset % kGranule / 4);
    memcpy(thread->cta->smem.get() + offset, &x, 4);
}

// --- global memory
// ---------------------------------------------------------------------------------------------------

// Faults unless all the bytes lie in one buffer, a writable one for a store.
static void check_global(Thread* thread, Op op, const void* pointer, uint64_t bytes, bool store) {
    const Request& request = *thread->cta->request;
    const uint64_t address = reinterpret_cast<uint64_t>(pointer);
    if (address % bytes != 0)
        fault(thread, op, "global address 0x%llx is not aligned to %llu bytes",
              static_cast<unsigned long long>(address), static_cast<unsigned long long>(bytes));
    const Buffer* read_only = nullptr;
    const Buffer* nearest = nullptr;
    uint64_t nearest_gap = ~uint64_t{0};
    for (const Buffer* b = request.buffers; b != request.buffers + request.buffer_count; ++b) {
        const uint64_t end = b->address + b->bytes;
        if (address >= b->address && address < end && end - address >= bytes) {
            if (!store || b->writable) return;
            read_only = b;
        }
        const uint64_t gap = address < b->address ? b->address - address
                             : address >= end     ? address - end
                                                  : 0;
        if (gap < nearest_gap) {
            nearest_gap = gap;
            nearest = b;
        }
    }
    if (nearest == nullptr)
        fault(thread, op, "touches global memory, but the launch named no buffer");
    const Buffer* b = read_only != nullptr ? read_only : nearest;
    fault(thread, op, "%s %llu bytes at byte offset %lld of buffer %d, which has %llu bytes%s",
          store ? "stores" : "reads", static_cast<unsigned long long>(bytes),
          static_cast<long long>(address - b->address), static_cast<int>(b - request.buffers),
          static_cast<unsigned long long>(b->bytes),
          read_only != nullptr ? " and is read-only" : "");
}

void ld_global_v4(uint32_t (&r)[4], const void* src) {
    check_global(self(), Op::kLdGlobalV4, src, 16, false);
    memcpy(r, src, 16);
}

void st_global_v4(void* dst, const uint32_t (&x)[4]) {
    check_global(self(), Op::kStGlobalV4, dst, 16, true);
    memcpy(dst, x, 16);
}

void st_global_f32(float* dst, float x) {
    check_global(self(), Op::kStGlobalF32, dst, 4, true);
    memcpy(dst, &x, 4);
}

int32_t ld_global_s32(const int32_t* src) {
    check_global(self(), Op::kLdGlobalS32, src, 4, false);
    return *src;
}

float ld_global_f32(const float* src) {
    check_global(self(), Op::kLdGlobalF32, src, 4, false);
    return *src;
}

// --- cp.async
// --------------------------------------------------------------------------------------------------------

void cp_async_16(uint32_t dst_smem, const void* src, bool valid) {
    Thread* thread = self();
    const uint32_t offset = checked_offset(thread, Op::kCpAsync16, dst_smem, 16);
    if (valid) check_global(thread, Op::kCpAsync16, src, 16, false);
    note_write(thread, Op::kCpAsync16, offset, 0xf);
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
        if (static_cast<int64_t>(copy.group) >= static_cast<int64_t>(thread->committed) - pending)
            break;
        unsigned char* dst = thread->cta->smem.get() + copy.dst;
        if (copy.src != nullptr) {
            memcpy(dst, copy.src, 16);
        } else {
            memset(dst, 0, 16);
        }
        thread->cta->shadow[copy.dst / kGranule].in_flight = 0;
        note_write(thread, Op::kCpAsync16, copy.dst, 0xf);
    }
    thread->copies.erase(thread->copies.begin(),
                         thread->copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

void check_no_copies_in_flight(Thread* thread) {
    if (!thread->copies.empty())
        fault(thread, Op::kExit,
              "returns with %zu cp_async_16 in flight, the first to shared memory offset 0x%x",
              thread->copies.size(), thread->copies.front().dst);
}

}  // namespace emu
}  // namespace fmha

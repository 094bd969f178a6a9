// SPDX-License-Identifier: Apache-2.0
// Barriers that some threads of a CTA share: mbarriers in shared memory, the hardware's named
// barriers; and setmaxnreg, which only makes sense to the whole CTA.
//
// Copies land as late as they may: a phase that waits only for bytes ends when no thread of the CTA
// can go on without it.
#include <stdio.h>
#include <string.h>

#include <string>

#include "state.h"

namespace fmha {
namespace emu {

// --- mbarriers

static Mbarrier& find(Thread* thread, Op op, uint32_t bar) {
    Cta* cta = thread->cta;
    const uint32_t offset = checked_offset(thread, op, bar, 8, 8);
    for (Mbarrier& barrier : cta->mbarriers) {
        if (barrier.offset != offset) continue;
        if (barrier.init_thread != thread->index && thread->knows[barrier.init_thread] < barrier.init_clock)
            fault(thread, op,
                  "the mbarrier at offset 0x%x was initialised by thread %u with nothing in "
                  "between that orders the two",
                  offset, barrier.init_thread);
        return barrier;
    }
    fault(thread, op, "there is no mbarrier at shared memory offset 0x%x: nobody initialised one", offset);
}

uint32_t mbarrier_for_copy(Thread* thread, uint32_t bar, uint32_t bytes) {
    Mbarrier& barrier = find(thread, Op::kTmaLoad, bar);
    if (!barrier.fenced)
        fault(thread, Op::kTmaLoad,
              "the copy engine may not see the mbarrier at offset 0x%x: no mbarrier_init_fence "
              "after its mbarrier_init",
              barrier.offset);
    if (barrier.pending == 0 && barrier.issued + bytes > barrier.expected)
        fault(thread, Op::kTmaLoad,
              "brings %u bytes more to phase %u of the mbarrier at offset 0x%x, which expects no "
              "further arrival and %llu bytes, %llu of them under way",
              bytes, barrier.phase, barrier.offset, static_cast<unsigned long long>(barrier.expected),
              static_cast<unsigned long long>(barrier.issued));
    barrier.issued += bytes;
    return static_cast<uint32_t>(&barrier - thread->cta->mbarriers.data());
}

void mbarrier_init(uint32_t bar, int arrivals) {
    Thread* thread = self();
    Cta* cta = thread->cta;
    const uint32_t offset = checked_offset(thread, Op::kMbarrierInit, bar, 8, 8);
    if (arrivals < 1 || arrivals >= 1 << 20)
        fault(thread, Op::kMbarrierInit, "%d arrivals are not between 1 and 2^20 - 1", arrivals);
    if (cta->mbarriers.size() == kMaxMbarriers)
        fault(thread, Op::kMbarrierInit, "the emulator models at most %u mbarriers", kMaxMbarriers);
    const uint32_t words = 3u << offset % kGranule / 4;
    note_write(thread, Op::kMbarrierInit, offset, words, false);
    cta->shadow[offset / kGranule].barrier |= static_cast<uint8_t>(words);
    Mbarrier barrier = {};
    barrier.offset = offset;
    barrier.count = barrier.pending = static_cast<uint32_t>(arrivals);
    barrier.init_thread = thread->index;
    barrier.init_clock = thread->clock();
    barrier.arrived.assign(2 * cta->components, 0);
    barrier.completed.assign(2 * cta->components, 0);
    cta->mbarriers.push_back(std::move(barrier));
}

void mbarrier_init_fence() {
    Thread* thread = self();
    for (Mbarrier& barrier : thread->cta->mbarriers)
        if (barrier.init_thread == thread->index) barrier.fenced = true;
}

static void complete(Cta* cta, Mbarrier& barrier) {
    const uint32_t index = static_cast<uint32_t>(&barrier - cta->mbarriers.data());
    for (const TileCopy& tile : barrier.copies) land(cta, index, tile);
    barrier.copies.clear();
    barrier.expected = barrier.issued = 0;
    barrier.pending = barrier.count;
    ++barrier.phase;
    const uint32_t own = cta->mbarrier_component(index);
    barrier.arrived[own] = static_cast<int32_t>(barrier.phase);
    barrier.completed = barrier.arrived;
    std::vector<Thread*> waiters;
    waiters.swap(barrier.waiters);
    for (Thread* waiter : waiters) {
        acquire(waiter, barrier.completed);
        make_runnable(waiter);
    }
}

static void arrive(Op op, uint32_t bar, uint32_t bytes) {
    Thread* thread = self();
    Mbarrier& barrier = find(thread, op, bar);
    if (barrier.pending == 0)
        fault(thread, op,
              "more arrivals than the mbarrier at offset 0x%x takes: all %u of phase %u are there "
              "and nobody has waited for its %llu bytes",
              barrier.offset, barrier.count, barrier.phase, static_cast<unsigned long long>(barrier.expected));
    if (barrier.expected + bytes >= 1u << 20)
        fault(thread, op, "more than 2^20 - 1 bytes announced at the mbarrier at offset 0x%x", barrier.offset);
    barrier.expected += bytes;
    release(thread, barrier.arrived);
    if (--barrier.pending == 0 && barrier.expected == 0 && barrier.issued == 0) complete(thread->cta, barrier);
}

void mbarrier_arrive(uint32_t bar) { arrive(Op::kMbarrierArrive, bar, 0); }

// The announced bytes are of copies that usually follow: the phase may be complete but for them.
void mbarrier_arrive_expect(uint32_t bar, uint32_t bytes) {
    if (bytes == 0) fault(self(), Op::kMbarrierArriveExpect, "announces no bytes: mbarrier_arrive does that");
    arrive(Op::kMbarrierArriveExpect, bar, bytes);
}

void mbarrier_wait(uint32_t bar, uint32_t parity) {
    Thread* thread = self();
    Mbarrier& barrier = find(thread, Op::kMbarrierWait, bar);
    if (parity > 1) fault(thread, Op::kMbarrierWait, "parity %u is neither 0 nor 1", parity);
    if (parity != (barrier.phase & 1)) return acquire(thread, barrier.completed);
    barrier.waiters.push_back(thread);
    thread->waits = Op::kMbarrierWait;
    thread->wait_on = static_cast<uint32_t>(&barrier - thread->cta->mbarriers.data());
    thread->warp->runnable &= ~(1u << thread->position);
    block(thread);
}

bool land_some_copies(Cta* cta) {
    for (Mbarrier& barrier : cta->mbarriers) {
        if (barrier.waiters.empty() || barrier.pending != 0) continue;
        if (barrier.issued > barrier.expected) {
            Thread* thread = &cta->threads[barrier.copies.back().thread];
            fault(thread, Op::kTmaLoad,
                  "the copies of phase %u of the mbarrier at offset 0x%x bring %llu bytes, and "
                  "%llu were announced",
                  barrier.phase, barrier.offset, static_cast<unsigned long long>(barrier.issued),
                  static_cast<unsigned long long>(barrier.expected));
        }
        if (barrier.issued < barrier.expected) continue;
        complete(cta, barrier);
        return true;
    }
    return false;
}

void describe_mbarrier(const Mbarrier& barrier, char* text, size_t bytes) {
    int length = snprintf(text, bytes, "the mbarrier at offset 0x%x, phase %u: %u of %u arrivals", barrier.offset,
                          barrier.phase, barrier.count - barrier.pending, barrier.count);
    if (barrier.expected != 0 || barrier.issued != 0)
        snprintf(text + length, bytes - static_cast<size_t>(length),
                 ", %llu bytes announced and copies issued for %llu", static_cast<unsigned long long>(barrier.expected),
                 static_cast<unsigned long long>(barrier.issued));
}

void check_copies_landed(Thread* thread) {
    for (const Mbarrier& barrier : thread->cta->mbarriers)
        if (!barrier.copies.empty())
            fault(thread, Op::kExit,
                  "the CTA ends while a tma_load_4d of thread %u to shared memory offset 0x%x is "
                  "in flight: nobody waited for phase %u of the mbarrier at offset 0x%x",
                  barrier.copies[0].thread, barrier.copies[0].offset, barrier.phase, barrier.offset);
}

// --- named barriers

// Counts the thread; true when it was the last one, and then all who wait go on.
static bool arrive_named(Thread* thread, Op op, int barrier, int threads) {
    Cta* cta = thread->cta;
    if (barrier < 1 || barrier >= static_cast<int>(kNamedBarriers))
        fault(thread, op, "barrier %d is not one of 1 to 15 (0 is sync_cta's)", barrier);
    if (threads <= 0 || threads % 32 != 0 || threads > static_cast<int>(cta->threads.size()))
        fault(thread, op, "%d is not a positive multiple of 32 up to the CTA's %zu threads", threads,
              cta->threads.size());
    NamedBarrier& named = cta->named[barrier];
    if (named.arrived == 0) {
        named.threads = static_cast<uint32_t>(threads);
        named.here.assign(cta->threads.size(), false);
        named.clocks.assign(2 * cta->components, 0);
    }
    if (named.threads != static_cast<uint32_t>(threads))
        fault(thread, op, "barrier %d collects %u threads in this round, not %d", barrier, named.threads, threads);
    if (named.here[thread->index]) fault(thread, op, "arrives a second time in one round of barrier %d", barrier);
    named.here[thread->index] = true;
    release(thread, named.clocks);
    if (++named.arrived < named.threads) return false;
    named.arrived = 0;
    for (Thread* waiter : named.waiters) {
        acquire(waiter, named.clocks);
        make_runnable(waiter);
    }
    named.waiters.clear();
    return true;
}

void named_sync(int barrier, int threads) {
    Thread* thread = self();
    NamedBarrier* named = thread->cta->named + (barrier & 15);
    if (arrive_named(thread, Op::kNamedSync, barrier, threads)) return acquire(thread, named->clocks);
    named->waiters.push_back(thread);
    thread->waits = Op::kNamedSync;
    thread->wait_on = static_cast<uint32_t>(barrier);
    thread->warp->runnable &= ~(1u << thread->position);
    block(thread);
}

void named_arrive(int barrier, int threads) { arrive_named(self(), Op::kNamedArrive, barrier, threads); }

// --- registers

// What ptxas gives each thread of a kernel with this launch bound.
static uint32_t launch_registers(const Kernel& kernel) {
    const uint32_t share = 65536 / (kernel.ctas_per_sm * kernel.max_threads) / 8 * 8;
    return share > 255 ? 248 : share;
}

static void set_registers(Op op, int count) {
    Thread* thread = self();
    if (count % 8 != 0 || count < 24 || count > 256)
        fault(thread, op, "%d registers are not a multiple of 8 from 24 to 256", count);
    meet(thread, op, [thread, op, count](Warp* warp) {
        const uint32_t wanted = static_cast<uint32_t>(count);
        const uint32_t now = warp->registers != 0 ? warp->registers : launch_registers(*thread->cta->kernel);
        if (op == Op::kRegistersInc ? wanted < now : wanted > now)
            fault(thread, op, "the warp has %u registers, so %u is the wrong direction", now, wanted);
        warp->registers = wanted;
    });
}

void registers_inc(int count) { set_registers(Op::kRegistersInc, count); }
void registers_dec(int count) { set_registers(Op::kRegistersDec, count); }

void check_registers(Thread* thread) {
    const Cta* cta = thread->cta;
    const uint32_t at_launch = launch_registers(*cta->kernel);
    uint32_t sum = 0;
    bool moved = false;
    for (const Warp& warp : cta->warps) {
        const Warp& first = cta->warps[warp.index / 4 * 4];
        if (warp.registers != first.registers)
            fault(thread, Op::kExit,
                  "warps %u and %u of one warpgroup executed different registers_inc or "
                  "registers_dec",
                  first.index, warp.index);
        moved |= warp.registers != 0;
        sum += 32 * (warp.registers != 0 ? warp.registers : at_launch);
    }
    const uint32_t have = at_launch * static_cast<uint32_t>(cta->threads.size());
    if (moved && sum > have)
        fault(thread, Op::kExit,
              "the warps ask for %u registers in all, but the CTA was launched with %u (%u a "
              "thread): registers_inc would wait forever",
              sum, have, at_launch);
}

}  // namespace emu
}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// The scheduler: CTAs over host threads, one fiber per CUDA thread, rendezvous of warps and CTAs,
// and the faults that come from threads which wait for each other in vain.
//
// A warp runs as far as it can before the next one gets a turn, and a lane as far as it can before
// the next lane does: the most lopsided schedule that the programming model allows, so that a
// missing barrier shows.
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <thread>

#include "state.h"

namespace fmha {
namespace emu {

const char* op_name(Op op) {
    static const char* const names[] = {
        "(nothing)",
        "sync_cta",
        "sync_warp",
        "shfl_xor",
        "shfl_idx",
        "warp_any",
        "ldmatrix_x4",
        "ldmatrix_x4_trans",
        "ldmatrix_x2_trans",
        "mma_m16n8k16<Fp16>",
        "mma_m16n8k16<Bf16>",
        "ld_shared_v4",
        "st_shared_v4",
        "st_shared_u32",
        "ld_global_v4",
        "ld_global_s32",
        "ld_global_f32",
        "st_global_v4",
        "st_global_u32",
        "st_global_f32",
        "atomic_add_global",
        "atomic_inc_acq_rel",
        "cp_async_16",
        "cp_async_wait",
        "mbarrier_init",
        "mbarrier_arrive",
        "mbarrier_arrive_expect",
        "mbarrier_wait",
        "tma_load_4d",
        "tma_store_4d",
        "tma_prefetch_map",
        "wgmma_fence",
        "wgmma",
        "wgmma_commit",
        "wgmma_wait",
        "registers_inc",
        "registers_dec",
        "named_sync",
        "named_arrive",
        "ld_global_u8",
        "exit",
    };
    static_assert(sizeof(names) / sizeof(names[0]) == static_cast<size_t>(Op::kExit) + 1,
                  "Every operation has a name.");
    return names[static_cast<int>(op)];
}

void fault(Thread* thread, Op op, const char* format, ...) {
    Cta* cta = thread->cta;
    int length = snprintf(cta->error, sizeof(cta->error),
                          "kernel %s, CTA %u, thread %u (warp %u, lane %u), %s: ", cta->kernel->name, cta->index,
                          thread->index, thread->index / 32, thread->lane, op_name(op));
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(cta->error + length, sizeof(cta->error) - length, format, arguments);
    va_end(arguments);
    cta->faulted = true;
    Context abandoned;
    switch_context(abandoned, cta->scheduler);
    __builtin_unreachable();
}

// What a thread waits for, beyond the operation.
static uint32_t wait_object(const Thread& thread) {
    const bool shared = thread.waits == Op::kMbarrierWait || thread.waits == Op::kNamedSync;
    return shared ? thread.wait_on : 0;
}

// "sync_cta: threads 0-31, 64; exit: threads 32-63" over the given range of threads.
static std::string who_waits_where(const Cta* cta, uint32_t first, uint32_t last) {
    std::string text;
    for (int op = 1; op <= static_cast<int>(Op::kExit); ++op) {
        for (uint32_t object = 0; object < kMaxMbarriers; ++object) {
            const auto here = [&](const Thread& thread) {
                return !(thread.warp->runnable >> thread.position & 1) && thread.waits == static_cast<Op>(op) &&
                       wait_object(thread) == object;
            };
            std::string ranges;
            for (uint32_t i = first; i < last; ++i) {
                if (!here(cta->threads[i])) continue;
                uint32_t end = i;
                while (end + 1 < last && here(cta->threads[end + 1])) ++end;
                ranges += (ranges.empty() ? "" : ", ") + std::to_string(i);
                if (end > i) ranges += "-" + std::to_string(end);
                i = end;
            }
            if (ranges.empty()) continue;
            text += (text.empty() ? "" : "; ") + std::string(op_name(static_cast<Op>(op))) + ": threads " + ranges;
            char where[256];
            if (static_cast<Op>(op) == Op::kMbarrierWait) {
                describe_mbarrier(cta->mbarriers[object], where, sizeof(where));
                text += " for " + std::string(where);
            }
            if (static_cast<Op>(op) == Op::kNamedSync)
                text += " at barrier " + std::to_string(object) + " with " +
                        std::to_string(cta->named[object].arrived) + " of " +
                        std::to_string(cta->named[object].threads) + " threads";
        }
    }
    return text;
}

void fault_mixed(Thread* thread, Op op) {
    thread->warp->runnable &= ~(1u << thread->position);
    const uint32_t first = thread->index / 32 * 32;
    fault(thread, op, "its warp already waits at another warp-wide operation (%s)",
          who_waits_where(thread->cta, first, first + 32).c_str());
}

// Whether a lane waits for threads outside the warp one by one, so that a collective which the
// others have reached can still complete.
static bool may_complete(const Warp* warp) {
    for (const Thread* lane : warp->lanes) {
        if (warp->runnable >> lane->position & 1) continue;
        if (lane->waits == Op::kMbarrierWait || lane->waits == Op::kNamedSync) return true;
    }
    return false;
}

static Thread* find_runnable(const Cta* cta, const Thread* thread) {
    const Warp* warp = thread->warp;
    if (warp->runnable != 0) {
        const uint32_t later = warp->runnable & (~0u << thread->position);
        return warp->turns[__builtin_ctz(later != 0 ? later : warp->runnable)];
    }
    const uint32_t count = static_cast<uint32_t>(cta->turns.size());
    for (uint32_t i = 1; i < count; ++i) {
        const Warp* other = cta->turns[(warp->position + i) % count];
        if (other->runnable != 0) return other->turns[__builtin_ctz(other->runnable)];
    }
    return nullptr;
}

void block(Thread* thread) {
    Warp* warp = thread->warp;
    Cta* cta = thread->cta;
    if (warp->runnable == 0 && warp->arrived != 0 && !may_complete(warp)) {
        const uint32_t first = thread->index / 32 * 32;
        fault(thread, thread->waits, "the lanes of the warp diverged and %s can never complete (%s)", op_name(warp->op),
              who_waits_where(cta, first, first + 32).c_str());
    }
    Thread* next = find_runnable(cta, thread);
    // Nobody can go on: the latest moment at which copies may land.
    while (next == nullptr && land_some_copies(cta)) next = find_runnable(cta, thread);
    const uint32_t all = static_cast<uint32_t>(cta->threads.size());
    if (next == nullptr && cta->exited < all)
        fault(thread, thread->waits, "deadlock: %s can never complete (%s)",
              cta->at_barrier != 0 ? "sync_cta" : op_name(thread->waits), who_waits_where(cta, 0, all).c_str());
    if (next == thread) return;
    switch_context(thread->context, next != nullptr ? next->context : cta->scheduler);
}

uint32_t thread_idx() { return self()->index; }
uint32_t block_idx() { return self()->cta->index; }
uint32_t grid_dim() { return self()->cta->request->grid; }
uint32_t smem_base() { return kSmemBase; }

void sync_warp() {
    meet(self(), Op::kSyncWarp, [](Warp* warp) { join_threads(warp->lanes[0]->cta, warp->index * 32, 32); });
}

void sync_cta() {
    Thread* thread = self();
    Cta* cta = thread->cta;
    thread->waits = Op::kSyncCta;
    thread->warp->runnable &= ~(1u << thread->position);
    if (++cta->at_barrier < cta->threads.size()) return block(thread);
    cta->at_barrier = 0;
    cta->synced = join_threads(cta, 0, static_cast<uint32_t>(cta->threads.size()));
    for (Warp& warp : cta->warps) warp.runnable = ~0u;
}

// Where each fiber starts.
static void thread_main() {
    Thread* thread = self();
    Cta* cta = thread->cta;
    cta->kernel->thread_main(cta->request->params);
    check_no_copies_in_flight(thread);
    check_wgmma_done(thread);
    leave_stores(thread);
    thread->waits = Op::kExit;
    thread->warp->runnable &= ~(1u << thread->position);
    if (++cta->exited == cta->threads.size()) {
        check_copies_landed(thread);
        check_warpgroups_agree(thread);
        check_registers(thread);
    }
    block(thread);
    __builtin_unreachable();
}

static uint32_t next_random(uint64_t& state) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
}

// Puts count values into the order of turns that the request asks for.
template <class T>
static void arrange(T* values, uint32_t count, const Request& request, uint64_t& random) {
    if (request.order == kReverse) std::reverse(values, values + count);
    if (request.order == kShuffle)
        for (uint32_t i = count; i > 1; --i) std::swap(values[i - 1], values[next_random(random) % i]);
}

static void prepare(Cta& cta, const Stacks& stacks, uint32_t index) {
    const Request& request = *cta.request;
    uint64_t random = (static_cast<uint64_t>(request.seed) << 32) + index;
    cta.index = index;
    cta.at_barrier = 0;
    cta.exited = 0;
    cta.faulted = false;
    memset(cta.smem.get(), 0xff, request.smem);  // NaN as fp16, bf16 and fp32
    std::fill(cta.shadow.begin(), cta.shadow.end(), Granule{});
    for (size_t w = 0; w < cta.warps.size(); ++w) {
        Warp& warp = cta.warps[w];
        warp.runnable = ~0u;
        warp.arrived = 0;
        warp.index = static_cast<uint32_t>(w);
        warp.ops.clear();
        warp.batches.clear();
        warp.issued = warp.retired = 0;
        warp.fenced = false;
        warp.registers = 0;
        cta.turns[w] = &warp;
        for (uint32_t lane = 0; lane < 32; ++lane) warp.turns[lane] = warp.lanes[lane] = &cta.threads[w * 32 + lane];
        arrange(warp.turns, 32, request, random);
        for (uint32_t p = 0; p < 32; ++p) warp.turns[p]->position = p;
    }
    arrange(cta.turns.data(), static_cast<uint32_t>(cta.turns.size()), request, random);
    for (size_t p = 0; p < cta.turns.size(); ++p) cta.turns[p]->position = static_cast<uint32_t>(p);
    for (uint32_t i = 0; i < cta.threads.size(); ++i) {
        Thread& thread = cta.threads[i];
        thread.cta = &cta;
        thread.warp = &cta.warps[i / 32];
        thread.index = i;
        thread.lane = i % 32;
        thread.waits = Op::kNone;
        thread.committed = 0;
        thread.copies.clear();
        thread.stores_committed = 0;
        thread.stores.clear();
        thread.registers.clear();
        stacks.give(static_cast<int>(i), &thread, thread.context, thread_main);
    }
    cta.mbarriers.clear();
    for (NamedBarrier& named : cta.named) {
        named.arrived = 0;
        named.waiters.clear();
    }
    for (std::vector<WgmmaStep>& steps : cta.steps) steps.clear();
    reset_clocks(cta);
}

int run(Request& request, const Kernel& kernel) {
    auto refuse = [&](const std::string& why) {
        snprintf(request.error, request.error_bytes, "kernel %s, launch: %s", kernel.name, why.c_str());
        return 1;
    };
    if (request.grid == 0) return refuse("the grid is empty");
    if (request.threads == 0 || request.threads % 32 != 0)
        return refuse(std::to_string(request.threads) + " threads per CTA is not a positive multiple of 32");
    if (request.threads > kernel.max_threads)
        return refuse(std::to_string(request.threads) + " threads per CTA exceed the launch bound of " +
                      std::to_string(kernel.max_threads));
    if (reinterpret_cast<uintptr_t>(request.params) % kernel.params_align != 0)
        return refuse("the parameter block is not aligned to " + std::to_string(kernel.params_align) + " bytes");

    std::atomic<uint32_t> next{0};
    std::atomic<uint64_t> collectives{0};
    std::atomic<bool> stop{false};
    std::mutex guard;
    uint32_t fault_cta = ~0u;
    std::vector<TileStore> unlanded;

    auto work = [&] {
        const Stacks stacks(static_cast<int>(request.threads));
        auto cta = std::make_unique<Cta>();
        cta->request = &request;
        cta->kernel = &kernel;
        cta->collectives = 0;
        cta->threads.resize(request.threads);
        cta->warps.resize(request.threads / 32);
        cta->turns.resize(request.threads / 32);
        cta->smem.reset(new unsigned char[request.smem]);
        cta->shadow.resize((request.smem + kGranule - 1) / kGranule);
        cta->reads.resize(cta->shadow.size() * cta->warps.size());
        cta->wgmma_reads.resize(cta->reads.size());
        cta->steps.resize((cta->warps.size() + 3) / 4);
        cta->components = (cta->mbarrier_component(kMaxMbarriers) + 7) / 8 * 8;
        cta->clocks.resize((cta->threads.size() + cta->warps.size() + 1) * 2 * cta->components);
        for (uint32_t index; !stop && (index = next++) < request.grid;) {
            prepare(*cta, stacks, index);
            switch_context(cta->scheduler, cta->turns[0]->turns[0]->context);
            if (!cta->faulted) continue;
            stop = true;
            const std::lock_guard<std::mutex> lock(guard);
            if (index < fault_cta) {  // the lowest CTA's fault is the one reported
                fault_cta = index;
                snprintf(request.error, request.error_bytes, "%s", cta->error);
            }
        }
        collectives += cta->collectives;
        const std::lock_guard<std::mutex> lock(guard);
        for (TileStore& store : cta->unlanded) unlanded.push_back(std::move(store));
    };
    std::vector<std::thread> helpers;
    for (uint32_t i = 1; i < std::min(request.workers, request.grid); ++i) helpers.emplace_back(work);
    work();
    for (std::thread& helper : helpers) helper.join();
    for (const TileStore& store : unlanded) land(store);
    request.collectives = collectives;
    return fault_cta == ~0u ? 0 : 1;
}

}  // namespace emu
}  // namespace fmha

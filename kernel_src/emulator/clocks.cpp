// SPDX-License-Identifier: Apache-2.0
// Vector clocks: who knows of whose accesses. Each thread has two rows: what is ordered before it,
// and what of that fence_async_shared made visible to the copy engine and the tensor cores.
#include <string.h>

#include <algorithm>

#include "state.h"

namespace fmha {
namespace emu {

static void join(int32_t* into, const int32_t* from, size_t count) {
    for (size_t i = 0; i < count; ++i) into[i] = into[i] < from[i] ? from[i] : into[i];
}

void reset_clocks(Cta& cta) {
    const size_t row = 2 * cta.components;
    cta.synced = 0;
    std::fill(cta.clocks.begin(), cta.clocks.end(), 0);
    int32_t* next = cta.clocks.data();
    for (Thread& thread : cta.threads) {
        thread.knows = next;
        thread.knows_async = next + cta.components;
        next += row;
        thread.clock() = 1;
    }
    for (Warp& warp : cta.warps) {
        warp.knows = next;
        warp.knows_async = next + cta.components;
        next += row;
        warp.stale = false;
        warp.clock = 1;
    }
}

void release(Thread* thread, std::vector<int32_t>& clocks) {
    join(clocks.data(), thread->knows, clocks.size());
    ++thread->clock();
    thread->warp->stale = true;
}

void acquire(Thread* thread, const std::vector<int32_t>& clocks) {
    join(thread->knows, clocks.data(), clocks.size());
    thread->warp->stale = true;
}

void fence_async_shared() {
    Thread* thread = self();
    join(thread->knows_async, thread->knows, thread->cta->components);
    ++thread->clock();
    thread->warp->stale = true;
}

int32_t join_threads(Cta* cta, uint32_t first, uint32_t count) {
    Thread* threads = &cta->threads[first];
    const size_t row = 2 * cta->components;
    int32_t* all = cta->clocks.data() + (cta->threads.size() + cta->warps.size()) * row;
    memcpy(all, threads[0].knows, row * sizeof(int32_t));
    int32_t latest = 0;
    for (uint32_t i = 0; i < count; ++i) {
        join(all, threads[i].knows, row);
        latest = std::max(latest, threads[i].clock());
    }
    for (uint32_t i = 0; i < count; ++i) {
        memcpy(threads[i].knows, all, row * sizeof(int32_t));
        threads[i].clock() = latest + 1;
    }
    for (uint32_t w = first / 32; w < (first + count) / 32; ++w) {
        Warp& warp = cta->warps[w];
        memcpy(warp.knows, all, row * sizeof(int32_t));
        warp.clock = latest + 1;
        warp.stale = false;
    }
    return latest;
}

// What all lanes know is the minimum over them. Their own clocks become equal, so that one number
// stamps an access by all of them.
void refresh_warp(Warp* warp) {
    if (!warp->stale) return;
    const size_t row = 2 * warp->lanes[0]->cta->components;
    int32_t latest = 0;
    for (Thread* lane : warp->lanes) latest = std::max(latest, lane->clock());
    memcpy(warp->knows, warp->lanes[0]->knows, row * sizeof(int32_t));
    for (Thread* lane : warp->lanes) {
        const int32_t* from = lane->knows;
        int32_t* into = warp->knows;
        for (size_t i = 0; i < row; ++i) into[i] = into[i] < from[i] ? into[i] : from[i];
    }
    for (Thread* lane : warp->lanes) lane->clock() = latest;
    warp->clock = latest;
    warp->stale = false;
}

}  // namespace emu
}  // namespace fmha

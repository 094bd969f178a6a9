// SPDX-License-Identifier: Apache-2.0
// The state of one emulated CTA: its threads, warps, shared memory and the shadow that the race
// detector keeps.
#pragma once
#include <stdarg.h>

#include <memory>
#include <vector>

#include "emulator.h"
#include "fiber.h"

namespace fmha {
namespace emu {

// Every wrapper that can wait or fault.
enum class Op : uint8_t {
    kNone,
    kSyncCta,
    kSyncWarp,
    kShflXor,
    kShflIdx,
    kLdmatrixX4,
    kLdmatrixX4Trans,
    kLdmatrixX2Trans,
    kMmaFp16,
    kMmaBf16,
    kLdSharedV4,
    kStSharedV4,
    kStSharedU32,
    kLdGlobalV4,
    kLdGlobalS32,
    kLdGlobalF32,
    kStGlobalV4,
    kStGlobalF32,
    kCpAsync16,
    kCpAsyncWait,
    kExit,
};
const char* op_name(Op op);

struct Cta;
struct Warp;

// A cp.async between its issue and the wait that names it.
struct Copy {
    const void* src;  // null: zeros
    uint32_t dst;
    uint32_t group;
};

struct Thread {
    Context context;
    Cta* cta;
    Warp* warp;
    uint32_t index;
    uint32_t lane;
    uint32_t position;   // of its turn within the warp
    Op waits;            // where it stands while it is not runnable
    uint32_t committed;  // cp.async groups
    std::vector<Copy> copies;
};

struct Warp {
    uint32_t runnable;  // bit p: the thread whose turn is p can continue
    uint32_t arrived;   // lanes that wait at the collective `op`
    Op op;
    uint32_t
        epoch;  // barriers of the warp or the CTA passed so far: what is ordered within the warp
    uint32_t position;  // of its turn within the CTA
    Thread* turns[32];
    Thread* lanes[32];
    // Operands and results of the collective in progress, by lane. A lane fills its own column when
    // it arrives and empties it when it runs again, so the next collective cannot disturb this one.
    uint32_t in[4][32];
    uint32_t in_b[2][32];
    float acc[2][64];
    uint32_t out[4][32];
};

constexpr uint32_t kGranule = 16;

// What is known of 16 bytes of shared memory. Threads are stored plus one; 0: none. An access is
// ordered before another of the same thread, before one of the same warp in a later warp epoch, and
// before any in a later CTA epoch.
struct Granule {
    uint32_t write_epoch;          // CTA epoch of the writers below
    uint32_t write_warp_epoch[4];  // by 4-byte word
    uint16_t writer[4];
    uint32_t read_epoch;
    uint32_t read_warp_epoch;
    uint16_t reader;
    uint16_t in_flight;  // the thread whose cp.async has not landed
    uint8_t many_lanes;  // read by several lanes of the reader's warp
    uint8_t many_warps;
    uint8_t written;  // bit i: word i has ever been written
};

// Shared memory starts here in the 32-bit window, so that address 0 is never valid.
constexpr uint32_t kSmemBase = 1024;

struct Cta {
    const Request* request;
    const Kernel* kernel;
    uint32_t index;
    uint32_t epoch;       // sync_cta passed so far, plus one
    uint32_t at_barrier;  // threads that wait at sync_cta
    uint64_t collectives;
    bool faulted;
    char error[4096];
    Context scheduler;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<Warp*> turns;
    std::unique_ptr<unsigned char[]> smem;
    std::vector<Granule> shadow;
};

inline Thread* self() { return Stacks::owner(); }

// Ends the CTA with a message that starts with kernel, CTA, thread and operation. Does not return
// to the fiber.
[[noreturn]] void fault(Thread* thread, Op op, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

// Called by a thread that cannot continue: runs whoever can, and returns when this thread is
// runnable again.
void block(Thread* thread);

[[noreturn]] void fault_mixed(Thread* thread, Op op);

// One thread's part in a warp-wide operation: waits until all 32 lanes are there; the last one
// performs it.
template <class Perform>
inline void meet(Thread* thread, Op op, Perform perform) {
    Warp* warp = thread->warp;
    thread->waits = op;
    if (warp->arrived != 0 && warp->op != op) fault_mixed(thread, op);
    warp->op = op;
    warp->runnable &= ~(1u << thread->position);
    if (++warp->arrived < 32) return block(thread);
    perform(warp);
    warp->arrived = 0;
    warp->runnable = ~0u;
    ++thread->cta->collectives;
}

// A 16-byte row of shared memory read on behalf of the whole warp; `thread` is the lane that gave
// the address.
const unsigned char* warp_read_row(Thread* thread, Op op, uint32_t addr);

// Called when a thread returns from the kernel.
void check_no_copies_in_flight(Thread* thread);

}  // namespace emu
}  // namespace fmha

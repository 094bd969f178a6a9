// SPDX-License-Identifier: Apache-2.0
// The state of one emulated CTA: its threads, warps, barriers, shared memory and the shadow that
// the race detector keeps.
//
// Vector clocks (clocks.cpp) tell which access happened before which. Every source of accesses is a
// component: each thread; each warp's wgmma reads; each mbarrier, for the copies that land on it.
// An access is stamped (component, clock); a thread that has the component's clock at the stamp or
// above is ordered after it. Barriers carry clocks from those that arrive to those that wait.
#pragma once
#include <stdarg.h>

#include <deque>
#include <memory>
#include <vector>

#include "emulator.h"
#include "fiber.h"

namespace fmha {
namespace emu {

// Every wrapper that can wait or fault; op_name has their names in the same order.
enum class Op : uint8_t {
    kNone,
    kSyncCta,
    kSyncWarp,
    kShflXor,
    kShflIdx,
    kWarpAny,
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
    kStGlobalU32,
    kStGlobalF32,
    kAtomicAddGlobal,
    kAtomicIncAcqRel,
    kCpAsync16,
    kCpAsyncWait,
    kMbarrierInit,
    kMbarrierArrive,
    kMbarrierArriveExpect,
    kMbarrierWait,
    kTmaLoad,
    kTmaStore,
    kTmaPrefetchMap,
    kWgmmaFence,
    kWgmma,
    kWgmmaCommit,
    kWgmmaWait,
    kRegistersInc,
    kRegistersDec,
    kNamedSync,
    kNamedArrive,
    kLdGlobalU8,
    kExit,
};
const char* op_name(Op op);

struct Cta;
struct Thread;
struct Warp;

// A cp.async between its issue and the wait that names it.
struct Copy {
    const void* src;  // null: zeros
    uint32_t dst;
    uint32_t group;
};

// The part of a row of a tensor map's box that lies inside the tensor.
struct TileRow {
    uint64_t address;
    uint32_t offset;  // in the box, before the swizzle
    uint32_t bytes;
};

// A copy of a box of a tensor to or from its place in shared memory.
struct TileCopy {
    uint32_t offset;
    uint32_t bytes;
    uint32_t swizzle;  // log2 of the span in 16-byte chunks; 0: none
    uint32_t thread;   // who asked for it
    std::vector<TileRow> rows;
};

// A store by the copy engine between its issue and the moment at which global memory has it.
struct TileStore {
    TileCopy tile;
    uint32_t group;
    bool read;                        // the thread has waited for the read of shared memory
    std::vector<unsigned char> data;  // what was read, row by row
};

// Registers that a wgmma of this thread has used, and what they held when it was last safe to look:
// at the latest wgmma_fence, or when the latest wgmma on them was done.
struct Registers {
    uint32_t* address;
    uint32_t count;
    uint32_t in_flight;  // operations that accumulate here
    std::vector<uint32_t> at_fence;
    std::vector<uint32_t> left;  // by wgmma, as far as it got; empty for an A operand
};

struct Thread {
    Context context;
    Cta* cta;
    Warp* warp;
    uint32_t index;
    uint32_t lane;
    uint32_t position;   // of its turn within the warp
    Op waits;            // where it stands while it is not runnable
    uint32_t wait_on;    // kMbarrierWait, kNamedSync: which barrier
    uint32_t committed;  // cp.async groups
    std::vector<Copy> copies;
    uint32_t stores_committed;  // groups of tma_store_4d
    std::vector<TileStore> stores;
    std::vector<Registers> registers;
    int32_t* knows;        // clock of each component as this thread knows it
    int32_t* knows_async;  // the same for what fences made visible to the async proxy
    int32_t& clock() { return knows[index]; }
};

// One wgmma of one warp between its issue and the wait that retires it.
struct WgmmaOp {
    bool bf16;
    bool from_registers;
    bool accumulate;
    uint32_t n;
    uint64_t a, b;             // descriptors
    uint16_t d[32];            // by lane: index into its registers
    uint16_t a_registers[32];  // RS: the same for A, and what it held at issue
    uint32_t a_value[32][4];
};

struct Warp {
    uint32_t runnable;  // bit p: the thread whose turn is p can continue
    uint32_t arrived;   // lanes that wait at the collective `op`
    Op op;
    uint32_t index;
    uint32_t position;  // of its turn within the CTA
    Thread* turns[32];
    Thread* lanes[32];
    // Operands and results of the collective in progress, by lane. A lane fills its own column when
    // it arrives and empties it when it runs again, so the next collective cannot disturb this one.
    uint32_t in[4][32];
    uint32_t in_b[2][32];
    float acc[2][64];
    uint32_t out[4][32];
    // What all lanes know, and the clock of an access by all lanes; refresh_warp() keeps them.
    bool stale;
    int32_t clock;
    int32_t* knows;
    int32_t* knows_async;
    // wgmma
    WgmmaOp issuing;  // lanes fill their columns as they arrive
    std::deque<WgmmaOp> ops;
    std::deque<uint32_t> batches;  // committed ones: the count of operations issued at the commit
    uint32_t issued;
    uint32_t retired;
    bool fenced;  // a wgmma_fence has been passed
    uint32_t registers;
};

// What the four warps of a warpgroup must do alike.
struct WgmmaStep {
    uint64_t a, b;
    uint32_t n;
    uint32_t flags;
    bool operator==(const WgmmaStep& o) const { return a == o.a && b == o.b && n == o.n && flags == o.flags; }
};

struct Mbarrier {
    uint32_t offset;
    uint32_t count;    // arrivals of a phase
    uint32_t pending;  // arrivals still missing
    uint32_t phase;
    uint64_t expected;  // bytes announced
    uint64_t issued;    // bytes of `copies`
    uint32_t init_thread;
    int32_t init_clock;
    bool fenced;                   // mbarrier_init_fence since
    std::vector<TileCopy> copies;  // of this phase; they land when it ends
    std::vector<Thread*> waiters;
    std::vector<int32_t> arrived;    // clocks of all arrivals so far
    std::vector<int32_t> completed;  // the same when the latest phase ended
};

struct NamedBarrier {
    uint32_t threads;  // of this round, set by its first arrival
    std::vector<bool> here;
    uint32_t arrived;
    std::vector<Thread*> waiters;
    std::vector<int32_t> clocks;
};

constexpr uint32_t kGranule = 16;
constexpr uint32_t kMaxMbarriers = 64;
constexpr uint32_t kNamedBarriers = 16;

// What is known of 16 bytes of shared memory.
struct Granule {
    int32_t write_clock[4];  // by 4-byte word
    uint16_t writer[4];      // component plus one; 0: nobody
    uint32_t readers;        // bit w: Cta::reads has an entry for warp w
    uint32_t async_readers;  // the same for Cta::wgmma_reads
    uint16_t in_flight;      // the thread, plus one, whose cp.async has not landed
    uint16_t stores;         // tma_store_4d that are going to read it
    uint8_t tile_in_flight;  // the mbarrier, plus one, of a tma_load_4d that has not landed
    uint8_t written;         // bit i: word i has ever been written
    uint8_t barrier;         // bit i: word i belongs to an mbarrier
};

// The latest reads of a granule by one warp, those that nothing orders before a later one.
struct Reads {
    uint32_t lanes;
    int32_t clock;
};

// Shared memory starts here in the 32-bit window, so that address 0 is never valid; aligned like
// the device's.
constexpr uint32_t kSmemBase = 1024;

struct Cta {
    const Request* request;
    const Kernel* kernel;
    uint32_t index;
    uint32_t at_barrier;  // threads that wait at sync_cta
    uint32_t exited;
    int32_t synced;  // clocks of threads up to this are known to all since the latest sync_cta
    uint64_t collectives;
    bool faulted;
    char error[4096];
    Context scheduler;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<Warp*> turns;
    std::unique_ptr<unsigned char[]> smem;
    std::vector<Granule> shadow;
    std::vector<Reads> reads;          // [granule][warp]
    std::vector<int32_t> wgmma_reads;  // [granule][warp]: operations of the warp up to the reader
    uint32_t components;               // rounded up for vector code
    std::vector<int32_t> clocks;       // [threads + warps + 1][2][components]
    std::vector<Mbarrier> mbarriers;
    NamedBarrier named[kNamedBarriers];
    std::vector<std::vector<WgmmaStep>> steps;  // [warpgroup]
    std::vector<TileStore> unlanded;            // of CTAs that are over, which only the end of the kernel makes visible

    uint32_t wgmma_component(uint32_t warp) const { return static_cast<uint32_t>(threads.size()) + warp; }
    uint32_t mbarrier_component(uint32_t i) const { return static_cast<uint32_t>(threads.size() + warps.size()) + i; }
};

inline Thread* self() { return Stacks::owner(); }

// Ends the CTA with a message that starts with kernel, CTA, thread and operation. Does not return
// to the fiber.
[[noreturn]] void fault(Thread* thread, Op op, const char* format, ...) __attribute__((format(printf, 3, 4)));

// Called by a thread that cannot continue: runs whoever can, and returns when this thread is
// runnable again.
void block(Thread* thread);

inline void make_runnable(Thread* thread) { thread->warp->runnable |= 1u << thread->position; }

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

// --- clocks.cpp
void reset_clocks(Cta& cta);
// Joins the clocks of a thread into those of a barrier; what the thread does next is later.
void release(Thread* thread, std::vector<int32_t>& clocks);
void acquire(Thread* thread, const std::vector<int32_t>& clocks);
// A barrier of the threads [first, first + count): all of them know what any of them knew. Returns
// their latest clock.
int32_t join_threads(Cta* cta, uint32_t first, uint32_t count);
void refresh_warp(Warp* warp);

// --- memory.cpp
uint32_t checked_offset(Thread* thread, Op op, uint32_t addr, uint32_t bytes, uint32_t align);
// A 16-byte row of shared memory read on behalf of the whole warp; `thread` is the lane that gave
// the address.
const unsigned char* warp_read_row(Thread* thread, Op op, uint32_t addr);
// A store to some words of a granule, `async` when by the copy engine.
void note_write(Thread* thread, Op op, uint32_t offset, uint32_t words, bool async);
// Faults unless all the bytes lie in one buffer, a writable one for a store.
void check_global(Thread* thread, Op op, const void* pointer, uint64_t bytes, uint64_t align, bool store);
// A 16-byte chunk read by the wgmma that is the warp's `operation`-th; `thread` is any lane.
void note_wgmma_read(Thread* thread, uint32_t addr, uint32_t operation);
// A 16-byte chunk that a tma_store_4d of the thread is going to read; `inside`: some of it lies inside the tensor.
void note_store_issued(Thread* thread, uint32_t offset, bool inside);
// The thread knows that it has been read.
void note_store_read(Thread* thread, uint32_t offset);
// Called when a thread returns from the kernel.
void check_no_copies_in_flight(Thread* thread);

// --- barrier.cpp
// The mbarrier of a copy of so many bytes, which it counts.
uint32_t mbarrier_for_copy(Thread* thread, uint32_t bar, uint32_t bytes);
// Ends the phase of one mbarrier that somebody waits for and that only its copies hold up.
bool land_some_copies(Cta* cta);
void describe_mbarrier(const Mbarrier& barrier, char* text, size_t bytes);
void check_copies_landed(Thread* thread);
void check_registers(Thread* thread);

// --- tma.cpp
void land(Cta* cta, uint32_t barrier, const TileCopy& tile);
void land(const TileStore& store);
// Called when a thread returns from the kernel: hands its stores to the CTA.
void leave_stores(Thread* thread);

// --- wgmma.cpp
void check_wgmma_done(Thread* thread);
void check_warpgroups_agree(Thread* thread);

}  // namespace emu
}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// The instructions that arrived with compute capability 9.0, but for wgmma itself (wgmma.cuh):
// mbarriers, the tensor copy engine, named barriers, register reallocation. One function per
// instruction; kernel_src/emulator/ptx/sm90.cuh is its twin.
#pragma once
#include <ptx/common.cuh>

namespace fmha {

// The value of lane 0, known to the compiler to be the same in the whole warp: branches on it are
// uniform.
FMHA_DEVICE int warp_uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// smem_base() as a constant, so that addresses and descriptors are folded at compile time. ptxas knows the same number,
// but wherever it is used adds the rank of the CTA in its cluster, which costs an S2UR and its latency. Only for
// kernels without clusters.
FMHA_DEVICE uint32_t smem_base_constant() {
    constexpr uint32_t kBase = 1024;  // the system reserves the first KiB
    if (smem_base() != kBase) {
        asm volatile("trap;");
    }
    return kBase;
}

// Adds to a word in global memory; returns what it held before.
FMHA_DEVICE uint32_t atomic_add_global(uint32_t* word, uint32_t x) { return atomicAdd(word, x); }

// mbarrier: an 8-byte object in shared memory. A phase ends when `arrivals` threads have arrived
// and the announced bytes have landed; mbarrier_wait(parity) returns once the phase of that parity
// has ended (a fresh barrier is in phase 0, so waiting for parity 1 returns at once).
FMHA_DEVICE void mbarrier_init(uint32_t bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(bar), "r"(arrivals) : "memory");
}

// Makes freshly initialised barriers visible to the copy engine; the CTA still needs a barrier of
// its own.
FMHA_DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory"); }

FMHA_DEVICE void mbarrier_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(bar) : "memory");
}

// Arrives and announces `bytes` that copies will deliver in this phase.
FMHA_DEVICE void mbarrier_arrive_expect(uint32_t bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(bar), "r"(bytes) : "memory");
}

FMHA_DEVICE void mbarrier_wait(uint32_t bar, uint32_t parity) {
    asm volatile(
        "{ .reg .pred p;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra done;\n"
        "bra again;\n"
        "done: }"
        :
        : "r"(bar), "r"(parity)
        : "memory");
}

// Copies the box of a tensor map at coordinates (c0 innermost) to shared memory and counts its
// bytes on `bar`. Elements outside the tensor arrive as zeros and count too.
FMHA_DEVICE void tma_load_4d(uint32_t dst, const void* map, uint32_t bar, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6}], "
        "[%2];"
        :
        : "r"(dst), "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

// Copies from shared memory to the box of a tensor map; elements outside the tensor are not written. A
// thread that fills the source by ordinary stores must follow them by fence_async_shared() and a barrier with the
// thread that issues the copy.
FMHA_DEVICE void tma_store_4d(const void* map, uint32_t src, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                 :
                 : "l"(map), "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}

// Stores run behind the thread that issued them, which alone can wait for them: commit a group, then wait until at most
// kPending groups still read shared memory (it may be written again, after a barrier, and the thread may return) or
// are still on their way to global memory (the thread sees what they wrote; what follows the kernel always does).
FMHA_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" : : : "memory"); }
template <int kPending>
FMHA_DEVICE void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(kPending) : "memory");
}
template <int kPending>
FMHA_DEVICE void tma_store_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" : : "n"(kPending) : "memory");
}

FMHA_DEVICE void tma_prefetch_map(const void* map) { asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory"); }

// Orders this thread's ordinary accesses to shared memory before later accesses of the copy engine
// and the tensor cores.
FMHA_DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

// wgmma runs behind the program: fence before the first one after touching its registers, commit a
// batch, wait until at most kPending batches are in flight.
FMHA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
FMHA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }
template <int kPending>
FMHA_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kPending) : "memory");
}

// No instruction: keeps the compiler from moving uses of an accumulator across this point.
template <int kCount>
FMHA_DEVICE void pin(float (&d)[kCount]) {
    FMHA_UNROLL
    for (int i = 0; i < kCount; ++i) {
        asm volatile("" : "+f"(d[i]) : : "memory");
    }
}

// No instruction: the compiler forgets what it knows of x, and so computes what depends on x here and not earlier.
FMHA_DEVICE void opaque(uint32_t& x) { asm volatile("" : "+r"(x)); }

// Moves registers between warpgroups; all warps of a warpgroup execute it, the counts are multiples
// of 8.
template <int kRegisters>
FMHA_DEVICE void registers_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
}
template <int kRegisters>
FMHA_DEVICE void registers_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
}

// Hardware barriers 0 to 15; 0 is sync_cta's. `threads` counts those that sync and those that only
// arrive.
FMHA_DEVICE void named_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}
FMHA_DEVICE void named_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}

}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// CPU twin of kernel_src/fmha/ptx/sm90.cuh: the same names, signatures and documented meaning.
#pragma once
#include <ptx/common.cuh>

namespace fmha {

FMHA_DEVICE int warp_uniform(int x) { return static_cast<int>(emu::shfl_idx(static_cast<uint32_t>(x), 0)); }

FMHA_DEVICE uint32_t smem_base_constant() { return smem_base(); }

FMHA_DEVICE uint32_t atomic_add_global(uint32_t* word, uint32_t x) { return emu::atomic_add_global(word, x); }

FMHA_DEVICE void mbarrier_init(uint32_t bar, int arrivals) { emu::mbarrier_init(bar, arrivals); }
FMHA_DEVICE void mbarrier_init_fence() { emu::mbarrier_init_fence(); }
FMHA_DEVICE void mbarrier_arrive(uint32_t bar) { emu::mbarrier_arrive(bar); }
FMHA_DEVICE void mbarrier_arrive_expect(uint32_t bar, uint32_t bytes) { emu::mbarrier_arrive_expect(bar, bytes); }
FMHA_DEVICE void mbarrier_wait(uint32_t bar, uint32_t parity) { emu::mbarrier_wait(bar, parity); }

FMHA_DEVICE void tma_load_4d(uint32_t dst, const void* map, uint32_t bar, int c0, int c1, int c2, int c3) {
    emu::tma_load_4d(dst, map, bar, c0, c1, c2, c3);
}
FMHA_DEVICE void tma_store_4d(const void* map, uint32_t src, int c0, int c1, int c2, int c3) {
    emu::tma_store_4d(map, src, c0, c1, c2, c3);
}
FMHA_DEVICE void tma_store_commit() { emu::tma_store_commit(); }
template <int kPending>
FMHA_DEVICE void tma_store_wait_read() {
    emu::tma_store_wait_read(kPending);
}
template <int kPending>
FMHA_DEVICE void tma_store_wait() {
    emu::tma_store_wait(kPending);
}
FMHA_DEVICE void tma_prefetch_map(const void* map) { emu::tma_prefetch_map(map); }

FMHA_DEVICE void fence_async_shared() { emu::fence_async_shared(); }

FMHA_DEVICE void wgmma_fence() { emu::wgmma_fence(); }
FMHA_DEVICE void wgmma_commit() { emu::wgmma_commit(); }
template <int kPending>
FMHA_DEVICE void wgmma_wait() {
    emu::wgmma_wait(kPending);
}

template <int kCount>
FMHA_DEVICE void pin(float (&d)[kCount]) {
    (void)d;
}

FMHA_DEVICE void opaque(uint32_t& x) { (void)x; }

template <int kRegisters>
FMHA_DEVICE void registers_inc() {
    emu::registers_inc(kRegisters);
}
template <int kRegisters>
FMHA_DEVICE void registers_dec() {
    emu::registers_dec(kRegisters);
}

FMHA_DEVICE void named_sync(int barrier, int threads) { emu::named_sync(barrier, threads); }
FMHA_DEVICE void named_arrive(int barrier, int threads) { emu::named_arrive(barrier, threads); }

}  // namespace fmha

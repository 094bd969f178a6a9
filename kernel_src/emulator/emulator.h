// SPDX-License-Identifier: Apache-2.0
// What a kernel compiled for the emulator sees of it: the launch request that Python fills, the
// entry point's description, and one function per instruction that needs the scheduler or the
// memory checks. Includes no C++ standard header on purpose: this file is most of what g++ parses
// for each kernel.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace fmha {
namespace emu {

// One tensor that the kernel may touch. Accesses outside every buffer are faults.
struct Buffer {
    uint64_t address;
    uint64_t bytes;
    uint64_t writable;
};

// The order in which the warps of a CTA, and the lanes of a warp, get their turns.
enum Order : uint32_t { kForward = 0, kReverse = 1, kShuffle = 2 };

// One launch. The Python side mirrors this layout.
struct Request {
    const void* params;
    const Buffer* buffers;
    char* error;  // receives the text of the fault
    uint64_t error_bytes;
    uint64_t collectives;  // written back: warp-wide operations executed
    uint32_t buffer_count;
    uint32_t grid;
    uint32_t threads;
    uint32_t smem;
    uint32_t workers;  // host threads, each of which runs whole CTAs
    uint32_t order;
    uint32_t seed;
};

struct Kernel {
    const char* name;
    void (*thread_main)(const void* params);
    uint32_t max_threads;
    uint32_t ctas_per_sm;
    uint32_t params_align;
};

// Runs every CTA of the grid. 0: done; 1: a fault, described in request.error.
int run(Request& request, const Kernel& kernel);

uint32_t thread_idx();
uint32_t block_idx();
uint32_t grid_dim();
uint32_t smem_base();

void sync_cta();
void sync_warp();
uint32_t shfl_xor(uint32_t x, int lane_mask);
uint32_t shfl_idx(uint32_t x, int lane);
int warp_any(int x);

void ld_shared_v4(uint32_t (&r)[4], uint32_t addr);
void st_shared_v4(uint32_t addr, const uint32_t (&x)[4]);
void st_shared_u32(uint32_t addr, uint32_t x);
void ld_global_v4(uint32_t (&r)[4], const void* src);
void st_global_v4(void* dst, const uint32_t (&x)[4]);
void st_global_u32(void* dst, uint32_t x);
void st_global_f32(float* dst, float x);
int32_t ld_global_s32(const int32_t* src);
uint8_t ld_global_u8(const uint8_t* src);
float ld_global_f32(const float* src);
uint32_t atomic_add_global(uint32_t* word, uint32_t x);
uint32_t atomic_inc_acq_rel(uint32_t* word, uint32_t last);

void cp_async_16(uint32_t dst_smem, const void* src, bool valid);
void cp_async_commit();
void cp_async_wait(int pending);

void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr);
void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr);
void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t addr);
void mma_m16n8k16_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

void mbarrier_init(uint32_t bar, int arrivals);
void mbarrier_init_fence();
void mbarrier_arrive(uint32_t bar);
void mbarrier_arrive_expect(uint32_t bar, uint32_t bytes);
void mbarrier_wait(uint32_t bar, uint32_t parity);
void tma_load_4d(uint32_t dst, const void* map, uint32_t bar, int c0, int c1, int c2, int c3);
void tma_store_4d(const void* map, uint32_t src, int c0, int c1, int c2, int c3);
void tma_store_commit();
void tma_store_wait_read(int pending);
void tma_store_wait(int pending);
void tma_prefetch_map(const void* map);
void fence_async_shared();
void wgmma_fence();
void wgmma_ss(bool bf16, uint32_t n, float* d, uint64_t a, uint64_t b, int accumulate);
void wgmma_rs_trans(bool bf16, uint32_t n, float* d, const uint32_t* a, uint64_t b, int accumulate);
void wgmma_commit();
void wgmma_wait(int pending);
void registers_inc(int count);
void registers_dec(int count);
void named_sync(int barrier, int threads);
void named_arrive(int barrier, int threads);

}  // namespace emu
}  // namespace fmha

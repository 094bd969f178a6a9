// SPDX-License-Identifier: Apache-2.0
// What every kernel needs of the machine: the kernel macro, indices, barriers, shuffles,
// approximate maths, conversions, vector loads and stores. One function per instruction;
// kernel_src/emulator/ptx/common.cuh is its twin. A wrapper may be here before a kernel needs it: grid_dim,
// tanh_approx, shfl_idx and ld_global_v4, and tma_store_* of sm90.cuh, are used by tests alone.
//
// How asm is marked: an instruction that only computes (mma, ex2, cvt) is not volatile, so that the
// compiler moves it freely. One that reads shared memory is volatile without a "memory" clobber:
// volatile statements keep their order among each other and to barriers, and every access to shared
// memory is such a statement, while register traffic around it stays free. Barriers, waits and
// stores also clobber memory, which orders plain C++ accesses.
#pragma once
#include <stdint.h>

#define FMHA_DEVICE __device__ __forceinline__
#define FMHA_UNROLL _Pragma("unroll")
#define FMHA_UNROLL_1 _Pragma("unroll 1")

// Defines the entry point `name`; the body that follows sees the by-value struct as `params`.
#define FMHA_KERNEL(name, Params, threads, ctas_per_sm) \
    extern "C" __global__ void __launch_bounds__(threads, ctas_per_sm) name(const __grid_constant__ Params params)

extern __shared__ __align__(1024) unsigned char fmha_dynamic_smem[];

namespace fmha {

// Element types by name; their storage is plain 16-bit integers, two to a register.
struct Fp16 {};
struct Bf16 {};

struct alignas(16) Vec4 {
    uint32_t x[4];
};

FMHA_DEVICE uint32_t thread_idx() { return threadIdx.x; }
FMHA_DEVICE uint32_t block_idx() { return blockIdx.x; }
FMHA_DEVICE uint32_t grid_dim() { return gridDim.x; }

// Address of the dynamic shared memory in the 32-bit shared window; 1024-byte aligned.
FMHA_DEVICE uint32_t smem_base() { return static_cast<uint32_t>(__cvta_generic_to_shared(fmha_dynamic_smem)); }

FMHA_DEVICE void sync_cta() { __syncthreads(); }
FMHA_DEVICE void sync_warp() { __syncwarp(); }

// 2^x; 2^-inf = 0.
FMHA_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

FMHA_DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

FMHA_DEVICE float tanh_approx(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

FMHA_DEVICE float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The value of lane (own lane ^ lane_mask). All 32 lanes of the warp take part.
FMHA_DEVICE float shfl_xor(float x, int lane_mask) { return __shfl_xor_sync(0xffffffffu, x, lane_mask); }
FMHA_DEVICE uint32_t shfl_xor(uint32_t x, int lane_mask) { return __shfl_xor_sync(0xffffffffu, x, lane_mask); }

// The value of lane `lane` (its low five bits). All 32 lanes of the warp take part.
FMHA_DEVICE float shfl_idx(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
FMHA_DEVICE uint32_t shfl_idx(uint32_t x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

// Whether any lane says yes. All 32 lanes of the warp take part.
FMHA_DEVICE bool warp_any(bool x) { return __any_sync(0xffffffffu, x); }

// Two floats rounded to nearest even, `lo` in the low half.
template <class Element>
FMHA_DEVICE uint32_t pack2(float lo, float hi);

template <>
FMHA_DEVICE uint32_t pack2<Fp16>(float lo, float hi) {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}

template <>
FMHA_DEVICE uint32_t pack2<Bf16>(float lo, float hi) {
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}

// Shared memory, by 32-bit shared-window address. Vectors are 16-byte aligned.
FMHA_DEVICE Vec4 ld_shared_v4(uint32_t addr) {
    Vec4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
                 : "r"(addr));
    return v;
}

FMHA_DEVICE void st_shared_v4(uint32_t addr, Vec4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(addr), "r"(v.x[0]), "r"(v.x[1]), "r"(v.x[2]), "r"(v.x[3])
                 : "memory");
}

FMHA_DEVICE void st_shared_u32(uint32_t addr, uint32_t x) {
    asm volatile("st.shared.u32 [%0], %1;" : : "r"(addr), "r"(x) : "memory");
}

// Global memory. Vectors are 16-byte aligned.
FMHA_DEVICE Vec4 ld_global_v4(const void* src) {
    Vec4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
                 : "l"(__cvta_generic_to_global(src)));
    return v;
}

FMHA_DEVICE void st_global_v4(void* dst, Vec4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(dst)), "r"(v.x[0]), "r"(v.x[1]), "r"(v.x[2]), "r"(v.x[3])
                 : "memory");
}

FMHA_DEVICE void st_global_u32(void* dst, uint32_t x) {
    asm volatile("st.global.u32 [%0], %1;" : : "l"(__cvta_generic_to_global(dst)), "r"(x) : "memory");
}

FMHA_DEVICE void st_global_f32(float* dst, float x) {
    asm volatile("st.global.f32 [%0], %1;" : : "l"(__cvta_generic_to_global(dst)), "f"(x) : "memory");
}

// ld.global.nc by intrinsics: the memory is constant while the kernel runs, and the compiler knows
// it.
FMHA_DEVICE int32_t ld_global_s32(const int32_t* src) { return __ldg(src); }
FMHA_DEVICE float ld_global_f32(const float* src) { return __ldg(src); }

}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// CPU twin of kernel_src/fmha/ptx/common.cuh: the same names, signatures and documented meaning.
#pragma once
#include <math.h>  // nvcc offers fmaxf and the like without an include
#include <stdint.h>

#include "../emulator.h"

#define FMHA_DEVICE inline
// Unrolling buys nothing on the CPU and costs compile time.
#define FMHA_UNROLL
#define FMHA_UNROLL_1

// Emits the function that Python calls with a Request; the body becomes what each emulated thread
// runs.
#define FMHA_KERNEL(name, Params, threads, ctas_per_sm)                                                 \
    static void name##_body(const Params& params);                                                      \
    static void name##_thread(const void* params) { name##_body(*static_cast<const Params*>(params)); } \
    extern "C" __attribute__((visibility("default"))) int name(fmha::emu::Request* request) {           \
        static_assert((ctas_per_sm) > 0, "At least one CTA must fit on an SM.");                        \
        return fmha::emu::run(*request, {#name, name##_thread, threads, ctas_per_sm, alignof(Params)}); \
    }                                                                                                   \
    static void name##_body(const Params& params)

namespace fmha {

struct Fp16 {};
struct Bf16 {};

struct alignas(16) Vec4 {
    uint32_t x[4];
};

namespace emu {

inline uint32_t float_bits(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    return u;
}

inline float bits_float(uint32_t u) {
    float x;
    __builtin_memcpy(&x, &u, 4);
    return x;
}

// The .ftz suffix: subnormal numbers count as zero of the same sign.
inline float flush(float x) { return (float_bits(x) & 0x7f800000u) ? x : bits_float(float_bits(x) & 0x80000000u); }

// Round to nearest even; overflow gives infinity, any NaN gives 0x7fff: what cvt.rn does.
inline uint32_t half_bits(float x) {
    const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fffu;
    if (magnitude >= 0x47800000u) return sign | 0x7c00u;  // 2^16 and above
    if (magnitude < 0x38800000u)  // subnormal half: adding 0.5 leaves the rounded multiple of 2^-24
                                  // in the low bits
        return sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u);
    return sign | ((magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
}

inline uint32_t bfloat_bits(float x) {
    const uint32_t u = float_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}

}  // namespace emu

FMHA_DEVICE uint32_t thread_idx() { return emu::thread_idx(); }
FMHA_DEVICE uint32_t block_idx() { return emu::block_idx(); }
FMHA_DEVICE uint32_t grid_dim() { return emu::grid_dim(); }
FMHA_DEVICE uint32_t smem_base() { return emu::smem_base(); }

FMHA_DEVICE void sync_cta() { emu::sync_cta(); }
FMHA_DEVICE void sync_warp() { emu::sync_warp(); }

FMHA_DEVICE float exp2_approx(float x) { return emu::flush(__builtin_exp2f(emu::flush(x))); }
FMHA_DEVICE float log2_approx(float x) { return __builtin_log2f(emu::flush(x)); }
FMHA_DEVICE float rcp_approx(float x) { return emu::flush(1.0f / emu::flush(x)); }

// tanh.approx promises a relative error of 2^-11 and no better; keeping 11 significant bits is
// exactly that coarse.
FMHA_DEVICE float tanh_approx(float x) {
    const uint32_t u = emu::float_bits(__builtin_tanhf(x));
    return (u & 0x7f800000u) == 0x7f800000u ? emu::bits_float(u) : emu::bits_float((u + 0x1000u) & ~0x1fffu);
}

FMHA_DEVICE uint32_t shfl_xor(uint32_t x, int lane_mask) { return emu::shfl_xor(x, lane_mask); }
FMHA_DEVICE float shfl_xor(float x, int lane_mask) {
    return emu::bits_float(emu::shfl_xor(emu::float_bits(x), lane_mask));
}
FMHA_DEVICE uint32_t shfl_idx(uint32_t x, int lane) { return emu::shfl_idx(x, lane); }
FMHA_DEVICE float shfl_idx(float x, int lane) { return emu::bits_float(emu::shfl_idx(emu::float_bits(x), lane)); }

FMHA_DEVICE bool warp_any(bool x) { return emu::warp_any(x) != 0; }

template <class Element>
uint32_t pack2(float lo, float hi);

template <>
FMHA_DEVICE uint32_t pack2<Fp16>(float lo, float hi) {
    return emu::half_bits(lo) | emu::half_bits(hi) << 16;
}

template <>
FMHA_DEVICE uint32_t pack2<Bf16>(float lo, float hi) {
    return emu::bfloat_bits(lo) | emu::bfloat_bits(hi) << 16;
}

FMHA_DEVICE Vec4 ld_shared_v4(uint32_t addr) {
    Vec4 v;
    emu::ld_shared_v4(v.x, addr);
    return v;
}
FMHA_DEVICE void st_shared_v4(uint32_t addr, Vec4 v) { emu::st_shared_v4(addr, v.x); }
FMHA_DEVICE void st_shared_u32(uint32_t addr, uint32_t x) { emu::st_shared_u32(addr, x); }

FMHA_DEVICE Vec4 ld_global_v4(const void* src) {
    Vec4 v;
    emu::ld_global_v4(v.x, src);
    return v;
}
FMHA_DEVICE void st_global_v4(void* dst, Vec4 v) { emu::st_global_v4(dst, v.x); }
FMHA_DEVICE void st_global_u32(void* dst, uint32_t x) { emu::st_global_u32(dst, x); }
FMHA_DEVICE void st_global_f32(float* dst, float x) { emu::st_global_f32(dst, x); }
FMHA_DEVICE int32_t ld_global_s32(const int32_t* src) { return emu::ld_global_s32(src); }
FMHA_DEVICE float ld_global_f32(const float* src) { return emu::ld_global_f32(src); }

}  // namespace fmha

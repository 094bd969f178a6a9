// SPDX-License-Identifier: Apache-2.0
// CPU twin of kernel_src/fmha/ptx/sm80.cuh: the same names, signatures and documented meaning.
#pragma once
#include <ptx/common.cuh>

namespace fmha {

FMHA_DEVICE void cp_async_16(uint32_t dst_smem, const void* src, bool valid) { emu::cp_async_16(dst_smem, src, valid); }
FMHA_DEVICE void cp_async_commit() { emu::cp_async_commit(); }

template <int kPending>
void cp_async_wait() {
    emu::cp_async_wait(kPending);
}

FMHA_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr) { emu::ldmatrix_x4(r, addr); }
FMHA_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr) { emu::ldmatrix_x4_trans(r, addr); }
FMHA_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t addr) { emu::ldmatrix_x2_trans(r, addr); }

template <class Element>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
FMHA_DEVICE void mma_m16n8k16<Fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emu::mma_m16n8k16_fp16(d, a, b0, b1);
}

template <>
FMHA_DEVICE void mma_m16n8k16<Bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emu::mma_m16n8k16_bf16(d, a, b0, b1);
}

}  // namespace fmha

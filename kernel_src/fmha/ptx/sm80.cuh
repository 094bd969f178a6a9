// SPDX-License-Identifier: Apache-2.0
// The instructions that arrived by compute capability 8.0: cp.async, ldmatrix, mma.sync. One
// function per instruction; kernel_src/emulator/ptx/sm80.cuh is its twin. common.cuh says which asm
// is volatile and which clobbers memory.
#pragma once
#include <ptx/common.cuh>

namespace fmha {

// Starts a copy of 16 bytes from global to shared memory, both 16-byte aligned. When not valid,
// zeros arrive instead and src is not read (src-size 0), so that it may point behind the tensor.
// The bytes are there only after a cp_async_wait of this thread, and for other threads only after a
// barrier that follows it.
FMHA_DEVICE void cp_async_16(uint32_t dst_smem, const void* src, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(dst_smem), "l"(__cvta_generic_to_global(src)), "r"(valid ? 16 : 0));
}

// Closes the group of all copies that this thread started since the last commit (possibly none).
FMHA_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;"); }

// Waits until at most kPending of this thread's most recent groups are still in flight.
template <int kPending>
FMHA_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements. Lane 8*i + j holds in addr the 16-byte aligned address of
// row j of matrix i, and receives in r[i] the elements (row lane/4, columns 2*(lane%4) and
// 2*(lane%4)+1) of matrix i. Volatile, so that it does not drift across a barrier; no "memory"
// clobber, so that the loads of the next k-step can still be scheduled between the mma of this one.
FMHA_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr));
}

// The same, each matrix transposed: r[i] holds (rows 2*(lane%4) and 2*(lane%4)+1, column lane/4).
FMHA_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr));
}

// Two matrices: lanes 0..15 give the row addresses; those of lanes 16..31 are not used.
FMHA_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(addr));
}

// d += a * b on a 16x8 tile with depth 16 and fp32 accumulation. With g = lane/4 and t = lane%4:
// a[0..3] = rows (g, g+8, g, g+8), columns 2t + (0, 0, 8, 8); b0, b1 = rows 2t + (0, 8), column g;
// d[0..3] = (row g, columns 2t, 2t+1), (row g+8, columns 2t, 2t+1).
template <class Element>
FMHA_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
FMHA_DEVICE void mma_m16n8k16<Fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
FMHA_DEVICE void mma_m16n8k16<Bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace fmha

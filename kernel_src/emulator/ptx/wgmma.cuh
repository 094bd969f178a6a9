// SPDX-License-Identifier: Apache-2.0
// CPU twin of kernel_src/fmha/ptx/wgmma.cuh: the same names, signatures and documented meaning.
//
// The emulator reads and writes the registers where the program keeps them, from the call until the
// wait that covers it: d and a must be arrays that live that long, as they are registers on the
// GPU.
#pragma once
#include <ptx/common.cuh>

namespace fmha {

namespace emu {

template <class Element>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<Bf16> = true;

}  // namespace emu

template <class Element, int kN>
struct Wgmma {
    static_assert(kN >= 8 && kN <= 256 && kN % 8 == 0, "The device side has wgmma for N from 8 to 256 in steps of 8.");
    FMHA_DEVICE static void ss(float (&d)[kN / 2], uint64_t a, uint64_t b, int accumulate) {
        emu::wgmma_ss(emu::kIsBf16<Element>, kN, d, a, b, accumulate);
    }
    FMHA_DEVICE static void rs_trans(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
        emu::wgmma_rs_trans(emu::kIsBf16<Element>, kN, d, a, b, accumulate);
    }
};

}  // namespace fmha

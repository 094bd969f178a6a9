// SPDX-License-Identifier: Apache-2.0
// The argument of the decode kernels: part of the ABI, as params.h is.
#pragma once
#include "params.h"

namespace fmha {

// Work is shared out in steps of the kernel's key tiles, equally many a CTA. A CTA leaves at most two results that
// others complete: of the unit in whose midst its share begins (slot 2 * CTA), and of the unit in whose midst it ends
// (slot 2 * CTA + 1).
struct DecodeParams {
    FwdParams fwd;
    float* partials;          // [2 * ctas] slots of DecodeTraits::kSlotFloats
    uint32_t* counters;       // [4 * ctas] zeros, and zeros again after the launch
    int32_t ctas;             // size of the grid
    int32_t least_tiles;      // that a CTA takes, so that short sequences are not cut to shreds
    int32_t page_size;        // tokens of a page
    int32_t page_multiplier;  // (2 * token + 1) * multiplier >> 32 >> shift is token / page_size
    int32_t page_shift;
};

static_assert(sizeof(DecodeParams) == 360, "DecodeParams and its Python mirror must agree: bump FMHA_ABI");

}  // namespace fmha

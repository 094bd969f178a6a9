// SPDX-License-Identifier: Apache-2.0
// The argument of the Hopper kernels: part of the ABI, as params.h is.
#pragma once
#include "params.h"

namespace fmha {

// FwdTmaParams.ctas CTAs draw the tiles after their first from `queue`, a word that is 0 before the launch and after
// it; null: a CTA takes every ctas-th tile.
struct FwdSm90Params {
    FwdTmaParams tma;
    uint32_t* queue;
};

}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// The argument of the Hopper kernels: part of the ABI, as params.h is.
#pragma once
#include "params.h"

namespace fmha {

// A CTA begins with the tile of its own index and draws the others from `queue`, a word that is 0 before the launch and
// after it. Where `queue` is null, a CTA takes every ctas-th tile (FwdTmaParams).
struct FwdSm90Params {
    FwdTmaParams tma;
    uint32_t* queue;
};

}  // namespace fmha

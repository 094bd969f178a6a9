// SPDX-License-Identifier: Apache-2.0
// Which tile a CTA works on next.
#pragma once
#include <ptx/sm90.cuh>

#include "params_sm90.h"

namespace fmha {

// The query tiles of one CTA, for its producer warp. Drawing them from a shared counter balances tiles of different
// lengths as the hardware's CTA scheduler would, without the cost of starting a CTA for each. The next number is drawn
// a little before it is needed, because the answer takes a trip to the L2. It is not drawn sooner, or long tiles would
// be dealt out unequally.
struct TileQueue {
    uint32_t* queue;
    int tiles;
    int stride;
    int index;
    uint32_t drawn = 0;

    FMHA_DEVICE TileQueue(const FwdSm90Params& params)
        : queue(params.queue),
          tiles(params.tma.fwd.m_blocks * params.tma.fwd.batch * params.tma.fwd.heads),
          stride(params.tma.ctas),
          index(static_cast<int>(block_idx())) {}

    FMHA_DEVICE bool done() const { return index >= tiles; }

    FMHA_DEVICE void draw(int lane) {
        if (queue != nullptr && lane == 0) {
            drawn = atomic_add_global(queue, 1);
            // One number is drawn for each tile, so this draw is the last of the launch: the counter is reset for the
            // next one.
            if (drawn == static_cast<uint32_t>(tiles) - 1) {
                st_global_u32(queue, 0);
            }
        }
    }

    FMHA_DEVICE void advance() {
        index = queue != nullptr ? stride + warp_uniform(static_cast<int>(drawn)) : index + stride;
    }
};

}  // namespace fmha

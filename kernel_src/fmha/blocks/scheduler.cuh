// SPDX-License-Identifier: Apache-2.0
// Which (query tile, head, batch) a CTA works on.
#pragma once
#include <ptx/common.cuh>

#include "params.h"

namespace fmha {

struct TileCoord {
    int m_block;
    int head;
    int batch;
};

// Tiles are numbered in the order in which they should start. The heads of the whole batch are cut into sections of
// section_heads heads. Inside a section all heads start a query tile before the next tile begins. The host chooses a
// size at which the K and V of a section tend to stay in the L2 and the tiles still fill the GPU evenly. Under a causal
// mask the tiles with most keys go first, so that the short ones fill the gaps at the end (longest processing time
// first).
FMHA_DEVICE TileCoord schedule(const FwdParams& p, int tile) {
    const int all_heads = p.batch * p.heads;
    const int section_tiles = p.section_heads * p.m_blocks;
    const int section = tile / section_tiles;
    const int first_head = section * p.section_heads;
    const int rest = all_heads - first_head;
    const int heads_here = rest < p.section_heads ? rest : p.section_heads;
    const int index = tile - section * section_tiles;
    const int m = index / heads_here;
    const int head = first_head + index - m * heads_here;
    TileCoord coord;
    coord.m_block = p.longest_first ? p.m_blocks - 1 - m : m;
    coord.batch = head / p.heads;
    coord.head = head - coord.batch * p.heads;
    return coord;
}

}  // namespace fmha

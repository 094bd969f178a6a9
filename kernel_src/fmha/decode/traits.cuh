// SPDX-License-Identifier: Apache-2.0
// Everything about a decode kernel that is fixed at compile time. Masks, scores and lengths are not: they are decided
// at run time, because a step waits for memory and not for instructions.
#pragma once
#include "blocks/smem.cuh"
#include "params_decode.h"

namespace fmha {

template <class Element_, int kHeadDim_, int kHeadDimV_, int kRows_, int kBlockN_, int kWarps_, int kStages_,
          bool kQInRegs_, bool kPaged_ = false>
struct DecodeTraits {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kHeadDimV = kHeadDimV_;
    static constexpr int kRows = kRows_;      // pairs of a query and a head that shares the KV head
    static constexpr int kBlockN = kBlockN_;  // keys of one step
    static constexpr int kWarps = kWarps_;
    static constexpr int kStages = kStages_;
    static constexpr bool kQInRegs = kQInRegs_;
    static constexpr bool kPaged = kPaged_;

    // Warps first share out the rows, 16 each. Those that are left share out the keys of a step.
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kWarpsM = kRows / 16;
    static constexpr int kWarpsN = kWarps / kWarpsM;
    static constexpr int kWarpKeys = kBlockN / kWarpsN;
    static constexpr int kMTiles = 1;
    static constexpr int kNTiles = kWarpKeys / 8;  // n8 tiles of S
    static constexpr int kVTiles = kHeadDimV / 8;  // n8 tiles of O
    static constexpr int kKSteps = (kHeadDim + 15) / 16;
    // After the exchange a warp has every kWarpsN-th tile of O.
    static constexpr int kOwnTiles = (kVTiles + kWarpsN - 1) / kWarpsN;

    static constexpr int kQkChunks = kKSteps * 2;
    static constexpr int kQkValidChunks = kHeadDim / 8;
    static constexpr int kVChunks = kHeadDimV / 8;
    using QkTile = SmemTile<kQkChunks>;
    using VTile = SmemTile<kVChunks>;

    static constexpr int kQBytes = kRows * QkTile::kRowBytes;
    static constexpr int kKBytes = kBlockN * QkTile::kRowBytes;
    static constexpr int kVBytes = kBlockN * VTile::kRowBytes;
    static constexpr int kStageBytes = kKBytes + kVBytes;
    static constexpr int kRingBytes = kStages * kStageBytes;
    // Where warps share keys, their results meet in the ring: O as fragments, then maxima and sums.
    static constexpr int kStatsBytes = kRows * kWarpsN * 8;
    static constexpr int kExchangeBytes = kWarpsN == 1 ? 0 : kWarps * kVTiles * 512 + kStatsBytes;
    // Where in the pools of K and V the keys lie of tiles that are copied next: 8 bytes each.
    static constexpr int kPlaceSlots = kStages;
    static constexpr int kPlaceBytes = kBlockN * 16;
    static constexpr int kPlacesBytes = kPaged ? kPlaceSlots * kPlaceBytes : 0;
    static constexpr int kScratchBytes = 64;
    static constexpr int kSmemBytes =
        kQBytes + (kRingBytes > kExchangeBytes ? kRingBytes : kExchangeBytes) + kPlacesBytes + kScratchBytes;

    // A result that is not complete: O as fragments, then (maximum, sum) of each row.
    static constexpr int kSlotFloats = kRows * kHeadDimV + 2 * kRows;

    static_assert(kHeadDim % 8 == 0 && kHeadDimV % 8 == 0, "head dims are multiples of 8: a 16-byte chunk");
    static_assert(kWarps == 4, "sums over the CTA are of four warps");
    static_assert(kWarpsM * kWarpsN == kWarps, "one m16 tile a warp");
    static_assert(kBlockN % (16 * kWarpsN) == 0, "P is fed to the second product in k16 steps");
    static_assert(kBlockN <= kThreads, "a thread looks up one key of a tile");
    static_assert(kStages >= 2, "one stage is read while the next one lands");
};

}  // namespace fmha

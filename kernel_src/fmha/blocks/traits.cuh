// SPDX-License-Identifier: Apache-2.0
// Everything about a forward kernel that is fixed at compile time: the one template argument of the kernel.
#pragma once
#include "blocks/smem.cuh"

namespace fmha {

template <bool kValue>
struct Bool {
    static constexpr bool value = kValue;
};

// What is done to a score besides the scale (score.cuh).
enum class Score { kPlain, kAlibi, kSoftcap };

template <class Element_, int kHeadDim_, int kHeadDimV_, int kBlockM_, int kBlockN_, int kWarps_, int kStages_,
          bool kQInRegs_, Score kScore_ = Score::kPlain, bool kPacked_ = false, bool kPaged_ = false>
struct FwdTraits {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kHeadDimV = kHeadDimV_;
    static constexpr int kBlockM = kBlockM_;  // query rows of a CTA
    static constexpr int kBlockN = kBlockN_;  // keys of one step
    static constexpr int kWarps = kWarps_;
    static constexpr int kStages = kStages_;     // K and V tiles in shared memory
    static constexpr bool kQInRegs = kQInRegs_;  // keep Q's fragments in registers instead of re-reading them each step
    static constexpr Score kScore = kScore_;
    static constexpr bool kPacked = kPacked_;  // a mask of bits on top of the band
    static constexpr bool kPaged = kPaged_;    // K and V lie in pages

    static constexpr int kThreads = kWarps * 32;
    static constexpr int kWarpRows = kBlockM / kWarps;
    static constexpr int kMTiles = kWarpRows / 16;  // m16 tiles of a warp
    static constexpr int kNTiles = kBlockN / 8;     // n8 tiles of S
    static constexpr int kVTiles = kHeadDimV / 8;   // n8 tiles of O
    static constexpr int kKSteps = (kHeadDim + 15) / 16;

    // Q and K are as deep as the instruction wants (a multiple of 16, the surplus is zero); V and O are exact.
    static constexpr int kQkChunks = kKSteps * 2;
    static constexpr int kQkValidChunks = kHeadDim / 8;
    static constexpr int kVChunks = kHeadDimV / 8;
    using QkTile = SmemTile<kQkChunks>;
    using VTile = SmemTile<kVChunks>;

    static constexpr int kQBytes = kBlockM * QkTile::kRowBytes;
    static constexpr int kKBytes = kBlockN * QkTile::kRowBytes;
    static constexpr int kVBytes = kBlockN * VTile::kRowBytes;
    static constexpr int kSmemBytes = kQBytes + kStages * (kKBytes + kVBytes);

    static_assert(kHeadDim % 8 == 0 && kHeadDimV % 8 == 0, "head dims are multiples of 8: a 16-byte chunk");
    static_assert(kBlockM % (16 * kWarps) == 0, "each warp owns whole m16 tiles of query rows");
    static_assert(kBlockN % 16 == 0, "P is fed to the second product in k16 steps");
    static_assert(kStages >= 2, "one stage is read while the next one lands");
    static_assert(!kPacked || kStages == 2, "tiles that a mask skips are looked up one step ahead");
    static_assert(kVChunks <= kQkChunks, "O is staged in Q's rows, so V must not be wider than Q");
};

}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// Everything about a Hopper forward kernel that is fixed at compile time, and how its tiles lie in shared memory.
#pragma once
#include <ptx/sm90.cuh>

#include "blocks/traits.cuh"

namespace fmha {

template <class Element_, int kHeadDim_, int kHeadDimV_, Score kScore_, int kBlockN_, int kConsumers_, int kStages_,
          bool kPacked_ = false, bool kPaged_ = false>
struct FwdSm90Traits {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kHeadDimV = kHeadDimV_;
    static constexpr Score kScore = kScore_;
    static constexpr int kBlockN = kBlockN_;        // keys of one step
    static constexpr int kConsumers = kConsumers_;  // warpgroups that multiply, 64 query rows each
    static constexpr int kStages = kStages_;        // K and V tiles in shared memory
    static constexpr bool kPacked = kPacked_;       // a mask of bits on top of the band
    static constexpr bool kPaged = kPaged_;         // K and V lie in pages

    static constexpr int kBlockM = 64 * kConsumers;
    static constexpr int kThreads = 128 * (kConsumers + 1);
    static constexpr int kKSteps = (kHeadDim + 15) / 16;
    static constexpr int kNTiles = kBlockN / 8;    // n8 tiles of S
    static constexpr int kVTiles = kHeadDimV / 8;  // n8 tiles of O

    // Columns come in groups as wide as the swizzle span: 64 (128 bytes), or 32 for the smallest head dim. A group is a
    // matrix of kRowBytes rows; columns past the head dim arrive as zeros from the copy engine.
    static constexpr int kGroupColumns = kHeadDim <= 32 ? 32 : 64;
    static constexpr int kRowBytes = kGroupColumns * 2;
    static constexpr int kQkGroups = (kHeadDim + kGroupColumns - 1) / kGroupColumns;
    static constexpr int kVGroups = (kHeadDimV + kGroupColumns - 1) / kGroupColumns;
    static constexpr int kStepsPerGroup = kGroupColumns / 16;
    static constexpr int kSmemLimit = 227 * 1024;
    static constexpr int kQGroupBytes = kBlockM * kRowBytes;
    static constexpr int kKvGroupBytes = kBlockN * kRowBytes;
    static constexpr int kQBytes = kQkGroups * kQGroupBytes;
    static constexpr int kKBytes = kQkGroups * kKvGroupBytes;
    static constexpr int kVBytes = kVGroups * kKvGroupBytes;
    static constexpr int kControlBytes = 1024;  // barriers and assignments
    // Two Q stages where they fit: Q of the next query tile is then loaded while this one is computed.
    static constexpr int kQStages = 2 * kQBytes + kStages * (kKBytes + kVBytes) + kControlBytes <= kSmemLimit ? 2 : 1;
    static constexpr int kSmemBytes = kQStages * kQBytes + kStages * (kKBytes + kVBytes) + kControlBytes;

    // setmaxnreg: the registers that the launch gives every warp are redistributed from the producer, which only issues
    // copies, to the consumers, which hold S, P and O. A producer that also looks up pages or mask bits keeps more
    // where S, P and O leave room. Beyond d 128 every producer does (measured: up to 3 % faster at 512 tokens; at d 128
    // it costs 1 % at 16k).
    static constexpr int kAccumulatorRegs = kHeadDimV / 2 + kBlockN / 2 + kBlockN / 4;
    static constexpr int kRoomyRegs = kConsumers == 2 ? 176 : kConsumers == 3 ? 124 : 76;
    static constexpr bool kMoreToProducer =
        ((kPacked || kPaged) && kAccumulatorRegs <= kRoomyRegs) || (kConsumers == 2 && kHeadDim > 128);
    static constexpr int kProducerRegs = kMoreToProducer ? 56 : kConsumers == 2 ? 40 : 32;
    static constexpr int kPlainConsumerRegs = kConsumers == 2 ? 232 : kConsumers == 3 ? 160 : 112;
    static constexpr int kConsumerRegs = kPlainConsumerRegs - (kMoreToProducer ? 8 : 0);

    // The maximum of a row is kept until it grows by 2^kHeadroom (lazy_softmax.cuh). A small headroom has nearly all
    // the speed of a large one, and a weight that dominates its row is still exactly 1: with a headroom of 8, one of
    // 146 cases had too large an error at d 48, and one at d 80. The polynomial of step_capped needs a larger headroom,
    // and capped scores are bounded.
    static constexpr int kHeadroom = kScore == Score::kSoftcap && kHeadDimV >= 64 ? 8 : 2;

    static_assert(kHeadDim % 8 == 0 && kHeadDimV % 8 == 0,
                  "head dims are multiples of 8: wgmma's N and a 16-byte chunk");
    static_assert(kBlockN % 16 == 0 && kBlockN <= 256,
                  "P is fed to the second product in k16 steps; a box has 256 rows");
    static_assert(kConsumers >= 2 && kConsumers <= 4, "the register split is set for two to four consumers");
    static_assert(kConsumers * kQStages * (32 + 16) + 8 * (1 + 4 * kStages) + 16 * (kStages + 1) <= kControlBytes,
                  "assignments, barriers and next tiles must fit their room");
};

// Shared-memory matrix descriptor (PTX ISA, "Matrix-descriptor format"): start address, leading and stride byte
// offsets, all in units of 16 bytes, and the swizzle mode (1: 128 bytes, 2: 64 bytes). Eight rows are one stride apart.
// leading_bytes is the distance between column groups where N is contiguous; it is ignored where the depth is
// contiguous. Only the low word depends on where the matrix lies: moving along it is one 32-bit addition.
template <class Traits>
struct MatrixDescriptor {
    static constexpr uint64_t kSwizzle = Traits::kRowBytes == 128 ? 1 : 2;
    static constexpr uint64_t kStride = 8 * Traits::kRowBytes / 16;

    uint32_t low;

    FMHA_DEVICE MatrixDescriptor(uint32_t address, uint32_t leading_bytes)
        : low(leading_bytes / 16 << 16 | (address & 0x3ffff) / 16) {}

    // The matrix that begins `units` times 16 bytes further on.
    FMHA_DEVICE uint64_t at(uint32_t units) const { return kSwizzle << 62 | kStride << 32 | (low + units); }
};

}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// The two products of a step by ldmatrix and mma.sync, and where their operands lie in shared memory.
#pragma once
#include <ptx/sm80.cuh>

#include "blocks/smem.cuh"

namespace fmha {

// Addresses that this lane gives to ldmatrix: one 8x8 matrix is eight rows of one chunk, and a lane names one row. The
// rest of a tile is reached from here by SmemTile::step.
template <class Traits>
struct LaneAddress {
    uint32_t q;  // row lane % 16, chunk lane / 16 of the warp's slab: the four quarters of an m16k16 operand
    uint32_t k;  // keys lane % 8 + 8 * (lane / 16), chunk lane / 8 % 2: two n8k16 operands
    uint32_t v;  // keys lane % 16, chunk lane / 16: two k16n8 operands, transposed on the way

    FMHA_DEVICE LaneAddress(uint32_t slab, uint32_t ring, int lane)
        : q(slab + Traits::QkTile::offset(lane % 16, lane / 16)),
          k(ring + Traits::QkTile::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2)),
          v(ring + Traits::kKBytes + Traits::VTile::offset(lane % 16, lane / 16)) {}
};

// Compile-time loop: the body gets its index as a type, so that it can be a template argument.
template <int kIndex>
struct Index {
    static constexpr int value = kIndex;
};

template <int kBegin, int kEnd, class Body>
FMHA_DEVICE void static_for(const Body& body) {
    if constexpr (kBegin < kEnd) {
        body(Index<kBegin>{});
        static_for<kBegin + 1, kEnd>(body);
    }
}

// Q's fragments of one k16 step.
template <class Traits, int kStep>
FMHA_DEVICE void load_q(uint32_t (&a)[Traits::kMTiles][4], uint32_t q_lane) {
    static_for<0, Traits::kMTiles>([&](auto mt) {
        ldmatrix_x4(a[mt.value], Traits::QkTile::template step<decltype(mt)::value * 16, kStep * 2>(q_lane));
    });
}

// S += Q K^T for one k16 step of the head dim.
template <class Traits, int kStep>
FMHA_DEVICE void qk_step(float (&s)[Traits::kMTiles][Traits::kNTiles][4], const uint32_t (&a)[Traits::kMTiles][4],
                         uint32_t k_lane) {
    using Element = typename Traits::Element;
    static_for<0, Traits::kNTiles / 2>([&](auto pair) {
        constexpr int kPair = decltype(pair)::value;
        uint32_t b[4];
        ldmatrix_x4(b, Traits::QkTile::template step<kPair * 16, kStep * 2>(k_lane));
        FMHA_UNROLL
        for (int mt = 0; mt < Traits::kMTiles; ++mt) {
            mma_m16n8k16<Element>(s[mt][kPair * 2], a[mt], b[0], b[1]);
            mma_m16n8k16<Element>(s[mt][kPair * 2 + 1], a[mt], b[2], b[3]);
        }
    });
}

// O += P V for one step of 16 keys.
template <class Traits, int kStep>
FMHA_DEVICE void pv_step(float (&o)[Traits::kMTiles][Traits::kVTiles][4],
                         const float (&p)[Traits::kMTiles][Traits::kNTiles][4], uint32_t v_lane) {
    using Element = typename Traits::Element;
    uint32_t a[Traits::kMTiles][4];
    FMHA_UNROLL
    for (int mt = 0; mt < Traits::kMTiles; ++mt) {
        const float (&even)[4] = p[mt][kStep * 2];
        const float (&odd)[4] = p[mt][kStep * 2 + 1];
        a[mt][0] = pack2<Element>(even[0], even[1]);
        a[mt][1] = pack2<Element>(even[2], even[3]);
        a[mt][2] = pack2<Element>(odd[0], odd[1]);
        a[mt][3] = pack2<Element>(odd[2], odd[3]);
    }
    static_for<0, Traits::kVTiles / 2>([&](auto pair) {
        constexpr int kPair = decltype(pair)::value;
        uint32_t b[4];
        ldmatrix_x4_trans(b, Traits::VTile::template step<kStep * 16, kPair * 2>(v_lane));
        FMHA_UNROLL
        for (int mt = 0; mt < Traits::kMTiles; ++mt) {
            mma_m16n8k16<Element>(o[mt][kPair * 2], a[mt], b[0], b[1]);
            mma_m16n8k16<Element>(o[mt][kPair * 2 + 1], a[mt], b[2], b[3]);
        }
    });
    if constexpr (Traits::kVTiles % 2 == 1) {  // head dims 40, 72, 104 end with half a pair
        constexpr int kLast = Traits::kVTiles - 1;
        uint32_t b[2];
        ldmatrix_x2_trans(b, Traits::VTile::template step<kStep * 16, kLast>(v_lane));
        FMHA_UNROLL
        for (int mt = 0; mt < Traits::kMTiles; ++mt) {
            mma_m16n8k16<Element>(o[mt][kLast], a[mt], b[0], b[1]);
        }
    }
}

}  // namespace fmha

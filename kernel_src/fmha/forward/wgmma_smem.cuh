// SPDX-License-Identifier: Apache-2.0
// What producer and consumers of a Hopper kernel share: rings of tiles, the barriers that guard them, and assignments.
#pragma once
#include <ptx/sm90.cuh>

#include "blocks/seqlen.cuh"
#include "forward/wgmma_traits.cuh"

namespace fmha {

// What the producer tells a consumer about a query tile, so that consumers need not divide by heads or read lengths.
struct Assignment {
    int row_begin;  // first query row of the tile in its sequence; negative: there are no more tiles
    int head;
    int batch;
    int q_row;  // first row of the sequence in Q and O
    int q_len;
    int k_len;
    int n_begin;  // KV tiles that are loaded for this query tile, except those that a packed mask leaves out
    int n_end;

    // The lengths as a SeqlenInfo. Its constructor would read the tables of a varlen batch, which the producer has
    // done: here it gets a dense problem of one sequence.
    FMHA_DEVICE SeqlenInfo seqlens() const {
        FwdParams dense{};
        dense.seqlen_q = q_len;
        dense.seqlen_k = k_len;
        SeqlenInfo seq(dense, 0);
        seq.q_row = q_row;
        return seq;
    }
};

// Shared memory: the Q ring, the K ring, the V ring, assignments, barriers. Each consumer has its own part of a Q tile,
// with its own assignment and barriers: the first consumer to finish a query tile need not wait for the others.
template <class Traits>
struct SmemSm90 {
    uint32_t base;

    FMHA_DEVICE uint32_t q(int stage) const { return base + stage * Traits::kQBytes; }
    FMHA_DEVICE uint32_t k(int stage) const { return q(Traits::kQStages) + stage * Traits::kKBytes; }
    FMHA_DEVICE uint32_t v(int stage) const { return k(Traits::kStages) + stage * Traits::kVBytes; }

    FMHA_DEVICE uint32_t assignment(int stage, int consumer) const {
        return v(Traits::kStages) + 32 * (stage * Traits::kConsumers + consumer);
    }
    FMHA_DEVICE uint32_t q_full(int stage, int consumer) const {
        return assignment(Traits::kQStages, 0) + 8 * (stage * Traits::kConsumers + consumer);
    }
    FMHA_DEVICE uint32_t q_empty(int stage, int consumer) const {
        return q_full(Traits::kQStages, 0) + 8 * (stage * Traits::kConsumers + consumer);
    }
    FMHA_DEVICE uint32_t k_full(int stage) const { return q_empty(Traits::kQStages, 0) + 8 * stage; }
    FMHA_DEVICE uint32_t k_empty(int stage) const { return k_full(Traits::kStages) + 8 * stage; }
    FMHA_DEVICE uint32_t v_full(int stage) const { return k_empty(Traits::kStages) + 8 * stage; }
    FMHA_DEVICE uint32_t v_empty(int stage) const { return v_full(Traits::kStages) + 8 * stage; }
    // A V tile that must be cleaned before it is full.
    FMHA_DEVICE uint32_t v_landed() const { return v_empty(Traits::kStages); }
    // Packed masks: the KV tile that is loaded after the one in this stage.
    FMHA_DEVICE uint32_t next_tile(int stage) const { return (v_landed() + 8 + 15) / 16 * 16 + 16 * stage; }

    FMHA_DEVICE void init_barriers() const {
        constexpr int kConsumerWarps = Traits::kConsumers * 4;  // each warp arrives once it has read the tile
        for (int stage = 0; stage < Traits::kQStages; ++stage) {
            for (int consumer = 0; consumer < Traits::kConsumers; ++consumer) {
                mbarrier_init(q_full(stage, consumer), 1);
                mbarrier_init(q_empty(stage, consumer), 4);
            }
        }
        mbarrier_init(v_landed(), 1);
        for (int stage = 0; stage < Traits::kStages; ++stage) {
            mbarrier_init(k_full(stage), 1);
            mbarrier_init(k_empty(stage), kConsumerWarps);
            mbarrier_init(v_full(stage), 1);
            mbarrier_init(v_empty(stage), kConsumerWarps);
        }
        mbarrier_init_fence();
    }

    FMHA_DEVICE void assign(int stage, int consumer, const Assignment& work) const {
        const uint32_t at = assignment(stage, consumer);
        const auto word = [](int x) { return static_cast<uint32_t>(x); };
        st_shared_v4(at, Vec4{{word(work.row_begin), word(work.head), word(work.batch), word(work.q_row)}});
        st_shared_v4(at + 16, Vec4{{word(work.q_len), word(work.k_len), word(work.n_begin), word(work.n_end)}});
    }
    // Only lane 0 reads, because it is lane 0 that releases the slot.
    FMHA_DEVICE Assignment assigned(int stage, int consumer, int lane) const {
        Vec4 a{}, b{};
        if (lane == 0) {
            a = ld_shared_v4(assignment(stage, consumer));
            b = ld_shared_v4(assignment(stage, consumer) + 16);
        }
        const auto whole = [](uint32_t x) { return warp_uniform(static_cast<int>(x)); };
        return Assignment{whole(a.x[0]), whole(a.x[1]), whole(a.x[2]), whole(a.x[3]),
                          whole(b.x[0]), whole(b.x[1]), whole(b.x[2]), whole(b.x[3])};
    }
};

// Position in a ring: the stage, and the parity of the phase in which it is filled.
template <int kStages>
struct RingPosition {
    int stage = 0;
    uint32_t parity = 0;

    FMHA_DEVICE void advance() {
        if constexpr (kStages == 1) {  // the stage stays a constant
            parity ^= 1;
        } else if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }

    FMHA_DEVICE RingPosition previous() const {
        const bool wraps = kStages == 1 || stage == 0;
        RingPosition position;
        position.stage = wraps ? kStages - 1 : stage - 1;
        position.parity = parity ^ (wraps ? 1u : 0u);
        return position;
    }
};

}  // namespace fmha

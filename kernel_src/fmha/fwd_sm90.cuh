// SPDX-License-Identifier: Apache-2.0
// Flash-attention forward for Hopper. One producer warp feeds rings of K and V tiles through the copy engine; two or
// three warpgroups of consumers own 64 query rows each and multiply with wgmma.
//
// A consumer issues the first product of tile n together with the second product of tile n + 1 (tiles go right to
// left), then does the softmax of tile n. The consumers take turns issuing, so that one's softmax runs under another's
// products. A CTA may work through several query tiles: the producer is then ahead by up to a ring.
#pragma once
#include <ptx/sm90.cuh>
#include <ptx/wgmma.cuh>

#include "epilogue.cuh"
#include "params.h"
#include "scheduler.cuh"
#include "score.cuh"
#include "seqlen.cuh"
#include "softmax.cuh"
#include "traits_sm90.cuh"

namespace fmha {

// One query tile and everything that follows from it.
template <class Traits>
struct Work {
    TileCoord tile;
    SeqlenInfo seq;
    int row_begin;
    Band band;
    KvRange range;

    FMHA_DEVICE Work(const FwdParams& p, int index)
        : tile(schedule(p, index)),
          seq(p, tile.batch),
          row_begin(tile.m_block * Traits::kBlockM),
          band(p, seq),
          range(band, row_begin, row_begin + Traits::kBlockM < seq.q_len ? row_begin + Traits::kBlockM : seq.q_len,
                Traits::kBlockN) {}

    // Varlen grids are cut for the longest sequence.
    FMHA_DEVICE bool exists() const { return row_begin < seq.q_len; }
    FMHA_DEVICE bool has_keys() const { return range.begin < range.end; }
};

// Shared memory: Q, the K ring, the V ring, the barriers.
template <class Traits>
struct SmemSm90 {
    uint32_t base;

    FMHA_DEVICE uint32_t q() const { return base; }
    FMHA_DEVICE uint32_t k(int stage) const { return base + Traits::kQBytes + stage * Traits::kKBytes; }
    FMHA_DEVICE uint32_t v(int stage) const { return k(Traits::kStages) + stage * Traits::kVBytes; }

    FMHA_DEVICE uint32_t q_full() const { return v(Traits::kStages); }
    FMHA_DEVICE uint32_t q_empty() const { return q_full() + 8; }
    FMHA_DEVICE uint32_t v_landed() const { return q_full() + 16; }  // a V tile that must be cleaned before it is full
    FMHA_DEVICE uint32_t k_full(int stage) const { return q_full() + 24 + 8 * stage; }
    FMHA_DEVICE uint32_t k_empty(int stage) const { return k_full(Traits::kStages) + 8 * stage; }
    FMHA_DEVICE uint32_t v_full(int stage) const { return k_empty(Traits::kStages) + 8 * stage; }
    FMHA_DEVICE uint32_t v_empty(int stage) const { return v_full(Traits::kStages) + 8 * stage; }

    FMHA_DEVICE void init_barriers() const {
        constexpr int kConsumerWarps = Traits::kConsumers * 4;  // every warp says for itself when it is done reading
        mbarrier_init(q_full(), 1);
        mbarrier_init(q_empty(), kConsumerWarps);
        mbarrier_init(v_landed(), 1);
        for (int stage = 0; stage < Traits::kStages; ++stage) {
            mbarrier_init(k_full(stage), 1);
            mbarrier_init(k_empty(stage), kConsumerWarps);
            mbarrier_init(v_full(stage), 1);
            mbarrier_init(v_empty(stage), kConsumerWarps);
        }
        mbarrier_init_fence();
    }
};

// Position in a ring: the stage, and the parity of the phase in which it is filled.
template <int kStages>
struct RingPosition {
    int stage = 0;
    uint32_t parity = 0;

    FMHA_DEVICE void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// The warp that issues all copies. Its lanes stay together for the one job that needs them: cleaning V.
template <class Traits>
FMHA_DEVICE void produce(const FwdTmaParams& params, const SmemSm90<Traits>& smem, int lane) {
    const FwdParams& p = params.fwd;
    const int tiles = p.m_blocks * p.batch * p.heads;
    RingPosition<Traits::kStages> ring;
    uint32_t q_parity = 1;
    uint32_t landed_parity = 0;

    // One box per column group. Coordinates: column, row, head, batch.
    const auto load_groups = [&](uint32_t to, int group_bytes, int groups, const TensorMap* map, uint32_t bar, int row,
                                 int head, int batch) {
        mbarrier_arrive_expect(bar, groups * group_bytes);
        for (int g = 0; g < groups; ++g) {
            tma_load_4d(to + g * group_bytes, map, bar, g * Traits::kGroupColumns, row, head, batch);
        }
    };

    for (int index = static_cast<int>(block_idx()); index < tiles; index += params.ctas) {
        const Work<Traits> work(p, index);
        if (!work.exists() || !work.has_keys()) {
            continue;
        }
        const int kv_head = work.tile.head / p.heads_per_kv;
        const int q_row = static_cast<int>(work.seq.q_row) + work.row_begin;
        const int k_row = static_cast<int>(work.seq.k_row);
        const int q_batch = p.cu_seqlens_q != nullptr ? 0 : work.tile.batch;
        const int k_batch = p.cu_seqlens_k != nullptr ? 0 : work.tile.batch;
        // Past the end of a tensor the copy engine fills in zeros; past the end of a sequence there is somebody else.
        const bool ragged = p.cu_seqlens_k != nullptr || p.seqused_k != nullptr;

        for (int n_block = work.range.end - 1; n_block >= work.range.begin; --n_block) {
            const int row = k_row + n_block * Traits::kBlockN;
            const int valid_rows = work.seq.k_len - n_block * Traits::kBlockN;
            const bool dirty = ragged && valid_rows < Traits::kBlockN;
            const uint32_t v_tile = smem.v(ring.stage);
            if (lane == 0) {
                mbarrier_wait(smem.k_empty(ring.stage), ring.parity ^ 1);
                load_groups(smem.k(ring.stage), Traits::kKvGroupBytes, Traits::kQkGroups, &params.k_map,
                            smem.k_full(ring.stage), row, kv_head, k_batch);
                if (n_block == work.range.end - 1) {
                    mbarrier_wait(smem.q_empty(), q_parity);
                    load_groups(smem.q(), Traits::kQGroupBytes, Traits::kQkGroups, &params.q_map, smem.q_full(), q_row,
                                work.tile.head, q_batch);
                }
                mbarrier_wait(smem.v_empty(ring.stage), ring.parity ^ 1);
                load_groups(v_tile, Traits::kKvGroupBytes, Traits::kVGroups, &params.v_map,
                            dirty ? smem.v_landed() : smem.v_full(ring.stage), row, kv_head, k_batch);
            }
            if (dirty) {  // 0 * NaN is NaN: rows past the length are zeroed before anyone multiplies
                sync_warp();
                mbarrier_wait(smem.v_landed(), landed_parity);
                landed_parity ^= 1;
                for (int g = 0; g < Traits::kVGroups; ++g) {
                    const uint32_t group = v_tile + g * Traits::kKvGroupBytes;
                    for (int at = valid_rows * Traits::kRowBytes + lane * kChunkBytes; at < Traits::kKvGroupBytes;
                         at += 32 * kChunkBytes) {
                        st_shared_v4(group + at, Vec4{{0, 0, 0, 0}});
                    }
                }
                fence_async_shared();
                sync_warp();
                if (lane == 0) {
                    mbarrier_arrive(smem.v_full(ring.stage));
                }
            }
            ring.advance();
        }
        q_parity ^= 1;
    }
}

// A warpgroup of consumers: 64 rows of every query tile of the CTA.
template <class Traits>
FMHA_DEVICE void consume(const FwdTmaParams& params, const SmemSm90<Traits>& smem, int consumer, int warp, int lane) {
    using Element = typename Traits::Element;
    const FwdParams& p = params.fwd;
    const int tiles = p.m_blocks * p.batch * p.heads;

    // Accumulators in fragment order (mask.cuh), and flat as wgmma names them.
    float o[1][Traits::kVTiles][4];
    float s[1][Traits::kNTiles][4];
    auto& o_flat = reinterpret_cast<float (&)[Traits::kVTiles * 4]>(o);
    auto& s_flat = reinterpret_cast<float (&)[Traits::kNTiles * 4]>(s);
    uint32_t probs[Traits::kBlockN / 16][4];  // P as the operand of the second product

    const uint64_t q_matrix = matrix_descriptor<Traits>(smem.q() + consumer * 64 * Traits::kRowBytes, 16);
    const uint64_t k_matrix = matrix_descriptor<Traits>(smem.k(0), 16);
    const uint64_t v_matrix = matrix_descriptor<Traits>(smem.v(0), Traits::kKvGroupBytes);

    const auto issue_qk = [&](int stage) {
        FMHA_UNROLL
        for (int ks = 0; ks < Traits::kKSteps; ++ks) {
            const int group = ks / Traits::kStepsPerGroup;
            const int column = ks % Traits::kStepsPerGroup * 32;
            Wgmma<Element, Traits::kBlockN>::ss(
                s_flat, q_matrix + descriptor_step(group * Traits::kQGroupBytes + column),
                k_matrix + descriptor_step(stage * Traits::kKBytes + group * Traits::kKvGroupBytes + column), ks != 0);
        }
        wgmma_commit();
    };
    const auto issue_pv = [&](int stage) {
        FMHA_UNROLL
        for (int ks = 0; ks < Traits::kBlockN / 16; ++ks) {
            Wgmma<Element, Traits::kHeadDimV>::rs_trans(
                o_flat, probs[ks], v_matrix + descriptor_step(stage * Traits::kVBytes + ks * 16 * Traits::kRowBytes),
                1);
        }
        wgmma_commit();
    };
    const auto pack_probs = [&] {
        FMHA_UNROLL
        for (int ks = 0; ks < Traits::kBlockN / 16; ++ks) {
            FMHA_UNROLL
            for (int i = 0; i < 4; ++i) {
                const float (&tile)[4] = s[0][ks * 2 + i / 2];
                probs[ks][i] = pack2<Element>(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
            }
        }
    };
    const auto release = [&](uint32_t bar) {
        if (lane == 0) {
            mbarrier_arrive(bar);
        }
    };

    // Named barrier 1 + consumer: it is that consumer's turn to issue products. The last one lets the first begin.
    const auto wait_for_turn = [&] { named_sync(1 + consumer, 256); };
    const auto pass_turn = [&] { named_arrive(1 + (consumer + 1 == Traits::kConsumers ? 0 : consumer + 1), 256); };
    if (consumer == Traits::kConsumers - 1) {
        pass_turn();
    }

    RingPosition<Traits::kStages> ring;
    uint32_t q_parity = 0;
    FMHA_UNROLL_1
    for (int index = static_cast<int>(block_idx()); index < tiles; index += params.ctas) {
        const Work<Traits> work(p, index);
        if (!work.exists()) {
            continue;
        }
        const int warp_row = work.row_begin + consumer * 64 + warp * 16;
        const ScoreMod<Traits::kScore> score(p, work.tile.batch, work.tile.head, work.band.diagonal);
        Softmax<1> softmax;
        if (p.sinks != nullptr) {
            softmax.add_sink(ld_global_f32(p.sinks + work.tile.head), p.scale_log2, lane);
        }
        FMHA_UNROLL
        for (int vt = 0; vt < Traits::kVTiles; ++vt) {
            o[0][vt][0] = o[0][vt][1] = o[0][vt][2] = o[0][vt][3] = 0.f;
        }

        if (work.has_keys()) {
            const int begin = work.range.begin;
            const int full_begin = work.range.full_begin > begin ? work.range.full_begin : begin;
            const int full_end = work.range.full_end > begin ? work.range.full_end : begin;
            int n_block = work.range.end - 1;
            float shrink[1][2];

            // S of one tile becomes P, still in S's registers.
            const auto softmax_step = [&](auto masked) {
                constexpr bool kMasked = decltype(masked)::value;
                score.apply(s, warp_row, n_block * Traits::kBlockN, lane);
                if constexpr (kMasked) {
                    apply_band_sides(s, work.band, n_block >= work.range.full_end, n_block < work.range.full_begin,
                                     warp_row, n_block * Traits::kBlockN, lane);
                }
                softmax.template step<kMasked, Traits::kLazyRescale>(s, shrink, p.scale_log2);
            };
            const auto release_qk = [&](int stage) {
                release(smem.k_empty(stage));
                if (n_block == begin) {
                    release(smem.q_empty());
                }
            };

            // First tile: nothing to multiply with V yet.
            mbarrier_wait(smem.q_full(), q_parity);
            q_parity ^= 1;
            mbarrier_wait(smem.k_full(ring.stage), ring.parity);
            wait_for_turn();
            pin(s_flat);
            wgmma_fence();
            issue_qk(ring.stage);
            pass_turn();
            wgmma_wait<0>();
            pin(s_flat);
            release_qk(ring.stage);
            if (work.range.needs_mask(n_block)) {
                softmax_step(Bool<true>{});
            } else {
                softmax_step(Bool<false>{});
            }
            pack_probs();
            --n_block;

            const auto step = [&](auto masked) {
                const RingPosition<Traits::kStages> previous = ring;
                ring.advance();
                mbarrier_wait(smem.k_full(ring.stage), ring.parity);
                wait_for_turn();
                pin(s_flat);
                wgmma_fence();
                issue_qk(ring.stage);
                mbarrier_wait(smem.v_full(previous.stage), previous.parity);
                issue_pv(previous.stage);
                pass_turn();
                wgmma_wait<1>();
                pin(s_flat);
                release_qk(ring.stage);
                softmax_step(masked);
                wgmma_wait<0>();  // only now may O and P be touched
                pin(o_flat);
                release(smem.v_empty(previous.stage));
                if (!Traits::kLazyRescale || warp_any(shrink[0][0] != 1.f || shrink[0][1] != 1.f)) {
                    softmax.rescale(o, shrink);
                }
                pack_probs();
            };
            FMHA_UNROLL_1
            for (; n_block >= full_end; --n_block) {
                step(Bool<true>{});
            }
            FMHA_UNROLL_1
            for (; n_block >= full_begin; --n_block) {
                step(Bool<false>{});
            }
            FMHA_UNROLL_1
            for (; n_block >= begin; --n_block) {
                step(Bool<true>{});
            }

            mbarrier_wait(smem.v_full(ring.stage), ring.parity);
            pin(o_flat);
            wgmma_fence();
            issue_pv(ring.stage);
            wgmma_wait<0>();
            pin(o_flat);
            release(smem.v_empty(ring.stage));
            ring.advance();
        }

        softmax.finish(o);
        uint16_t* out = static_cast<uint16_t*>(p.o) + work.tile.batch * p.o_stride.batch +
                        work.seq.q_row * p.o_stride.row + work.tile.head * p.o_stride.head;
        store_rows<Element>(o, out, p.o_stride.row, warp_row, work.seq.q_len, lane);
        if (p.lse != nullptr) {
            float* lse =
                p.lse + work.tile.batch * p.lse_batch_stride + work.tile.head * p.lse_head_stride + work.seq.q_row;
            store_lse(softmax, lse, p.scale_log2, warp_row, work.seq.q_len, lane);
        }
    }
}

template <class Traits>
FMHA_DEVICE void fwd_sm90(const FwdTmaParams& params) {
    const int thread = static_cast<int>(thread_idx());
    const int warpgroup = warp_uniform(thread / 128);
    const SmemSm90<Traits> smem{smem_base()};
    if (thread == 0) {
        smem.init_barriers();
    }
    sync_cta();

    if (warpgroup == 0) {
        registers_dec<Traits::kProducerRegs>();
        if (thread < 32) {
            produce<Traits>(params, smem, thread);
        }
    } else {
        registers_inc<Traits::kConsumerRegs>();
        consume<Traits>(params, smem, warpgroup - 1, thread / 32 % 4, thread % 32);
    }
}

}  // namespace fmha

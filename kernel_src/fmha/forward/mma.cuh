// SPDX-License-Identifier: Apache-2.0
// Flash-attention forward with cp.async, ldmatrix and mma.sync: SM80 and everything after it.
//
// One CTA computes kBlockM query rows of one head; each warp owns whole rows, so the softmax never leaves a warp. K and
// V tiles stream through kStages buffers, right to left, with one barrier per tile: at that barrier tile n has landed
// and every warp is done with tile n + 1, whose buffer the next copy may overwrite. P stays in registers, because the
// accumulator layout of S is the operand layout of the second product.
#pragma once
#include <ptx/sm80.cuh>

#include "blocks/epilogue.cuh"
#include "blocks/paged_kv.cuh"
#include "blocks/products.cuh"
#include "blocks/scheduler.cuh"
#include "blocks/score.cuh"
#include "blocks/seqlen.cuh"
#include "blocks/softmax.cuh"
#include "blocks/tile_copy.cuh"
#include "blocks/traits.cuh"
#include "params.h"

namespace fmha {

template <class Traits>
FMHA_DEVICE void fwd_sm80(const FwdParams& p) {
    const int thread = static_cast<int>(thread_idx());
    const int lane = thread % 32;
    const int warp = thread / 32;

    // The query tile of this CTA, its sequence and its KV tiles.
    const TileCoord tile = schedule(p, static_cast<int>(block_idx()));
    const SeqlenInfo seq(p, tile.batch);
    const int row_begin = tile.m_block * Traits::kBlockM;
    if (row_begin >= seq.q_len) {
        return;
    }
    const int row_end = row_begin + Traits::kBlockM < seq.q_len ? row_begin + Traits::kBlockM : seq.q_len;
    const Band band(p, seq);
    KvRange range(band, row_begin, row_end, Traits::kBlockN);
    [[maybe_unused]] const auto mask = packed_mask<Traits::kPacked>(p, seq, tile.batch, tile.head);
    const ScoreMod<Traits::kScore> score(p, tile.batch, tile.head, band.diagonal);
    const int kv_head = tile.head / p.heads_per_kv;
    const int warp_row = row_begin + warp * Traits::kWarpRows;

    const uint16_t* q = static_cast<const uint16_t*>(p.q) + tile.batch * p.q_stride.batch + seq.q_row * p.q_stride.row +
                        tile.head * p.q_stride.head;

    // Shared memory: Q (later O), then kStages x (K, V).
    const uint32_t q_tile = smem_base();
    const uint32_t ring = q_tile + Traits::kQBytes;
    constexpr uint32_t kStageBytes = Traits::kKBytes + Traits::kVBytes;
    const uint32_t warp_slab = q_tile + warp * Traits::kWarpRows * Traits::QkTile::kRowBytes;
    const LaneAddress<Traits> address(warp_slab, ring, lane);

    float o[Traits::kMTiles][Traits::kVTiles][4];
    FMHA_UNROLL
    for (int mt = 0; mt < Traits::kMTiles; ++mt) {
        FMHA_UNROLL
        for (int vt = 0; vt < Traits::kVTiles; ++vt) {
            o[mt][vt][0] = o[mt][vt][1] = o[mt][vt][2] = o[mt][vt][3] = 0.f;
        }
    }
    Softmax<Traits::kMTiles> softmax;
    if (p.sinks != nullptr && softmax.add_sink(ld_global_f32(p.sinks + tile.head), p.scale_log2, lane)) {
        range.end = range.begin;
    }

    // The next KV tile to the left. Packed masks leave out the tiles in which no key is visible.
    const auto next = [&](int n_block) {
        --n_block;
        if constexpr (Traits::kPacked) {
            while (n_block >= range.begin &&
                   !mask.template visible<Traits::kBlockM, Traits::kBlockN>(row_begin, n_block)) {
                --n_block;
            }
        }
        return n_block;
    };
    int n_block = next(range.end);
    if (n_block >= range.begin) {
        const TileCopy<Traits::kBlockM, typename Traits::QkTile, Traits::kQkValidChunks, Traits::kThreads> q_copy(
            q, p.q_stride.row, thread);
        const KvSource<Traits> kv(p, seq, tile.batch, kv_head, thread);

        // One group per tile, committed even when there is no tile left: the wait counts groups.
        const auto load_kv = [&](int block, int stage) {
            if (block >= range.begin) {
                kv.load(ring + stage * kStageBytes, block, seq.k_len);
            }
            cp_async_commit();
        };

        q_copy.load(q_tile, row_begin, seq.q_len);
        zero_surplus<typename Traits::QkTile, Traits::kQkChunks, Traits::kQkValidChunks, Traits::kThreads>(
            q_tile, Traits::kBlockM, thread);
        FMHA_UNROLL
        for (int stage = 0; stage < Traits::kStages; ++stage) {
            zero_surplus<typename Traits::QkTile, Traits::kQkChunks, Traits::kQkValidChunks, Traits::kThreads>(
                ring + stage * kStageBytes, Traits::kBlockN, thread);
        }
        FMHA_UNROLL
        for (int stage = 0; stage < Traits::kStages - 1; ++stage) {
            load_kv(n_block - stage, stage);
        }

        uint32_t q_frag[Traits::kQInRegs ? Traits::kKSteps : 1][Traits::kMTiles][4];
        if constexpr (Traits::kQInRegs) {
            cp_async_wait<Traits::kStages - 2>();
            sync_cta();
            static_for<0, Traits::kKSteps>(
                [&](auto ks) { load_q<Traits, decltype(ks)::value>(q_frag[decltype(ks)::value], address.q); });
        }

        const auto step = [&](uint32_t stage_offset, auto masked) {
            constexpr bool kMasked = decltype(masked)::value;
            float s[Traits::kMTiles][Traits::kNTiles][4];
            FMHA_UNROLL
            for (int mt = 0; mt < Traits::kMTiles; ++mt) {
                FMHA_UNROLL
                for (int nt = 0; nt < Traits::kNTiles; ++nt) {
                    s[mt][nt][0] = s[mt][nt][1] = s[mt][nt][2] = s[mt][nt][3] = 0.f;
                }
            }
            static_for<0, Traits::kKSteps>([&](auto ks) {
                constexpr int kStep = decltype(ks)::value;
                auto& a = q_frag[Traits::kQInRegs ? kStep : 0];
                if constexpr (!Traits::kQInRegs) {
                    load_q<Traits, kStep>(a, address.q);
                }
                qk_step<Traits, kStep>(s, a, address.k + stage_offset);
            });
            score.apply(s, warp_row, n_block * Traits::kBlockN, lane);
            if constexpr (Traits::kPacked) {
                mask.apply(s, warp_row, n_block * Traits::kBlockN, lane);
            }
            if constexpr (kMasked) {
                apply_band(s, band, warp_row, n_block * Traits::kBlockN, lane);
            }
            float shrink[Traits::kMTiles][2];
            softmax.template step<kMasked || Traits::kPacked>(s, shrink, p.scale_log2);
            softmax.rescale(o, shrink);
            static_for<0, Traits::kBlockN / 16>(
                [&](auto ks) { pv_step<Traits, decltype(ks)::value>(o, s, address.v + stage_offset); });
        };

        int stage = 0;
        FMHA_UNROLL_1
        while (n_block >= range.begin) {
            cp_async_wait<Traits::kStages - 2>();
            sync_cta();
            const int free_stage = stage == 0 ? Traits::kStages - 1 : stage - 1;
            const int after = next(n_block);
            load_kv(Traits::kPacked ? after : n_block - (Traits::kStages - 1), free_stage);
            if (range.needs_mask(n_block)) {
                step(stage * kStageBytes, Bool<true>{});
            } else {
                step(stage * kStageBytes, Bool<false>{});
            }
            stage = stage == Traits::kStages - 1 ? 0 : stage + 1;
            n_block = after;
        }
        cp_async_wait<0>();
    }

    softmax.finish(o);
    uint16_t* out = static_cast<uint16_t*>(p.o) + tile.batch * p.o_stride.batch + seq.q_row * p.o_stride.row +
                    tile.head * p.o_stride.head;
    store_output<Traits>(o, warp_slab, out, p.o_stride.row, warp_row, seq.q_len, lane);
    if (p.lse != nullptr) {
        float* lse = p.lse + tile.batch * p.lse_batch_stride + tile.head * p.lse_head_stride + seq.q_row;
        store_lse(softmax, lse, p.scale_log2, warp_row, seq.q_len, lane);
    }
}

}  // namespace fmha

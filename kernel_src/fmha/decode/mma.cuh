// SPDX-License-Identifier: Apache-2.0
// Attention of few queries on many keys (decoding) with cp.async, ldmatrix and mma.sync: SM80 and everything after it.
//
// All query heads of a KV head sit in one CTA, so that K and V are read once. The batch is cut into equal stretches of
// keys, one a CTA (worklist.cuh); results of a unit that several CTAs share are added up by whoever comes last
// (merge.cuh). K and V stream through kStages buffers, with one barrier a step.
#pragma once
#include "blocks/products.cuh"
#include "decode/kv.cuh"
#include "decode/merge.cuh"

namespace fmha {

// Copies the rows of a unit; those past the last arrive as zeros.
template <class Traits>
FMHA_DEVICE void load_rows(uint32_t q_tile, const FwdParams& p, const SequenceUnits<Traits>& units, const Piece& piece,
                           int thread) {
    const uint16_t* q = static_cast<const uint16_t*>(p.q) + piece.batch * p.q_stride.batch +
                        units.seq.q_row * p.q_stride.row + piece.kv_head * units.group * p.q_stride.head;
    FMHA_UNROLL_1  // code that runs once is fetched from far away: short is fast
        for (int i = thread; i < Traits::kRows * Traits::kQkValidChunks; i += Traits::kThreads) {
        const int row = i / Traits::kQkValidChunks;
        const int chunk = i % Traits::kQkValidChunks;
        const int index = piece.block * Traits::kRows + row;
        const int query = index / units.group;
        const uint16_t* from =
            q + query * p.q_stride.row + (index - query * units.group) * p.q_stride.head + chunk * kChunkElements;
        cp_async_16(q_tile + Traits::QkTile::offset(row, chunk), from, index < units.rows);
    }
}

// S of one step, masked: `col0` is this warp's first key.
template <class Traits>
FMHA_DEVICE void modify_scores(float (&s)[1][Traits::kNTiles][4], const FwdParams& p,
                               const ScoreMod<Score::kSoftcap>& softcap, const DecodeRows<Traits>& rows,
                               const SeqlenInfo& seq, int batch, int col0, bool masked, int lane) {
    if (p.tanh_scale != 0.f) {
        softcap.apply(s, 0, col0, lane);
    }
    if (p.alibi_slopes != nullptr) {
        rows.add_alibi(s, col0, lane);
    }
    if (p.mask != nullptr) {
        rows.apply_packed(s, p, seq, batch, col0, lane);
    }
    if (masked) {
        rows.apply_band(s, col0, lane);
    }
}

// The share of one piece that a warp computes: O, not divided by the sums, and the softmax.
template <class Traits>
FMHA_DEVICE void compute_piece(float (&o)[1][Traits::kVTiles][4], Softmax<1>& softmax, const DecodeParams& params,
                               const SequenceUnits<Traits>& units, const Piece& piece, const DecodeRows<Traits>& rows,
                               uint32_t q_tile, int thread) {
    const FwdParams& p = params.fwd;
    const int lane = thread % 32;
    const int warp_m = thread / 32 % Traits::kWarpsM;
    const int warp_n = thread / 32 / Traits::kWarpsM;
    const uint32_t ring = q_tile + Traits::kQBytes;
    LaneAddress<Traits> address(q_tile + warp_m * 16 * Traits::QkTile::kRowBytes, ring, lane);
    address.k += warp_n * Traits::kWarpKeys * Traits::QkTile::kRowBytes;
    address.v += warp_n * Traits::kWarpKeys * Traits::VTile::kRowBytes;

    const KvRange range = units.range(piece.block);
    int n_block = range.begin + piece.first_step;
    const int end = n_block + piece.steps < range.end ? n_block + piece.steps : range.end;
    FMHA_UNROLL
    for (int vt = 0; vt < Traits::kVTiles; ++vt) {
        o[0][vt][0] = o[0][vt][1] = o[0][vt][2] = o[0][vt][3] = 0.f;
    }
    if (n_block >= end) {
        return;  // no row sees a key
    }
    const uint32_t places = q_tile + Traits::kSmemBytes - Traits::kScratchBytes - Traits::kPlacesBytes;
    DecodeKv<Traits> kv(params, units, piece, places, end, thread);
    const ScoreMod<Score::kSoftcap> softcap(p, piece.batch, 0, 0);
    const auto load_kv = [&](int block, int stage) {
        if (block < end) {
            kv.load(ring + stage * Traits::kStageBytes, block);
        }
        cp_async_commit();
    };
    load_rows<Traits>(q_tile, p, units, piece, thread);
    zero_surplus<typename Traits::QkTile, Traits::kQkChunks, Traits::kQkValidChunks, Traits::kThreads>(
        q_tile, Traits::kRows, thread);
    FMHA_UNROLL
    for (int stage = 0; stage < Traits::kStages; ++stage) {
        zero_surplus<typename Traits::QkTile, Traits::kQkChunks, Traits::kQkValidChunks, Traits::kThreads>(
            ring + stage * Traits::kStageBytes, Traits::kBlockN, thread);
    }
    kv.begin(n_block);
    FMHA_UNROLL_1
    for (int stage = 0; stage < Traits::kStages - 1; ++stage) {
        load_kv(n_block + stage, stage);
    }
    uint32_t q_frag[Traits::kQInRegs ? Traits::kKSteps : 1][1][4];
    if constexpr (Traits::kQInRegs) {
        cp_async_wait<Traits::kStages - 2>();
        sync_cta();
        static_for<0, Traits::kKSteps>(
            [&](auto ks) { load_q<Traits, decltype(ks)::value>(q_frag[decltype(ks)::value], address.q); });
    }

    int stage = 0;
    FMHA_UNROLL_1
    for (; n_block < end; ++n_block) {
        cp_async_wait<Traits::kStages - 2>();
        kv.keep(n_block + Traits::kStages - 1);
        sync_cta();
        kv.fetch(n_block + Traits::kStages);
        load_kv(n_block + Traits::kStages - 1, stage == 0 ? Traits::kStages - 1 : stage - 1);
        const uint32_t offset = stage * Traits::kStageBytes;
        float s[1][Traits::kNTiles][4];
        FMHA_UNROLL
        for (int nt = 0; nt < Traits::kNTiles; ++nt) {
            s[0][nt][0] = s[0][nt][1] = s[0][nt][2] = s[0][nt][3] = 0.f;
        }
        static_for<0, Traits::kKSteps>([&](auto ks) {
            constexpr int kStep = decltype(ks)::value;
            auto& a = q_frag[Traits::kQInRegs ? kStep : 0];
            if constexpr (!Traits::kQInRegs) {
                load_q<Traits, kStep>(a, address.q);
            }
            qk_step<Traits, kStep>(s, a, address.k + offset);
        });
        modify_scores<Traits>(s, p, softcap, rows, units.seq, piece.batch,
                              n_block * Traits::kBlockN + warp_n * Traits::kWarpKeys, range.needs_mask(n_block), lane);
        float shrink[1][2];
        softmax.template step<true>(s, shrink, p.scale_log2);
        softmax.rescale(o, shrink);
        static_for<0, Traits::kWarpKeys / 16>(
            [&](auto ks) { pv_step<Traits, decltype(ks)::value>(o, s, address.v + offset); });
        stage = stage == Traits::kStages - 1 ? 0 : stage + 1;
    }
    cp_async_wait<0>();
}

template <class Traits>
FMHA_DEVICE void decode(const DecodeParams& params) {
    const FwdParams& p = params.fwd;
    const int thread = static_cast<int>(thread_idx());
    const int lane = thread % 32;
    const int warp_m = thread / 32 % Traits::kWarpsM;
    const int warp_n = thread / 32 / Traits::kWarpsM;

    // Shared memory: Q, then kStages x (K, V), at last a few words.
    const uint32_t q_tile = smem_base();
    const uint32_t ring = q_tile + Traits::kQBytes;
    const uint32_t scratch = q_tile + Traits::kSmemBytes - Traits::kScratchBytes;
    Worklist<Traits> work(params, scratch, thread);
    const Rendezvous<Traits> rendezvous{params, scratch, thread};

    while (!work.done()) {
        const SequenceUnits<Traits> units(p, work.batch);
        const int unit_steps = units.steps(work.block);
        const Piece piece = work.take(unit_steps);
        const DecodeRows<Traits> rows(p, units, piece, warp_m, lane);
        sync_cta();  // the piece before this one is out of shared memory
        float o[1][Traits::kVTiles][4];
        Softmax<1> softmax;
        compute_piece<Traits>(o, softmax, params, units, piece, rows, q_tile, thread);

        Partial<Traits> partial;
        FMHA_UNROLL
        for (int half = 0; half < 2; ++half) {
            float sum = softmax.row_sum[0][half];
            sum += shfl_xor(sum, 1);
            sum += shfl_xor(sum, 2);
            partial.peak[half] = softmax.row_max[0][half] * p.scale_log2;
            partial.sum[half] = sum;
        }
        sync_cta();  // all warps are done with the ring
        partial.exchange(o, ring, warp_m, warp_n, lane);
        if (rendezvous.complete(partial, piece, warp_m, warp_n, lane)) {
            partial.finish(p, units.seq, piece.batch, rows, warp_n, lane);
        }
        work.advance(p, unit_steps, units.blocks);
    }
}

}  // namespace fmha

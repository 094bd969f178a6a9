// SPDX-License-Identifier: Apache-2.0
// Which keys of which sequence a CTA works on.
//
// A unit is the rows that a CTA computes at a time: up to kRows pairs of a query and a head, of one sequence and KV
// head. The units of the batch lie one after the other, each as long as its key tiles, and every CTA takes an equal
// stretch. No plan is made beforehand: a CTA reads all lengths and finds its own stretch, so that a captured graph
// follows lengths that change.
#pragma once
#include <ptx/common.cuh>

#include "blocks/seqlen.cuh"
#include "decode/traits.cuh"

namespace fmha {

// The units of one sequence, the same for each of its KV heads.
template <class Traits>
struct SequenceUnits {
    SeqlenInfo seq;
    Band band;
    int group;   // query heads of a KV head
    int rows;    // queries times group
    int blocks;  // units of a KV head

    FMHA_DEVICE SequenceUnits(const FwdParams& p, int batch)
        : seq(p, batch),
          band(p, seq),
          group(p.heads_per_kv),
          rows(seq.q_len * group),
          blocks((rows + Traits::kRows - 1) / Traits::kRows) {}

    // The key tiles of a unit.
    FMHA_DEVICE KvRange range(int block) const {
        const int first = block * Traits::kRows;
        const int last = first + Traits::kRows < rows ? first + Traits::kRows - 1 : rows - 1;
        return KvRange(band, first / group, last / group + 1, Traits::kBlockN);
    }

    // Steps of a unit: one at least, because rows that see no key are written, too.
    FMHA_DEVICE int steps(int block) const {
        const KvRange keys = range(block);
        return keys.end - keys.begin > 1 ? keys.end - keys.begin : 1;
    }

    // Steps of a KV head.
    FMHA_DEVICE int head_steps() const {
        int sum = 0;
        FMHA_UNROLL_1
        for (int block = 0; block < blocks; ++block) {
            sum += steps(block);
        }
        return sum;
    }
};

// Sums of all threads before this one, and of all; the largest number of any.
struct CtaScan {
    int before;
    int total;
    int most;

    // `scratch`: 32 bytes of shared memory that nobody else uses meanwhile.
    FMHA_DEVICE CtaScan(int own, int largest, uint32_t scratch, int thread) {
        const int lane = thread % 32;
        int sum = own;
        FMHA_UNROLL
        for (int reach = 1; reach < 32; reach *= 2) {
            const int other = static_cast<int>(shfl_idx(static_cast<uint32_t>(sum), (lane - reach) & 31));
            sum += lane >= reach ? other : 0;
            const int more = static_cast<int>(shfl_xor(static_cast<uint32_t>(largest), reach));
            largest = more > largest ? more : largest;
        }
        if (lane == 31) {
            st_shared_u32(scratch + thread / 32 * 4, static_cast<uint32_t>(sum));
            st_shared_u32(scratch + 16 + thread / 32 * 4, static_cast<uint32_t>(largest));
        }
        sync_cta();
        const Vec4 sums = ld_shared_v4(scratch);
        const Vec4 all = ld_shared_v4(scratch + 16);
        before = sum - own;
        total = 0;
        most = 0;
        FMHA_UNROLL
        for (int warp = 0; warp < 4; ++warp) {
            before += warp < thread / 32 ? static_cast<int>(sums.x[warp]) : 0;
            total += static_cast<int>(sums.x[warp]);
            most = static_cast<int>(all.x[warp]) > most ? static_cast<int>(all.x[warp]) : most;
        }
    }
};

// A stretch of one unit, and the CTAs that have the rest of it.
struct Piece {
    int batch;
    int kv_head;
    int block;
    int first_step;  // within the unit
    int steps;
    int first_cta;  // of the unit
    int ctas;       // that share it
};

// The stretch of this CTA, piece by piece.
template <class Traits>
struct Worklist {
    int share;  // steps of a CTA
    int left;   // of this one
    // Where it stands: a step of a unit, and the step of all at which the unit begins.
    int batch = 0;
    int kv_head = 0;
    int block = 0;
    int step = 0;
    int unit_begin = 0;

    // Every thread has equally many sequences, one behind the other.
    FMHA_DEVICE Worklist(const DecodeParams& params, uint32_t scratch, int thread) {
        const FwdParams& p = params.fwd;
        const int heads_k = p.heads / p.heads_per_kv;
        const int each = (p.batch + Traits::kThreads - 1) / Traits::kThreads;
        const int first = thread * each;
        const int end = first + each < p.batch ? first + each : p.batch;
        int own = 0;
        int largest = 0;
        int steps = 0;
        FMHA_UNROLL_1
        for (int b = first; b < end; ++b) {
            steps = SequenceUnits<Traits>(p, b).head_steps();
            largest = steps > largest ? steps : largest;
            own += steps * heads_k;
        }
        const CtaScan scan(own, largest, scratch, thread);
        share = (scan.total + params.ctas - 1) / params.ctas;
        share = share > params.least_tiles ? share : params.least_tiles;
        if (share > scan.most && scan.most * heads_k * p.batch == scan.total) {
            // All are alike: whole heads, where that leaves few CTAs without work.
            const int whole = (share + scan.most - 1) / scan.most * scan.most;
            share = whole * 15 <= share * 16 ? whole : share;
        }
        const int cta = static_cast<int>(block_idx());
        const int begin = cta * share;  // fits: share * ctas is less than the steps of all and those of a unit
        left = scan.total - begin < share ? scan.total - begin : share;
        if (left <= 0) {
            return;
        }
        // The thread that has the sequence at `begin` tells the others.
        if (begin >= scan.before && begin < scan.before + own) {
            int from = scan.before;
            int b = first;
            if (each > 1) {
                FMHA_UNROLL_1
                for (;; ++b) {
                    steps = SequenceUnits<Traits>(p, b).head_steps();
                    if (begin < from + steps * heads_k) {
                        break;
                    }
                    from += steps * heads_k;
                }
            }
            st_shared_v4(scratch + 32, Vec4{{static_cast<uint32_t>(b), static_cast<uint32_t>(from),
                                             static_cast<uint32_t>(steps), 0}});
        }
        sync_cta();
        const Vec4 found = ld_shared_v4(scratch + 32);
        batch = static_cast<int>(found.x[0]);
        unit_begin = static_cast<int>(found.x[1]);
        const int head_steps = static_cast<int>(found.x[2]);
        kv_head = (begin - unit_begin) / head_steps;
        unit_begin += kv_head * head_steps;
        const SequenceUnits<Traits> units(p, batch);
        if (units.blocks > 1) {
            FMHA_UNROLL_1
            for (;; ++block) {
                const int unit_steps = units.steps(block);
                if (begin - unit_begin < unit_steps) {
                    break;
                }
                unit_begin += unit_steps;
            }
        }
        step = begin - unit_begin;
    }

    FMHA_DEVICE bool done() const { return left <= 0; }

    // The next piece, which lies in a unit of `unit_steps` steps.
    FMHA_DEVICE Piece take(int unit_steps) {
        Piece piece;
        piece.batch = batch;
        piece.kv_head = kv_head;
        piece.block = block;
        piece.first_step = step;
        piece.steps = unit_steps - step < left ? unit_steps - step : left;
        piece.first_cta = unit_begin / share;
        piece.ctas = (unit_begin + unit_steps - 1) / share - piece.first_cta + 1;
        left -= piece.steps;
        return piece;
    }

    // To the unit behind the one that was taken to its end.
    FMHA_DEVICE void advance(const FwdParams& p, int unit_steps, int blocks) {
        if (done()) {
            return;
        }
        unit_begin += unit_steps;
        step = 0;
        if (++block < blocks) {
            return;
        }
        block = 0;
        if (++kv_head < p.heads / p.heads_per_kv) {
            return;
        }
        kv_head = 0;
        do {  // sequences without queries have no units
            ++batch;
        } while (SequenceUnits<Traits>(p, batch).blocks == 0);
    }
};

}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// The results of those who shared the keys of a unit become one: of the warps of a CTA in shared memory, of CTAs in
// global memory. Maxima are of the scaled scores in log2 units, O is not divided by the sum yet.
#pragma once
#include <ptx/words.cuh>

#include "blocks/softmax.cuh"
#include "decode/rows.cuh"
#include "decode/traits.cuh"

namespace fmha {

// 2^(x - base); nothing has weight where there is no base.
FMHA_DEVICE float weight(float x, float base) { return x == kMinusInfinity ? 0.f : exp2_approx(x - base); }

// What a thread has of a unit: tiles warp_n, warp_n + kWarpsN, ... of O for its two rows, their maxima and sums.
template <class Traits>
struct Partial {
    float o[Traits::kOwnTiles][4];
    float peak[2];
    float sum[2];

    FMHA_DEVICE static constexpr bool has(int i, int warp_n) {
        return Traits::kVTiles % Traits::kWarpsN == 0 || i * Traits::kWarpsN + warp_n < Traits::kVTiles;
    }

    // Adds up over the warps that had different keys of the same rows.
    FMHA_DEVICE void exchange(const float (&all)[1][Traits::kVTiles][4], uint32_t smem, int warp_m, int warp_n,
                              int lane) {
        if constexpr (Traits::kWarpsN == 1) {
            FMHA_UNROLL
            for (int i = 0; i < Traits::kVTiles; ++i) {
                FMHA_UNROLL
                for (int c = 0; c < 4; ++c) {
                    o[i][c] = all[0][i][c];
                }
            }
        } else {
            constexpr int kWarpsN = Traits::kWarpsN;
            const uint32_t own = smem + warp_m * kWarpsN * Traits::kVTiles * 512;  // of the warps with these rows
            const uint32_t stats =
                smem + Traits::kWarps * Traits::kVTiles * 512 + (warp_m * 16 + lane / 4) * kWarpsN * 8;
            FMHA_UNROLL
            for (int vt = 0; vt < Traits::kVTiles; ++vt) {
                const float* x = all[0][vt];
                st_shared_v4(own + ((warp_n * Traits::kVTiles + vt) * 32 + lane) * 16,
                             Vec4{{to_bits(x[0]), to_bits(x[1]), to_bits(x[2]), to_bits(x[3])}});
            }
            if (lane % 4 == 0) {
                FMHA_UNROLL
                for (int half = 0; half < 2; ++half) {  // a row's maxima lie side by side, then its sums
                    const uint32_t at = stats + half * kWarpsN * 64 + warp_n * 4;
                    st_shared_u32(at, to_bits(peak[half]));
                    st_shared_u32(at + kWarpsN * 4, to_bits(sum[half]));
                }
            }
            sync_cta();
            float share[kWarpsN][2];
            FMHA_UNROLL
            for (int half = 0; half < 2; ++half) {
                Vec4 words[kWarpsN / 2];
                FMHA_UNROLL
                for (int i = 0; i < kWarpsN / 2; ++i) {
                    words[i] = ld_shared_v4(stats + half * kWarpsN * 64 + i * 16);
                }
                peak[half] = kMinusInfinity;
                FMHA_UNROLL
                for (int w = 0; w < kWarpsN; ++w) {
                    peak[half] = fmaxf(peak[half], from_bits(words[w / 4].x[w % 4]));
                }
                sum[half] = 0.f;
                FMHA_UNROLL
                for (int w = 0; w < kWarpsN; ++w) {
                    const int at = kWarpsN + w;
                    share[w][half] = weight(from_bits(words[w / 4].x[w % 4]), peak[half]);
                    sum[half] += share[w][half] * from_bits(words[at / 4].x[at % 4]);
                }
            }
            FMHA_UNROLL
            for (int i = 0; i < Traits::kOwnTiles; ++i) {
                o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
                if (has(i, warp_n)) {
                    FMHA_UNROLL
                    for (int w = 0; w < kWarpsN; ++w) {
                        const int vt = i * kWarpsN + warp_n;
                        add(i, ld_shared_v4(own + ((w * Traits::kVTiles + vt) * 32 + lane) * 16), share[w]);
                    }
                }
            }
        }
    }

    FMHA_DEVICE void store(float* slot, int warp_m, int warp_n, int lane) const {
        FMHA_UNROLL
        for (int i = 0; i < Traits::kOwnTiles; ++i) {
            if (has(i, warp_n)) {
                st_global_v4(fragment(slot, i, warp_m, warp_n, lane),
                             Vec4{{to_bits(o[i][0]), to_bits(o[i][1]), to_bits(o[i][2]), to_bits(o[i][3])}});
            }
        }
        if (warp_n == 0 && lane % 4 == 0) {
            FMHA_UNROLL
            for (int half = 0; half < 2; ++half) {
                float* at = stats(slot, warp_m, half, lane);
                st_global_f32(at, peak[half]);
                st_global_f32(at + 1, sum[half]);
            }
        }
    }

    // The sum of `count` slots, in their order. kAhead of them are on their way at a time.
    template <class Slot>
    FMHA_DEVICE void load(int count, int warp_m, int warp_n, int lane, const Slot& slot) {
        constexpr int kAhead = Traits::kOwnTiles <= 4 ? 4 : Traits::kOwnTiles <= 8 ? 2 : 1;
        peak[0] = peak[1] = kMinusInfinity;
        sum[0] = sum[1] = 0.f;
        FMHA_UNROLL
        for (int i = 0; i < Traits::kOwnTiles; ++i) {
            o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
        }
        FMHA_UNROLL_1
        for (int first = 0; first < count; first += kAhead) {
            float peaks[kAhead][2];
            float sums[kAhead][2];
            Vec4 tiles[kAhead][Traits::kOwnTiles];
            FMHA_UNROLL
            for (int a = 0; a < kAhead; ++a) {
                // Slots past the last count as empty: one in front of them is read instead and weighs nothing.
                float* from = slot(first + a < count ? first + a : first);
                FMHA_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const float* at = stats(from, warp_m, half, lane);
                    peaks[a][half] = ld_global_written_f32(at);
                    sums[a][half] = ld_global_written_f32(at + 1);
                }
                FMHA_UNROLL
                for (int i = 0; i < Traits::kOwnTiles; ++i) {
                    if (kAhead > 1 && has(i, warp_n)) {
                        tiles[a][i] = ld_global_v4(fragment(from, i, warp_m, warp_n, lane));
                    }
                }
            }
            FMHA_UNROLL
            for (int a = 0; a < kAhead; ++a) {
                if (first + a < count) {
                    float share[2];
                    include(peaks[a], sums[a], share);
                    FMHA_UNROLL
                    for (int i = 0; i < Traits::kOwnTiles; ++i) {
                        if (has(i, warp_n)) {
                            add(i,
                                kAhead > 1 ? tiles[a][i] : ld_global_v4(fragment(slot(first), i, warp_m, warp_n, lane)),
                                share);
                        }
                    }
                }
            }
        }
    }

    // Makes room for another result: its maxima and sums are included, what is there already is scaled. `share`: by
    // what the other's O is multiplied.
    FMHA_DEVICE void include(const float (&peaks)[2], const float (&sums)[2], float (&share)[2]) {
        FMHA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const float base = fmaxf(peak[half], peaks[half]);
            const float shrink = weight(peak[half], base);
            share[half] = weight(peaks[half], base);
            sum[half] = sum[half] * shrink + share[half] * sums[half];
            peak[half] = base;
            FMHA_UNROLL
            for (int i = 0; i < Traits::kOwnTiles; ++i) {
                o[i][half * 2] *= shrink;
                o[i][half * 2 + 1] *= shrink;
            }
        }
    }

    FMHA_DEVICE void add(int i, const Vec4& other, const float (&share)[2]) {
        FMHA_UNROLL
        for (int c = 0; c < 4; ++c) {
            o[i][c] += share[c / 2] * from_bits(other.x[c]);
        }
    }

    FMHA_DEVICE static float* fragment(float* slot, int i, int warp_m, int warp_n, int lane) {
        const int vt = i * Traits::kWarpsN + warp_n;
        return slot + ((warp_m * Traits::kVTiles + vt) * 32 + lane) * 4;
    }

    FMHA_DEVICE static float* stats(float* slot, int warp_m, int half, int lane) {
        return slot + Traits::kRows * Traits::kHeadDimV + (warp_m * 16 + half * 8 + lane / 4) * 2;
    }

    // A sink is a key without a value. Divides by the sum; rows that saw no key become 0. Writes O and the
    // log-sum-exp.
    FMHA_DEVICE void finish(const FwdParams& p, const SeqlenInfo& seq, int batch, const DecodeRows<Traits>& rows,
                            int warp_n, int lane) {
        constexpr float kLog2E = 1.44269504088896341f;
        constexpr float kLn2 = 0.693147180559945309f;
        FMHA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const DecodeRow& row = rows.row[half];
            if (!row.exists) {
                continue;
            }
            float factor = 1.f;
            if (p.sinks != nullptr) {
                const float sink = ld_global_f32(p.sinks + row.head) * kLog2E;
                const float base = fmaxf(peak[half], sink);
                const bool all = sink == -kMinusInfinity;  // it has all the weight: inf - inf would be NaN
                factor = all ? 0.f : weight(peak[half], base);
                sum[half] = all ? 1.f : sum[half] * factor + weight(sink, base);
                peak[half] = base;
            }
            const float inverse = sum[half] == 0.f ? 0.f : factor * rcp_approx(sum[half]);
            uint16_t* out = static_cast<uint16_t*>(p.o) + batch * p.o_stride.batch +
                            (seq.q_row + row.query) * p.o_stride.row + row.head * p.o_stride.head;
            FMHA_UNROLL
            for (int i = 0; i < Traits::kOwnTiles; ++i) {
                if (has(i, warp_n)) {
                    const int column = (i * Traits::kWarpsN + warp_n) * 8 + lane % 4 * 2;
                    st_global_u32(out + column, pack2<typename Traits::Element>(o[i][half * 2] * inverse,
                                                                                o[i][half * 2 + 1] * inverse));
                }
            }
            if (p.lse != nullptr && warp_n == 0 && lane % 4 == 0) {
                float* lse = p.lse + batch * p.lse_batch_stride + row.head * p.lse_head_stride + seq.q_row + row.query;
                st_global_f32(lse, sum[half] == 0.f ? kMinusInfinity : (peak[half] + log2_approx(sum[half])) * kLn2);
            }
        }
    }
};

// Completes a unit that several CTAs share. Whoever comes last of a group adds up its slots; where there are several
// groups, the last of these adds up theirs. The order of the sum is that of the keys, whoever computes it.
template <class Traits>
struct Rendezvous {
    const DecodeParams& params;
    uint32_t scratch;
    int thread;

    FMHA_DEVICE int slot_of(const Piece& piece, int index) const {
        return 2 * (piece.first_cta + index) + (index == 0 ? 1 : 0);
    }

    // Whether this CTA is the last of `count` to come.
    FMHA_DEVICE bool is_last(uint32_t* counter, int count) const {
        sync_cta();  // what the CTA wrote comes before the count
        if (thread == 0) {
            st_shared_u32(scratch, atomic_inc_acq_rel(counter, static_cast<uint32_t>(count) - 1));
        }
        sync_cta();
        return static_cast<int>(ld_shared_v4(scratch).x[0]) == count - 1;
    }

    // Whether `partial` is the whole unit now.
    FMHA_DEVICE bool complete(Partial<Traits>& partial, const Piece& piece, int warp_m, int warp_n, int lane) const {
        if (piece.ctas == 1) {
            return true;
        }
        const auto slot = [&](int index) {
            return params.partials + static_cast<int64_t>(slot_of(piece, index)) * Traits::kSlotFloats;
        };
        const int index = static_cast<int>(block_idx()) - piece.first_cta;
        const int group = piece.ctas <= 64 ? 8 : 16;
        // First the results of a group, a slot apart; then those of the groups, which are in the first slot of each.
        int own = index;
        int first = index / group * group;
        int count = piece.ctas - first < group ? piece.ctas - first : group;
        int apart = 1;
        uint32_t* counter = params.counters + slot_of(piece, first);
        FMHA_UNROLL_1
        for (;;) {
            partial.store(slot(own), warp_m, warp_n, lane);
            if (!is_last(counter, count)) {
                return false;
            }
            partial.load(count, warp_m, warp_n, lane, [&](int i) { return slot(first + i * apart); });
            if (apart == group || piece.ctas <= group) {
                return true;
            }
            own = first;
            first = 0;
            count = (piece.ctas + group - 1) / group;
            apart = group;
            counter = params.counters + 2 * params.ctas + slot_of(piece, 0);
            sync_cta();  // the first slot of the group is overwritten only when all warps have read it
        }
    }
};

}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// The two rows that a thread has of an m16 tile: pairs of a query and a head, their masks and scores. Thread layout as
// in mask.cuh.
#pragma once
#include "blocks/mask.cuh"
#include "blocks/score.cuh"
#include "decode/worklist.cuh"

namespace fmha {

struct DecodeRow {
    int query;
    int head;
    int begin;  // keys [begin, end) are in the band
    int end;
    float slope;  // ALiBi's, in units of the unscaled scores; 0: none
    bool exists;
};

template <class Traits>
struct DecodeRows {
    DecodeRow row[2];
    int diagonal;

    FMHA_DEVICE DecodeRows(const FwdParams& p, const SequenceUnits<Traits>& units, const Piece& piece, int warp_m,
                           int lane)
        : diagonal(units.band.diagonal) {
        FMHA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int index = piece.block * Traits::kRows + warp_m * 16 + half * 8 + lane / 4;
            DecodeRow& r = row[half];
            r.exists = index < units.rows;
            r.query = r.exists ? index / units.group : 0;  // rows past the last are computed and not stored
            r.head = piece.kv_head * units.group + (r.exists ? index - r.query * units.group : 0);
            r.begin = units.band.begin(r.query);
            r.end = units.band.end(r.query);
            r.slope = p.alibi_slopes == nullptr
                          ? 0.f
                          : ld_global_f32(p.alibi_slopes + piece.batch * static_cast<int64_t>(p.alibi_batch_stride) +
                                          r.head) /
                                p.scale;
        }
    }

    FMHA_DEVICE void add_alibi(float (&s)[1][Traits::kNTiles][4], int col0, int lane) const {
        FMHA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const float past = static_cast<float>(row[half].query + diagonal - col0 - 2 * (lane % 4));
            FMHA_UNROLL
            for (int nt = 0; nt < Traits::kNTiles; ++nt) {
                s[0][nt][half * 2] -= row[half].slope * fabsf(past - (nt * 8));
                s[0][nt][half * 2 + 1] -= row[half].slope * fabsf(past - (nt * 8 + 1));
            }
        }
    }

    FMHA_DEVICE void apply_band(float (&s)[1][Traits::kNTiles][4], int col0, int lane) const {
        const int first_col = col0 + 2 * (lane % 4);
        FMHA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int begin = row[half].begin;
            const int end = row[half].end;
            const uint32_t width = end > begin ? end - begin : 0;
            const uint32_t first = static_cast<uint32_t>(first_col - begin);
            FMHA_UNROLL
            for (int nt = 0; nt < Traits::kNTiles; ++nt) {
                FMHA_UNROLL
                for (int c = 0; c < 2; ++c) {
                    float& x = s[0][nt][half * 2 + c];
                    x = first + (nt * 8 + c) < width ? x : kMinusInfinity;
                }
            }
        }
    }

    // The bits of a row lie as for an accumulator whose 16 rows are queries of one head: word 4 * (query % 8) + lane %
    // 4 of the 16 queries, bits 4 * n + 2 * (query % 16 / 8) and the next for the n-th eight columns.
    FMHA_DEVICE void apply_packed(float (&s)[1][Traits::kNTiles][4], const FwdParams& p, const SeqlenInfo& seq,
                                  int batch, int col0, int lane) const {
        FMHA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const PackedMask mask(p, seq, batch, row[half].head);
            const int query = row[half].query;
            const uint32_t* from = mask.words + static_cast<int64_t>(query / 64) * mask.col_blocks * 128 +
                                   query % 64 / 16 * 32 + query % 8 * 4 + lane % 4;
            FMHA_UNROLL
            for (int nt = 0; nt < Traits::kNTiles; ++nt) {
                const int block = (col0 + nt * 8) / 64;
                const bool inside = query / 64 < mask.row_blocks && block < mask.col_blocks;
                const uint32_t bits = inside ? PackedMask::load(from + block * 128) : 0;
                const int first = (col0 + nt * 8) % 64 / 8 * 4 + query % 16 / 8 * 2;
                FMHA_UNROLL
                for (int c = 0; c < 2; ++c) {
                    float& x = s[0][nt][half * 2 + c];
                    x = bits >> (first + c) & 1 ? x : kMinusInfinity;
                }
            }
        }
    }
};

}  // namespace fmha

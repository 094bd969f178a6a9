// SPDX-License-Identifier: Apache-2.0
// Flash-attention forward for Hopper. One producer warp feeds rings of Q, K and V tiles through the copy engine and
// says which query tile comes next; two to four warpgroups of consumers own 64 query rows each and multiply with wgmma.
//
// A consumer issues the first product (Q K^T) of tile n together with the second product (P V) of tile n + 1, then does
// the softmax of tile n; tiles go right to left. The consumers take turns issuing, so that the softmax of one overlaps
// the products of another. A consumer whose rows see no key of a KV tile passes its turn. A CTA may work through
// several query tiles (a persistent kernel). Its producer then runs ahead by up to the length of a ring.
#pragma once
#include <ptx/sm90.cuh>
#include <ptx/wgmma.cuh>

#include "blocks/epilogue.cuh"
#include "blocks/lazy_softmax.cuh"
#include "blocks/scheduler.cuh"
#include "blocks/score.cuh"
#include "blocks/seqlen.cuh"
#include "blocks/tile_queue.cuh"
#include "forward/wgmma_packed.cuh"
#include "forward/wgmma_paged.cuh"
#include "forward/wgmma_smem.cuh"
#include "forward/wgmma_softcap.cuh"
#include "forward/wgmma_traits.cuh"
#include "params_sm90.h"

namespace fmha {

// A query tile: its coordinates, the lengths of its sequence, its first row and its range of KV tiles.
template <class Traits>
struct Work {
    TileCoord tile;
    SeqlenInfo seq;
    int row_begin;
    KvRange range;

    FMHA_DEVICE Work(const FwdParams& p, int index)
        : tile(schedule(p, index)),
          seq(p, tile.batch),
          row_begin(tile.m_block * Traits::kBlockM),
          range(Band(p, seq), row_begin,
                row_begin + Traits::kBlockM < seq.q_len ? row_begin + Traits::kBlockM : seq.q_len, Traits::kBlockN) {}

    // Varlen grids are cut for the longest sequence.
    FMHA_DEVICE bool exists() const { return row_begin < seq.q_len; }
};

// The warp that issues all copies. Lane 0 issues them; the other lanes stay with it because all 32 zero the surplus
// rows of V.
template <class Traits>
FMHA_DEVICE void produce(const FwdSm90Params& params, const SmemSm90<Traits>& smem, int lane) {
    const FwdTmaParams& maps = params.tma;
    const FwdParams& p = maps.fwd;
    RingPosition<Traits::kStages> ring;
    RingPosition<Traits::kQStages> q_ring;
    uint32_t landed_parity = 0;

    // One box per column group. Coordinates: column, row, head, batch.
    const auto load_groups = [&](uint32_t to, int group_bytes, int groups, const TensorMap* map, uint32_t bar, int row,
                                 int head, int batch) {
        for (int g = 0; g < groups; ++g) {
            tma_load_4d(to + g * group_bytes, map, bar, g * Traits::kGroupColumns, row, head, batch);
        }
    };
    // Lane 0: hands the query tile to every consumer and, where there are keys, loads that consumer's rows of Q.
    const auto assign = [&](const Assignment& work) {
        const int batch = p.cu_seqlens_q != nullptr ? 0 : work.batch;
        FMHA_UNROLL_1
        for (int consumer = 0; consumer < Traits::kConsumers; ++consumer) {
            const uint32_t full = smem.q_full(q_ring.stage, consumer);
            mbarrier_wait(smem.q_empty(q_ring.stage, consumer), q_ring.parity ^ 1);
            smem.assign(q_ring.stage, consumer, work);
            if (work.n_begin < work.n_end) {
                const int offset = consumer * 64;
                mbarrier_arrive_expect(full, Traits::kQkGroups * 64 * Traits::kRowBytes);
                load_groups(smem.q(q_ring.stage) + offset * Traits::kRowBytes, Traits::kQGroupBytes, Traits::kQkGroups,
                            &maps.q_map, full, work.q_row + work.row_begin + offset, work.head, batch);
            } else {
                mbarrier_arrive(full);
            }
        }
    };

    FMHA_UNROLL_1
    for (TileQueue queue(params); !queue.done(); queue.advance()) {
        const Work<Traits> work(p, queue.index);
        const int n_begin = work.range.begin;
        const TileWalk<Traits, Traits::kConsumers> walk(p, work.seq, work.tile.batch, work.tile.head, work.row_begin,
                                                        n_begin);
        const int n_end = walk.left_of(work.range.end) + 1;
        const auto has_keys = [&] { return n_begin < n_end; };  // a lambda: a variable would cost registers
        if (!work.exists() || !has_keys()) {
            queue.draw(lane);
        }
        if (!work.exists()) {
            continue;
        }
        const Assignment assignment{work.row_begin, work.tile.head, work.tile.batch, static_cast<int>(work.seq.q_row),
                                    work.seq.q_len, work.seq.k_len, n_begin,         n_end};
        // Where Q has one stage, the first K is loaded before Q: the load of Q must wait until the query tile before
        // has been read.
        const bool assign_first = Traits::kQStages > 1 || !has_keys();
        if (assign_first && lane == 0) {
            assign(assignment);
        }
        const int kv_head = work.tile.head / p.heads_per_kv;
        const int k_batch = p.cu_seqlens_k != nullptr ? 0 : work.tile.batch;
        // Past the end of a tensor the copy engine fills in zeros. Past the end of a sequence it copies what lies
        // there: rows of the next sequence or rows that are not in use.
        const bool ragged = p.cu_seqlens_k != nullptr || p.seqused_k != nullptr;
        const auto load_kv = [&](uint32_t to, int groups, const TensorMap* map, uint32_t bar, int row, int page) {
            if constexpr (Traits::kPaged) {
                load_pages<Traits>(p, to, groups, map, bar, page, row, work.seq.k_len, kv_head, work.tile.batch);
            } else {
                load_groups(to, Traits::kKvGroupBytes, groups, map, bar, row, kv_head, k_batch);
            }
        };
        const int first_row = static_cast<int>(work.seq.k_row);
        const auto load_v = [&](int n_block, int page, const RingPosition<Traits::kStages>& at) {
            const int valid_rows = work.seq.k_len - n_block * Traits::kBlockN;
            const bool dirty = ragged && valid_rows < Traits::kBlockN;
            const uint32_t v_tile = smem.v(at.stage);
            if (lane == 0) {
                const uint32_t v_full = dirty ? smem.v_landed() : smem.v_full(at.stage);
                mbarrier_wait(smem.v_empty(at.stage), at.parity ^ 1);
                mbarrier_arrive_expect(v_full, Traits::kVBytes);
                load_kv(v_tile, Traits::kVGroups, &maps.v_map, v_full, first_row + n_block * Traits::kBlockN, page);
            }
            if (dirty) {  // 0 * NaN is NaN: rows past the length are zeroed before a consumer multiplies by them
                sync_warp();
                mbarrier_wait(smem.v_landed(), landed_parity);
                landed_parity ^= 1;
                for (int g = 0; g < Traits::kVGroups; ++g) {
                    const uint32_t group = v_tile + g * Traits::kKvGroupBytes;
                    for (int byte = valid_rows * Traits::kRowBytes + lane * kChunkBytes; byte < Traits::kKvGroupBytes;
                         byte += 32 * kChunkBytes) {
                        st_shared_v4(group + byte, Vec4{{0, 0, 0, 0}});
                    }
                }
                fence_async_shared();
                sync_warp();
                if (lane == 0) {
                    mbarrier_arrive(smem.v_full(at.stage));
                }
            }
        };

        // V is loaded one tile behind K, in the order of the products: a V buffer becomes free later than a K buffer,
        // and the load of K must not wait for it.
        int n_block = n_end - 1;
        int page_before = 0;
        int walked = n_end;  // the tile whose K was loaded last; with packed masks not always n_block + 1
        FMHA_UNROLL_1
        for (;;) {
            const bool k_left = n_block >= n_begin;
            const int after = k_left ? walk.left_of(n_block) : n_block;
            int page = 0;  // of the tile's first row; looked up before the wait for a free buffer
            if constexpr (Traits::kPaged) {
                page = k_left ? page_of(p, first_row + n_block * Traits::kBlockN, work.seq.k_len, work.tile.batch) : 0;
            }
            if (k_left && after < n_begin) {
                queue.draw(lane);
            }
            if (k_left && lane == 0) {
                const uint32_t k_full = smem.k_full(ring.stage);
                mbarrier_wait(smem.k_empty(ring.stage), ring.parity ^ 1);
                if constexpr (Traits::kPacked) {
                    st_shared_v4(smem.next_tile(ring.stage), Vec4{{static_cast<uint32_t>(after), 0, 0, 0}});
                }
                mbarrier_arrive_expect(k_full, Traits::kKBytes);
                load_kv(smem.k(ring.stage), Traits::kQkGroups, &maps.k_map, k_full,
                        first_row + n_block * Traits::kBlockN, page);
                if (!assign_first && n_block == n_end - 1) {
                    assign(assignment);
                }
            }
            const int before = Traits::kPacked ? walked : n_block + 1;
            if (before < n_end) {
                load_v(before, page_before, ring.previous());
            }
            if (!k_left) {
                break;
            }
            ring.advance();
            page_before = page;
            walked = n_block;
            n_block = after;
        }
        q_ring.advance();
    }
    if (lane == 0) {
        assign(Assignment{-1, 0, 0, 0, 0, 0, 0, 0});
    }
}

// A warpgroup of consumers: 64 rows of every query tile of the CTA.
template <class Traits>
FMHA_DEVICE void consume(const FwdSm90Params& params, const SmemSm90<Traits>& smem, int consumer, int warp, int lane) {
    using Element = typename Traits::Element;
    const FwdParams& p = params.tma.fwd;

    // Accumulators in fragment order (mask.cuh), and flat as wgmma names them.
    float o[1][Traits::kVTiles][4];
    float s[1][Traits::kNTiles][4];
    auto& o_flat = reinterpret_cast<float (&)[Traits::kVTiles * 4]>(o);
    auto& s_flat = reinterpret_cast<float (&)[Traits::kNTiles * 4]>(s);
    uint32_t probs[Traits::kBlockN / 16][4];  // P as the operand of the second product

    const MatrixDescriptor<Traits> q_matrix(smem.q(0) + consumer * 64 * Traits::kRowBytes, 16);
    const MatrixDescriptor<Traits> k_matrix(smem.k(0), 16);
    const MatrixDescriptor<Traits> v_matrix(smem.v(0), Traits::kKvGroupBytes);

    RingPosition<Traits::kStages> ring;
    RingPosition<Traits::kQStages> q_ring;
    const auto issue_qk = [&](int stage) {
        uint32_t q_at = q_ring.stage * (Traits::kQBytes / 16);
        if constexpr (Traits::kKSteps > 8) {  // more descriptors than uniform registers: each is made where it is used
            opaque(q_at);
        }
        const uint32_t k_at = stage * (Traits::kKBytes / 16);
        FMHA_UNROLL
        for (int ks = 0; ks < Traits::kKSteps; ++ks) {
            const int group = ks / Traits::kStepsPerGroup;
            const int column = ks % Traits::kStepsPerGroup * 32;
            Wgmma<Element, Traits::kBlockN>::ss(
                s_flat, q_matrix.at(q_at + (group * Traits::kQGroupBytes + column) / 16),
                k_matrix.at(k_at + (group * Traits::kKvGroupBytes + column) / 16), ks != 0);
        }
        wgmma_commit();
    };
    const auto issue_pv = [&](int stage) {
        const uint32_t v_at = stage * (Traits::kVBytes / 16);
        FMHA_UNROLL
        for (int ks = 0; ks < Traits::kBlockN / 16; ++ks) {
            Wgmma<Element, Traits::kHeadDimV>::rs_trans(o_flat, probs[ks], v_matrix.at(v_at + ks * Traits::kRowBytes),
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

    // Named barrier 1 + c opens when it is the turn of consumer c to issue products. The last consumer lets the first
    // begin.
    const auto wait_for_turn = [&] { named_sync(1 + consumer, 256); };
    const auto pass_turn = [&] { named_arrive(1 + (consumer + 1 == Traits::kConsumers ? 0 : consumer + 1), 256); };
    if (consumer == Traits::kConsumers - 1) {
        pass_turn();
    }

    // The KV tile that is loaded after the present one, whose K has landed. Lane 0 alone reads its number, because it
    // also releases the stage.
    const auto tile_after = [&](int n_block) {
        if constexpr (Traits::kPacked) {
            const int next = lane == 0 ? static_cast<int>(ld_shared_v4(smem.next_tile(ring.stage)).x[0]) : 0;
            return warp_uniform(next);
        } else {
            return n_block - 1;
        }
    };

    // Passes over a KV tile that only other consumers need: keeps the order of turns and releases the stage. Returns
    // the next tile.
    const auto pass_over = [&](int n_block) {
        mbarrier_wait(smem.k_full(ring.stage), ring.parity);
        const int after = tile_after(n_block);
        wait_for_turn();
        pass_turn();
        release(smem.k_empty(ring.stage));
        mbarrier_wait(smem.v_full(ring.stage), ring.parity);
        release(smem.v_empty(ring.stage));
        ring.advance();
        return after;
    };

    FMHA_UNROLL_1
    for (;; q_ring.advance()) {
        mbarrier_wait(smem.q_full(q_ring.stage, consumer), q_ring.parity);
        const Assignment work = smem.assigned(q_ring.stage, consumer, lane);
        if (work.row_begin < 0) {
            break;
        }
        const SeqlenInfo seq = work.seqlens();
        const Band band(p, seq);
        const int row_begin = work.row_begin + consumer * 64;
        const int warp_row = row_begin + warp * 16;
        KvRange range(band, row_begin, row_begin + 64 < seq.q_len ? row_begin + 64 : seq.q_len, Traits::kBlockN);
        const bool idle = row_begin >= seq.q_len || range.begin >= range.end;
        // Packed masks: the range shrinks to the tiles from the first to the last that have a bit for these rows.
        const TileWalk<Traits, 1> own(p, seq, work.batch, work.head, row_begin, range.begin);
        int leftmost = range.begin;
        if constexpr (Traits::kPacked) {
            range.end = idle ? 0 : own.left_of(range.end) + 1;
            leftmost = range.begin < range.end ? own.leftmost() : 0;
        }
        const bool nothing = idle || range.begin >= range.end;
        range.begin = nothing ? work.n_begin : range.begin;
        range.end = nothing ? work.n_begin : range.end;
        const ScoreMod<Traits::kScore> score(p, work.batch, work.head, band.diagonal);
        CappedSoftmax<Traits::kHeadroom> softmax;
        if (p.sinks != nullptr) {
            softmax.add_sink(ld_global_f32(p.sinks + work.head), p.scale_log2, lane);
        }
        FMHA_UNROLL
        for (int vt = 0; vt < Traits::kVTiles; ++vt) {
            o[0][vt][0] = o[0][vt][1] = o[0][vt][2] = o[0][vt][3] = 0.f;
        }

        int n_block = work.n_end - 1;
        FMHA_UNROLL_1
        for (; n_block >= range.end;) {
            n_block = pass_over(n_block);
        }
        if (range.begin < range.end) {
            const int begin = range.begin;
            const int full_begin = range.full_begin > begin ? range.full_begin : begin;
            const int full_end = range.full_end > begin ? range.full_end : begin;
            float shrink[1][2];
            MaskRows<Traits> mask(own, warp * 32 + lane);
            int after = begin - 1;  // packed masks: the next tile that is loaded
            bool more = false;      // packed masks: whether a tile still to come has a bit for these rows
            // Runs under the first product of a tile: takes over the mask words of this tile and loads those of the
            // next.
            const auto look_ahead = [&] {
                if constexpr (Traits::kPacked) {
                    mask.step();
                    after = tile_after(n_block);
                    more = after >= leftmost;
                    if (more) {
                        mask.load(after);
                    }
                }
            };

            // S of one tile becomes P, still in S's registers.
            const auto softmax_step = [&](auto masked) {
                constexpr bool kMasked = decltype(masked)::value;
                if constexpr (Traits::kScore == Score::kSoftcap && !kMasked) {
                    return softmax.step_capped(s, shrink, score.tanh_scale, p.scale_log2);
                } else if constexpr (Traits::kScore == Score::kSoftcap) {
                    apply_softcap(s, score.tanh_scale);
                } else {
                    score.apply(s, warp_row, n_block * Traits::kBlockN, lane);
                }
                if constexpr (Traits::kPacked) {
                    mask.apply(s, n_block);
                }
                if (kMasked && (!Traits::kPacked || range.needs_mask(n_block))) {
                    apply_band_sides(s, band, n_block >= range.full_end, n_block < range.full_begin, warp_row,
                                     n_block * Traits::kBlockN, lane);
                }
                return softmax.template step<kMasked>(s, shrink, p.scale_log2);
            };
            const auto release_qk = [&](int stage) {
                release(smem.k_empty(stage));
                if (Traits::kPacked ? !more : n_block == begin) {
                    release(smem.q_empty(q_ring.stage, consumer));
                }
            };

            // First tile: nothing to multiply with V yet.
            if constexpr (Traits::kPacked) {
                mask.load(n_block);
            }
            mbarrier_wait(smem.k_full(ring.stage), ring.parity);
            wait_for_turn();
            pin(s_flat);
            wgmma_fence();
            issue_qk(ring.stage);
            pass_turn();
            look_ahead();
            wgmma_wait<0>();
            pin(s_flat);
            release_qk(ring.stage);
            if (Traits::kPacked || range.needs_mask(n_block)) {
                softmax_step(Bool<true>{});
            } else {
                softmax_step(Bool<false>{});
            }
            pack_probs();
            n_block = Traits::kPacked ? after : n_block - 1;

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
                look_ahead();
                wgmma_wait<1>();
                pin(s_flat);
                release_qk(ring.stage);
                const bool rescale = softmax_step(masked);
                wgmma_wait<0>();  // only now may O and P be touched
                pin(o_flat);
                release(smem.v_empty(previous.stage));
                if (rescale) {
                    softmax.rescale(o, shrink);
                }
                pack_probs();
            };
            if constexpr (Traits::kPacked) {
                FMHA_UNROLL_1
                for (; more; n_block = after) {
                    step(Bool<true>{});
                }
            } else {
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
            }

            mbarrier_wait(smem.v_full(ring.stage), ring.parity);
            pin(o_flat);
            wgmma_fence();
            issue_pv(ring.stage);
            wgmma_wait<0>();
            pin(o_flat);
            release(smem.v_empty(ring.stage));
            ring.advance();
        } else {
            release(smem.q_empty(q_ring.stage, consumer));
        }
        FMHA_UNROLL_1
        for (; n_block >= work.n_begin;) {
            n_block = pass_over(n_block);
        }

        softmax.finish(o);
        uint16_t* out = static_cast<uint16_t*>(p.o) + work.batch * p.o_stride.batch + seq.q_row * p.o_stride.row +
                        work.head * p.o_stride.head;
        store_rows<Element>(o, out, p.o_stride.row, warp_row, seq.q_len, lane);
        if (p.lse != nullptr) {
            float* lse = p.lse + work.batch * p.lse_batch_stride + work.head * p.lse_head_stride + seq.q_row;
            store_lse(softmax, lse, p.scale_log2, warp_row, seq.q_len, lane);
        }
    }
}

template <class Traits>
FMHA_DEVICE void fwd_sm90(const FwdSm90Params& params) {
    const int thread = static_cast<int>(thread_idx());
    const int warpgroup = warp_uniform(thread / 128);
    const SmemSm90<Traits> smem{smem_base_constant()};
    if (thread == 0) {
        tma_prefetch_map(&params.tma.q_map);
        tma_prefetch_map(&params.tma.k_map);
        tma_prefetch_map(&params.tma.v_map);
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

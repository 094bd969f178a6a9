// SPDX-License-Identifier: Apache-2.0
// K and V tiles of one KV head, from tensors or from a pool of pages of any size.
#pragma once
#include <ptx/words.cuh>

#include "blocks/paged_kv.cuh"
#include "decode/worklist.cuh"

namespace fmha {

// Where a token lies in a pool whose pages hold any number of tokens.
struct AnyPages {
    int size;
    int multiplier;
    int shift;

    FMHA_DEVICE explicit AnyPages(const DecodeParams& p)
        : size(p.page_size), multiplier(p.page_multiplier), shift(p.page_shift) {}
    FMHA_DEVICE int page(int token) const {
        const int64_t product = static_cast<int64_t>(2 * token + 1) * multiplier;
        return static_cast<int>(product >> 32) >> shift;
    }
};

// One tile of K or of V: as TileCopy, but where a row lies in the pool is read from shared memory, 16 bytes a row:
// first the offset of K's row in bytes, then that of V's.
template <int kRows, class Tile, int kValidChunks, int kThreads>
struct PooledRows {
    static constexpr int kRowsPerPass = rows_per_pass(kThreads, kValidChunks);

    const unsigned char* source;  // this thread's chunk of the pool's first row
    int row;
    int chunk;

    FMHA_DEVICE PooledRows(const void* base, const Strides& stride, int kv_head, int thread)
        : row(thread / kValidChunks), chunk(thread % kValidChunks) {
        source = static_cast<const unsigned char*>(base) + kv_head * stride.head * 2 + chunk * kChunkBytes;
    }

    FMHA_DEVICE void copy(uint32_t smem, int done, uint32_t low, uint32_t high, bool inside) const {
        const int64_t offset = static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low);
        cp_async_16(smem + Tile::offset(row + done, chunk), source + offset, inside);
    }
};

// The tiles of a piece. Those in pages are looked up a tile before they are copied, a key a thread: `fetch` asks for
// the page, `keep` puts the places of a tile into shared memory before the barrier behind which `load` copies the tile.
template <class Traits, bool kPaged = Traits::kPaged>
struct DecodeKv;

template <class Traits>
struct DecodeKv<Traits, false> {
    KvSource<Traits> kv;
    int k_len;

    FMHA_DEVICE DecodeKv(const DecodeParams& params, const SequenceUnits<Traits>& units, const Piece& piece, uint32_t,
                         int, int thread)
        : kv(params.fwd, units.seq, piece.batch, piece.kv_head, thread), k_len(units.seq.k_len) {}

    FMHA_DEVICE void begin(int) {}
    FMHA_DEVICE void fetch(int) {}
    FMHA_DEVICE void keep(int) {}
    FMHA_DEVICE void load(uint32_t smem, int n_block) const { kv.load(smem, n_block, k_len); }
};

template <class Traits>
struct DecodeKv<Traits, true> {
    PooledRows<Traits::kBlockN, typename Traits::QkTile, Traits::kQkValidChunks, Traits::kThreads> k;
    PooledRows<Traits::kBlockN, typename Traits::VTile, Traits::kVChunks, Traits::kThreads> v;
    const DecodeParams& params;
    const int32_t* table;  // the pages of this sequence
    uint32_t slots;
    int k_len;
    int end;  // of the piece, in tiles
    int thread;
    int32_t entry = 0;

    FMHA_DEVICE DecodeKv(const DecodeParams& params_, const SequenceUnits<Traits>& units, const Piece& piece,
                         uint32_t slots_, int end_, int thread_)
        : k(params_.fwd.k, params_.fwd.k_stride, piece.kv_head, thread_),
          v(params_.fwd.v, params_.fwd.v_stride, piece.kv_head, thread_),
          params(params_),
          table(params_.fwd.page_table + piece.batch * params_.fwd.page_table_stride),
          slots(slots_),
          k_len(units.seq.k_len),
          end(end_),
          thread(thread_) {}

    FMHA_DEVICE uint32_t slot(int n_block) const { return slots + n_block % Traits::kPlaceSlots * Traits::kPlaceBytes; }

    // Asks for the page of this thread's key of a tile. Entries past the sequence may be anything and are not read.
    FMHA_DEVICE void fetch(int n_block) {
        const int token = n_block * Traits::kBlockN + thread;
        const bool wanted = n_block < end && thread < Traits::kBlockN && token < k_len;
        entry = wanted ? ld_global_s32(table + AnyPages(params).page(token)) : 0;
    }

    FMHA_DEVICE void keep(int n_block) const {
        if (thread < Traits::kBlockN) {
            const AnyPages pages(params);
            const int token = n_block * Traits::kBlockN + thread;
            const int row = token - pages.page(token) * pages.size;
            const Strides& of_k = params.fwd.k_stride;
            const Strides& of_v = params.fwd.v_stride;
            const uint64_t in_k = static_cast<uint64_t>(entry * of_k.batch + row * of_k.row) * 2;
            const uint64_t in_v = static_cast<uint64_t>(entry * of_v.batch + row * of_v.row) * 2;
            st_shared_v4(slot(n_block) + thread * 16,
                         Vec4{{static_cast<uint32_t>(in_k), static_cast<uint32_t>(in_k >> 32),
                               static_cast<uint32_t>(in_v), static_cast<uint32_t>(in_v >> 32)}});
        }
    }

    // Looks up the tiles that are copied first, and asks for the next.
    FMHA_DEVICE void begin(int n_block) {
        FMHA_UNROLL_1
        for (int i = 0; i < Traits::kStages - 1; ++i) {
            fetch(n_block + i);
            keep(n_block + i);
        }
        fetch(n_block + Traits::kStages - 1);
        sync_cta();
    }

    FMHA_DEVICE void load(uint32_t smem, int n_block) const {
        constexpr bool kAlike = Traits::kQkValidChunks == Traits::kVChunks;  // a thread has the same rows of K and V
        const uint32_t places = slot(n_block);
        const int rows_left = k_len - n_block * Traits::kBlockN;
        if (k.row < k.kRowsPerPass) {
            FMHA_UNROLL
            for (int done = 0; done < Traits::kBlockN; done += k.kRowsPerPass) {
                if (Traits::kBlockN % k.kRowsPerPass == 0 || k.row + done < Traits::kBlockN) {
                    const Vec4 at = ld_shared_v4(places + (k.row + done) * 16);
                    const bool inside = k.row + done < rows_left;
                    k.copy(smem, done, at.x[0], at.x[1], inside);
                    if constexpr (kAlike) {
                        v.copy(smem + Traits::kKBytes, done, at.x[2], at.x[3], inside);
                    }
                }
            }
        }
        if (!kAlike && v.row < v.kRowsPerPass) {
            FMHA_UNROLL
            for (int done = 0; done < Traits::kBlockN; done += v.kRowsPerPass) {
                if (Traits::kBlockN % v.kRowsPerPass == 0 || v.row + done < Traits::kBlockN) {
                    const Vec4 at = ld_shared_v4(places + (v.row + done) * 16);
                    v.copy(smem + Traits::kKBytes, done, at.x[2], at.x[3], v.row + done < rows_left);
                }
            }
        }
    }
};

}  // namespace fmha

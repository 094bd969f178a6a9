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

// One tile of K or of V: as TileCopy, but every row's page comes from `pages` in shared memory, which begin with that
// of the tile's first row.
template <int kRows, class Tile, int kValidChunks, int kThreads>
struct PageRows {
    static constexpr int kRowsPerPass = rows_per_pass(kThreads, kValidChunks);

    const uint16_t* source;  // this thread's chunk of row 0 of page 0
    Strides stride;
    int row;
    int chunk;

    FMHA_DEVICE PageRows(const void* base, const Strides& stride_, int kv_head, int thread)
        : stride(stride_), row(thread / kValidChunks), chunk(thread % kValidChunks) {
        source = static_cast<const uint16_t*>(base) + kv_head * stride.head + chunk * kChunkElements;
    }

    FMHA_DEVICE void load(uint32_t smem, uint32_t pages, const AnyPages& place, int first_row, int end_row) const {
        if (row >= kRowsPerPass) {
            return;
        }
        const int first_page = place.page(first_row);
        FMHA_UNROLL
        for (int done = 0; done < kRows; done += kRowsPerPass) {
            if (kRows % kRowsPerPass == 0 || row + done < kRows) {
                const int token = first_row + row + done;
                const int page = place.page(token);
                const bool inside = token < end_row;
                const int entry = inside ? static_cast<int>(ld_shared_u32(pages + (page - first_page) * 4)) : 0;
                const uint16_t* from = source + entry * stride.batch + (token - page * place.size) * stride.row;
                cp_async_16(smem + Tile::offset(row + done, chunk), from, inside);
            }
        }
    }
};

// The tiles of a piece. Those in pages are looked up a tile before they are copied: `fetch` asks for the entries of a
// tile, `keep` puts them into shared memory before the barrier behind which `load` copies the tile.
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
    PageRows<Traits::kBlockN, typename Traits::QkTile, Traits::kQkValidChunks, Traits::kThreads> k;
    PageRows<Traits::kBlockN, typename Traits::VTile, Traits::kVChunks, Traits::kThreads> v;
    AnyPages place;
    const int32_t* table;  // the pages of this sequence
    uint32_t slots;
    int k_len;
    int end;  // of the piece, in tiles
    int thread;
    int32_t entry = 0;

    FMHA_DEVICE DecodeKv(const DecodeParams& params, const SequenceUnits<Traits>& units, const Piece& piece,
                         uint32_t slots_, int end_, int thread_)
        : k(params.fwd.k, params.fwd.k_stride, piece.kv_head, thread_),
          v(params.fwd.v, params.fwd.v_stride, piece.kv_head, thread_),
          place(params),
          table(params.fwd.page_table + piece.batch * params.fwd.page_table_stride),
          slots(slots_),
          k_len(units.seq.k_len),
          end(end_),
          thread(thread_) {}

    FMHA_DEVICE uint32_t slot(int n_block) const {
        return slots + n_block % Traits::kPageSlots * (Traits::kPageSlotWords * 4);
    }

    // Asks for this thread's entry of a tile. Entries past the sequence may be anything and are not read.
    FMHA_DEVICE void fetch(int n_block) {
        const int last = (n_block + 1) * Traits::kBlockN < k_len ? (n_block + 1) * Traits::kBlockN - 1 : k_len - 1;
        const int page = place.page(n_block * Traits::kBlockN) + thread;
        entry = n_block < end && page <= place.page(last) ? ld_global_s32(table + page) : 0;
    }

    FMHA_DEVICE void keep(int n_block) const {
        if (thread < Traits::kPageSlotWords) {
            st_shared_u32(slot(n_block) + thread * 4, static_cast<uint32_t>(entry));
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
        const int first_row = n_block * Traits::kBlockN;
        k.load(smem, slot(n_block), place, first_row, k_len);
        v.load(smem + Traits::kKBytes, slot(n_block), place, first_row, k_len);
    }
};

}  // namespace fmha

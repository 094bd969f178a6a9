// SPDX-License-Identifier: Apache-2.0
// Copies new keys and values to their places in a cache. It copies bytes, so one kernel serves every dtype.
#pragma once
#include <ptx/bytes.cuh>
#include <ptx/common.cuh>

namespace fmha {

// Byte strides of one tensor seen as [batch or page, row, head, dim]; dim is contiguous.
struct ByteStrides {
    int64_t batch;
    int64_t row;
    int64_t head;
};

// Plain C++, filled by the host. A token's place is given by `slots`, or follows from the lengths of the sequences.
struct AppendParams {
    const unsigned char* k_new;  // [sequences, per_sequence, heads, ..], or tokens in a row
    const unsigned char* v_new;
    unsigned char* k_cache;  // [pages, page_size, heads, ..]
    unsigned char* v_cache;
    const int64_t* slots;       // [tokens]: page * page_size + row; anything else is nowhere. null: by lengths
    const int32_t* cu_seqlens;  // [sequences + 1]; null: each has per_sequence tokens
    const int32_t* lengths;     // [sequences] keys that are there already
    const int32_t* page_table;  // [sequences, ..]; null: a sequence has the page of its own number
    ByteStrides k_new_stride;
    ByteStrides v_new_stride;
    ByteStrides k_cache_stride;
    ByteStrides v_cache_stride;
    int64_t table_stride;  // entries
    int32_t tokens;
    int32_t sequences;
    int32_t per_sequence;
    int32_t heads;
    int32_t k_chunks;  // 16-byte chunks of a head
    int32_t v_chunks;
    int32_t pages;
    int32_t page_size;
    int32_t room;  // keys that a sequence can have
    int32_t unused;
};

static_assert(sizeof(AppendParams) == 208, "AppendParams and its Python mirror must agree.");

template <int kWarps_>
struct AppendTraits {
    static constexpr int kWarps = kWarps_;
    static constexpr int kDepth = 8;  // chunks of a lane on their way at a time
    static constexpr int kSmemBytes = 0;
};

// Where a token comes from and where it goes.
struct TokenPlace {
    int sequence;
    int index;  // within its sequence
    int page = -1;
    int row = 0;

    FMHA_DEVICE TokenPlace(const AppendParams& p, int token) {
        sequence = p.per_sequence == 0 ? 0 : token / p.per_sequence;
        index = p.per_sequence == 0 ? token : token - sequence * p.per_sequence;
        if (p.slots != nullptr) {
            const int32_t* halves = reinterpret_cast<const int32_t*>(p.slots + token);
            const uint32_t slot = static_cast<uint32_t>(ld_global_s32(halves));
            const bool inside = ld_global_s32(halves + 1) == 0 &&
                                slot < static_cast<uint32_t>(p.pages) * static_cast<uint32_t>(p.page_size);
            page = inside ? static_cast<int>(slot / static_cast<uint32_t>(p.page_size)) : -1;
            row = static_cast<int>(slot) - page * p.page_size;
            return;
        }
        int owner = sequence;
        int at = index;
        if (p.cu_seqlens != nullptr) {  // the last sequence that begins at the token or before it
            int low = 0;
            int high = p.sequences;
            while (high - low > 1) {
                const int middle = (low + high) / 2;
                const bool before = ld_global_s32(p.cu_seqlens + middle) <= token;
                low = before ? middle : low;
                high = before ? high : middle;
            }
            owner = low;
            at = token - ld_global_s32(p.cu_seqlens + owner);
            if (token >= ld_global_s32(p.cu_seqlens + p.sequences)) {
                return;  // tokens behind all sequences
            }
        }
        const int position = ld_global_s32(p.lengths + owner) + at;
        if (position < 0 || position >= p.room) {
            return;
        }
        const int entry = position / p.page_size;
        row = position - entry * p.page_size;
        page = p.page_table == nullptr ? owner : ld_global_s32(p.page_table + owner * p.table_stride + entry);
        page = page >= 0 && page < p.pages ? page : -1;
    }
};

// A warp has a token.
template <class Traits>
FMHA_DEVICE void append_kv(const AppendParams& p) {
    const int lane = static_cast<int>(thread_idx()) % 32;
    const int token = static_cast<int>(block_idx()) * Traits::kWarps + static_cast<int>(thread_idx()) / 32;
    if (token >= p.tokens) {
        return;
    }
    const TokenPlace place(p, token);
    if (place.page < 0) {
        return;
    }
    const unsigned char* k_from = p.k_new + place.sequence * p.k_new_stride.batch + place.index * p.k_new_stride.row;
    const unsigned char* v_from = p.v_new + place.sequence * p.v_new_stride.batch + place.index * p.v_new_stride.row;
    unsigned char* k_to = p.k_cache + place.page * p.k_cache_stride.batch + place.row * p.k_cache_stride.row;
    unsigned char* v_to = p.v_cache + place.page * p.v_cache_stride.batch + place.row * p.v_cache_stride.row;
    const int k_all = p.heads * p.k_chunks;
    const int all = k_all + p.heads * p.v_chunks;
    for (int first = lane; first < all; first += 32 * Traits::kDepth) {
        Vec4 chunk[Traits::kDepth];
        unsigned char* to[Traits::kDepth];
        FMHA_UNROLL
        for (int i = 0; i < Traits::kDepth; ++i) {
            const int at = first + i * 32;
            to[i] = nullptr;
            if (at < k_all) {
                const int head = at / p.k_chunks;
                const int bytes = (at - head * p.k_chunks) * 16;
                chunk[i] = ld_global_nc_v4(k_from + head * p.k_new_stride.head + bytes);
                to[i] = k_to + head * p.k_cache_stride.head + bytes;
            } else if (at < all) {
                const int head = (at - k_all) / p.v_chunks;
                const int bytes = (at - k_all - head * p.v_chunks) * 16;
                chunk[i] = ld_global_nc_v4(v_from + head * p.v_new_stride.head + bytes);
                to[i] = v_to + head * p.v_cache_stride.head + bytes;
            }
        }
        FMHA_UNROLL
        for (int i = 0; i < Traits::kDepth; ++i) {
            if (to[i] != nullptr) {
                st_global_v4(to[i], chunk[i]);
            }
        }
    }
}

}  // namespace fmha

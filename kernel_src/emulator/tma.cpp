// SPDX-License-Identifier: Apache-2.0
// The copy engine: boxes of a tensor to shared memory and back. The tensor map is the emulator's own,
// written by the host's tensor-map encoder with the meaning of the driver's.
//
// A load lands when its mbarrier's phase ends. A store reads shared memory at the wait that names its group, and
// reaches global memory at the wait for that or, without one, when the whole grid is done.
#include <string.h>

#include <algorithm>
#include <iterator>

#include "state.h"

namespace fmha {
namespace emu {

// Mirrored in Python by _EmulatedMap.
struct EmulatedMap {
    uint64_t magic;
    uint64_t address;
    uint64_t byte_strides[4];  // of dimensions 1 and up
    uint32_t dims[5];
    uint16_t box[5];
    uint8_t element_bytes;
    uint8_t rank;
    uint8_t swizzle;  // log2 of the span in 16-byte chunks; 0: none
    uint8_t unused[47];
};
static_assert(sizeof(EmulatedMap) == 128, "A tensor map has 128 bytes.");

constexpr uint64_t kMagic = 0x70616d20756d6521;

static const EmulatedMap& checked_map(Thread* thread, Op op, const void* map) {
    if (reinterpret_cast<uintptr_t>(map) % 64 != 0)
        fault(thread, op, "the tensor map at %p is not aligned to 64 bytes", map);
    const EmulatedMap& m = *static_cast<const EmulatedMap*>(map);
    if (m.magic != kMagic) fault(thread, op, "the tensor map at %p was not encoded for the emulator", map);
    return m;
}

void tma_prefetch_map(const void* map) { checked_map(self(), Op::kTmaPrefetchMap, map); }

// The box of a map at `at`, and its place in shared memory, as far as they can be checked without looking at the rows.
static TileCopy checked_tile(Thread* thread, Op op, const EmulatedMap& m, uint32_t address) {
    if (m.rank != 4) fault(thread, op, "the tensor map has rank %d, not 4", m.rank);
    const uint32_t row_bytes = m.box[0] * m.element_bytes, rows = m.box[1] * m.box[2] * m.box[3];
    const uint32_t span = 16u << m.swizzle, bytes = row_bytes * rows;
    if (m.swizzle != 0 && row_bytes != span)
        fault(thread, op, "the box is %u bytes wide and the swizzle %u: the emulator models equal ones only", row_bytes,
              span);
    // Eight spans make a swizzle atom, whose phase is taken from the address.
    const uint32_t offset = checked_offset(thread, op, address, bytes, m.swizzle != 0 ? 8 * span : 128);
    return {offset, bytes, m.swizzle, thread->index, {}};
}

// The rows of the box that are inside the tensor, whose addresses are checked while the thread that asked can still be
// named.
static std::vector<TileRow> checked_rows(Thread* thread, Op op, const EmulatedMap& m, const int (&at)[4]) {
    int64_t begin[4], end[4];
    std::vector<TileRow> rows;
    for (int i = 0; i < 4; ++i) {
        begin[i] = at[i] < 0 ? 0 : at[i];
        end[i] = std::min<int64_t>(static_cast<int64_t>(at[i]) + m.box[i], m.dims[i]);
        if (begin[i] >= end[i]) return rows;
    }
    const uint32_t size = m.element_bytes;
    const uint64_t bytes = static_cast<uint64_t>(end[0] - begin[0]) * size;
    for (int64_t i3 = begin[3]; i3 < end[3]; ++i3)
        for (int64_t i2 = begin[2]; i2 < end[2]; ++i2)
            for (int64_t i1 = begin[1]; i1 < end[1]; ++i1) {
                const uint64_t address = m.address + begin[0] * size + i1 * m.byte_strides[0] + i2 * m.byte_strides[1] +
                                         i3 * m.byte_strides[2];
                const int64_t row = ((i3 - at[3]) * m.box[2] + i2 - at[2]) * m.box[1] + i1 - at[1];
                check_global(thread, op, reinterpret_cast<const void*>(address), bytes, size, op == Op::kTmaStore);
                rows.push_back({address, static_cast<uint32_t>((row * m.box[0] + begin[0] - at[0]) * size),
                                static_cast<uint32_t>(bytes)});
            }
    return rows;
}

// Calls copy(place in shared memory, bytes of the row before it, bytes) for each 16-byte chunk that a row touches: bits
// of the number of a chunk's row flip bits of the chunk's.
template <class Copy>
static void for_chunks(const TileCopy& tile, const TileRow& row, Copy copy) {
    for (uint32_t done = 0, step; done < row.bytes; done += step) {
        const uint32_t offset = tile.offset + row.offset + done;
        step = std::min(row.bytes - done, kGranule - offset % kGranule);
        const uint32_t chunk = (offset + kSmemBase) >> 7 & ((1u << tile.swizzle) - 1);
        copy(offset ^ chunk << 4, done, step);
    }
}

// --- loads

void tma_load_4d(uint32_t dst, const void* map, uint32_t bar, int c0, int c1, int c2, int c3) {
    Thread* thread = self();
    Cta* cta = thread->cta;
    const EmulatedMap& m = checked_map(thread, Op::kTmaLoad, map);
    TileCopy tile = checked_tile(thread, Op::kTmaLoad, m, dst);
    const uint32_t index = mbarrier_for_copy(thread, bar, tile.bytes);
    for (uint32_t done = 0; done < tile.bytes; done += kGranule) {
        note_write(thread, Op::kTmaLoad, tile.offset + done, 0xf, true);
        cta->shadow[(tile.offset + done) / kGranule].tile_in_flight = static_cast<uint8_t>(index + 1);
    }
    memset(cta->smem.get() + tile.offset, 0xff, tile.bytes);
    tile.rows = checked_rows(thread, Op::kTmaLoad, m, {c0, c1, c2, c3});
    cta->mbarriers[index].copies.push_back(std::move(tile));
}

void land(Cta* cta, uint32_t barrier, const TileCopy& tile) {
    unsigned char* smem = cta->smem.get();
    memset(smem + tile.offset, 0, tile.bytes);  // what is outside the tensor
    for (const TileRow& row : tile.rows)
        for_chunks(tile, row, [&](uint32_t place, uint32_t done, uint32_t bytes) {
            memcpy(smem + place, reinterpret_cast<const char*>(row.address) + done, bytes);
        });
    for (uint32_t done = 0; done < tile.bytes; done += kGranule) {
        Granule& granule = cta->shadow[(tile.offset + done) / kGranule];
        granule.tile_in_flight = 0;
        for (int word = 0; word < 4; ++word) {
            granule.writer[word] = static_cast<uint16_t>(cta->mbarrier_component(barrier) + 1);
            granule.write_clock[word] = static_cast<int32_t>(cta->mbarriers[barrier].phase) + 1;
        }
    }
}

// --- stores

void tma_store_4d(const void* map, uint32_t src, int c0, int c1, int c2, int c3) {
    Thread* thread = self();
    const EmulatedMap& m = checked_map(thread, Op::kTmaStore, map);
    // Loads may begin there; a store on an H200 (driver 580.159.04) ended in "an illegal instruction was encountered".
    for (int c : {c0, c1, c2, c3})
        if (c < 0)
            fault(thread, Op::kTmaStore, "coordinates (%d, %d, %d, %d): a store cannot begin before the tensor", c0, c1,
                  c2, c3);
    TileStore store = {checked_tile(thread, Op::kTmaStore, m, src), thread->stores_committed, false, {}};
    TileCopy& tile = store.tile;
    tile.rows = checked_rows(thread, Op::kTmaStore, m, {c0, c1, c2, c3});
    std::vector<bool> inside(tile.bytes / kGranule);
    for (const TileRow& row : tile.rows)
        for_chunks(tile, row,
                   [&](uint32_t place, uint32_t, uint32_t) { inside[(place - tile.offset) / kGranule] = true; });
    for (uint32_t done = 0; done < tile.bytes; done += kGranule)
        note_store_issued(thread, tile.offset + done, inside[done / kGranule]);
    thread->stores.push_back(std::move(store));
}

void tma_store_commit() { ++self()->stores_committed; }

static void read(Thread* thread, TileStore& store) {
    const TileCopy& tile = store.tile;
    const unsigned char* smem = thread->cta->smem.get();
    for (const TileRow& row : tile.rows)
        for_chunks(tile, row, [&](uint32_t place, uint32_t, uint32_t bytes) {
            store.data.insert(store.data.end(), smem + place, smem + place + bytes);
        });
    for (uint32_t done = 0; done < tile.bytes; done += kGranule) note_store_read(thread, tile.offset + done);
    store.read = true;
}

void land(const TileStore& store) {
    const unsigned char* data = store.data.data();
    for (const TileRow& row : store.tile.rows) {
        memcpy(reinterpret_cast<void*>(row.address), data, row.bytes);
        data += row.bytes;
    }
}

// Whether a wait that leaves `pending` groups covers the store.
static bool covered(const Thread* thread, const TileStore& store, int pending) {
    return static_cast<int64_t>(store.group) < static_cast<int64_t>(thread->stores_committed) - pending;
}

void tma_store_wait_read(int pending) {
    Thread* thread = self();
    for (TileStore& store : thread->stores)
        if (!store.read && covered(thread, store, pending)) read(thread, store);
}

void tma_store_wait(int pending) {
    Thread* thread = self();
    tma_store_wait_read(pending);
    auto store = thread->stores.begin();
    for (; store != thread->stores.end() && covered(thread, *store, pending); ++store) land(*store);
    thread->stores.erase(thread->stores.begin(), store);
}

void leave_stores(Thread* thread) {
    uint32_t unread = 0, uncommitted = 0;
    const TileStore* first = nullptr;
    for (const TileStore& store : thread->stores) {
        if (store.read) continue;
        if (unread++ == 0) first = &store;
        uncommitted += store.group == thread->stores_committed;
    }
    if (unread != 0)
        fault(thread, Op::kExit,
              "returns with %u tma_store_4d in flight, %u of them never committed, the first from shared memory offset "
              "0x%x: no tma_store_wait_read has made sure that it has been read",
              unread, uncommitted, first->tile.offset);
    std::move(thread->stores.begin(), thread->stores.end(), std::back_inserter(thread->cta->unlanded));
    thread->stores.clear();
}

}  // namespace emu
}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// The copy engine: boxes of a tensor to shared memory. The tensor map is the emulator's own,
// written by fmha_runtime/tensor_map.py with the meaning of the driver's.
#include <string.h>

#include "state.h"

namespace fmha {
namespace emu {

// Mirrored by EmulatedTensorMap in fmha_runtime/tensor_map.py.
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

// Where a 16-byte chunk of the box lies: bits of the row's number flip bits of the chunk's.
static uint32_t swizzled(uint32_t offset, uint32_t log_chunks) {
    const uint32_t address = offset + kSmemBase;
    return offset ^ ((address >> 7 & ((1u << log_chunks) - 1)) << 4);
}

void tma_load_4d(uint32_t dst, const void* map, uint32_t bar, int c0, int c1, int c2, int c3) {
    Thread* thread = self();
    Cta* cta = thread->cta;
    const EmulatedMap& m = checked_map(thread, Op::kTmaLoad, map);
    if (m.rank != 4) fault(thread, Op::kTmaLoad, "the tensor map has rank %d, not 4", m.rank);
    const uint32_t row_bytes = m.box[0] * m.element_bytes, rows = m.box[1] * m.box[2] * m.box[3];
    const uint32_t span = 16u << m.swizzle, bytes = row_bytes * rows;
    if (m.swizzle != 0 && row_bytes != span)
        fault(thread, Op::kTmaLoad, "the box is %u bytes wide and the swizzle %u: the emulator models equal ones only",
              row_bytes, span);
    // Eight spans make a swizzle atom, whose phase is taken from the address.
    const uint32_t offset = checked_offset(thread, Op::kTmaLoad, dst, bytes, m.swizzle != 0 ? 8 * span : 128);
    const int at[4] = {c0, c1, c2, c3};
    const uint32_t index = mbarrier_for_copy(thread, bar, bytes);
    for (uint32_t done = 0; done < bytes; done += kGranule) {
        note_write(thread, Op::kTmaLoad, offset + done, 0xf, true);
        cta->shadow[(offset + done) / kGranule].tile_in_flight = static_cast<uint8_t>(index + 1);
    }
    memset(cta->smem.get() + offset, 0xff, bytes);
    TileCopy copy = {map, offset, {c0, c1, c2, c3}, thread->index};
    cta->mbarriers[index].copies.push_back(copy);

    // Bounds of the source, while the thread that asked can still be named.
    int64_t begin[4], end[4];
    for (int i = 0; i < 4; ++i) {
        begin[i] = at[i] < 0 ? 0 : at[i];
        end[i] = static_cast<int64_t>(at[i]) + m.box[i];
        if (end[i] > m.dims[i]) end[i] = m.dims[i];
        if (begin[i] >= end[i]) return;  // zeros only
    }
    for (int64_t i3 = begin[3]; i3 < end[3]; ++i3)
        for (int64_t i2 = begin[2]; i2 < end[2]; ++i2)
            for (int64_t i1 = begin[1]; i1 < end[1]; ++i1) {
                const uint64_t row =
                    m.address + i1 * m.byte_strides[0] + i2 * m.byte_strides[1] + i3 * m.byte_strides[2];
                check_global(thread, Op::kTmaLoad, reinterpret_cast<const void*>(row + begin[0] * m.element_bytes),
                             static_cast<uint64_t>(end[0] - begin[0]) * m.element_bytes, m.element_bytes, false);
            }
}

void land(Cta* cta, uint32_t barrier, const TileCopy& copy) {
    const EmulatedMap& m = *static_cast<const EmulatedMap*>(copy.map);
    const int64_t first = copy.at[0] < 0 ? -static_cast<int64_t>(copy.at[0]) : 0;
    int64_t last = static_cast<int64_t>(m.dims[0]) - copy.at[0];
    if (last > m.box[0]) last = m.box[0];
    const uint32_t row_bytes = m.box[0] * m.element_bytes;
    uint32_t dst = copy.dst;
    unsigned char row[256 * 8];
    int at[4];
    for (int b3 = 0; b3 < m.box[3]; ++b3)
        for (int b2 = 0; b2 < m.box[2]; ++b2)
            for (int b1 = 0; b1 < m.box[1]; ++b1, dst += row_bytes) {
                at[1] = copy.at[1] + b1;
                at[2] = copy.at[2] + b2;
                at[3] = copy.at[3] + b3;
                uint64_t src = m.address;
                bool inside = first < last;
                for (int i = 1; i < 4; ++i) {
                    inside &= at[i] >= 0 && static_cast<uint32_t>(at[i]) < m.dims[i];
                    src += static_cast<uint64_t>(at[i]) * m.byte_strides[i - 1];
                }
                memset(row, 0, row_bytes);
                if (inside)
                    memcpy(row + first * m.element_bytes,
                           reinterpret_cast<const char*>(src) + (copy.at[0] + first) * m.element_bytes,
                           static_cast<size_t>(last - first) * m.element_bytes);
                for (uint32_t i = 0; i < row_bytes; i += kGranule) {
                    const uint32_t place = swizzled(dst + i, m.swizzle);
                    memcpy(cta->smem.get() + place, row + i, kGranule);
                    Granule& granule = cta->shadow[place / kGranule];
                    granule.tile_in_flight = 0;
                    for (int word = 0; word < 4; ++word) {
                        granule.writer[word] = static_cast<uint16_t>(cta->mbarrier_component(barrier) + 1);
                        granule.write_clock[word] = static_cast<int32_t>(cta->mbarriers[barrier].phase) + 1;
                    }
                }
            }
}

}  // namespace emu
}  // namespace fmha

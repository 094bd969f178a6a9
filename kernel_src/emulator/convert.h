// SPDX-License-Identifier: Apache-2.0
// 16-bit floating-point numbers to fp32.
#pragma once
#include <stdint.h>
#include <string.h>

namespace fmha {
namespace emu {

// Branch-free, so that the loops over fragments become vector code.
struct FromFp16 {
    static float convert(uint16_t h) {
        const uint32_t magnitude = (h & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
        uint32_t normal = magnitude + (112u << 23);
        normal += exponent == 0x0f800000u ? 112u << 23 : 0;  // infinity and NaN
        const uint32_t with_one = normal + (1u << 23);  // subnormal: give it an implicit one and take it away again
        float subnormal;
        memcpy(&subnormal, &with_one, 4);
        subnormal -= 6.103515625e-05f;  // 2^-14
        uint32_t bits;
        memcpy(&bits, &subnormal, 4);
        bits = (exponent == 0 ? bits : normal) | static_cast<uint32_t>(h & 0x8000u) << 16;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
};

struct FromBf16 {
    static float convert(uint16_t h) {
        const uint32_t bits = static_cast<uint32_t>(h) << 16;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
};

}  // namespace emu
}  // namespace fmha

// SPDX-License-Identifier: Apache-2.0
// wgmma.mma_async for every N in use. The accumulator list is part of the instruction, so each N
// needs its own text; the macros below only count.
#pragma once
#include <ptx/common.cuh>

#define FMHA_D1 "%0, %1, %2, %3"
#define FMHA_D2 FMHA_D1 ", %4, %5, %6, %7"
#define FMHA_D3 FMHA_D2 ", %8, %9, %10, %11"
#define FMHA_D4 FMHA_D3 ", %12, %13, %14, %15"
#define FMHA_D5 FMHA_D4 ", %16, %17, %18, %19"
#define FMHA_D6 FMHA_D5 ", %20, %21, %22, %23"
#define FMHA_D7 FMHA_D6 ", %24, %25, %26, %27"
#define FMHA_D8 FMHA_D7 ", %28, %29, %30, %31"
#define FMHA_D9 FMHA_D8 ", %32, %33, %34, %35"
#define FMHA_D10 FMHA_D9 ", %36, %37, %38, %39"
#define FMHA_D11 FMHA_D10 ", %40, %41, %42, %43"
#define FMHA_D12 FMHA_D11 ", %44, %45, %46, %47"
#define FMHA_D13 FMHA_D12 ", %48, %49, %50, %51"
#define FMHA_D14 FMHA_D13 ", %52, %53, %54, %55"
#define FMHA_D15 FMHA_D14 ", %56, %57, %58, %59"
#define FMHA_D16 FMHA_D15 ", %60, %61, %62, %63"
#define FMHA_D17 FMHA_D16 ", %64, %65, %66, %67"
#define FMHA_D18 FMHA_D17 ", %68, %69, %70, %71"
#define FMHA_D19 FMHA_D18 ", %72, %73, %74, %75"
#define FMHA_D20 FMHA_D19 ", %76, %77, %78, %79"
#define FMHA_D21 FMHA_D20 ", %80, %81, %82, %83"
#define FMHA_D22 FMHA_D21 ", %84, %85, %86, %87"
#define FMHA_D23 FMHA_D22 ", %88, %89, %90, %91"
#define FMHA_D24 FMHA_D23 ", %92, %93, %94, %95"
#define FMHA_D25 FMHA_D24 ", %96, %97, %98, %99"
#define FMHA_D26 FMHA_D25 ", %100, %101, %102, %103"
#define FMHA_D27 FMHA_D26 ", %104, %105, %106, %107"
#define FMHA_D28 FMHA_D27 ", %108, %109, %110, %111"
#define FMHA_D29 FMHA_D28 ", %112, %113, %114, %115"
#define FMHA_D30 FMHA_D29 ", %116, %117, %118, %119"
#define FMHA_D31 FMHA_D30 ", %120, %121, %122, %123"
#define FMHA_D32 FMHA_D31 ", %124, %125, %126, %127"
#define FMHA_C1(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define FMHA_C2(d) FMHA_C1(d), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define FMHA_C3(d) FMHA_C2(d), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define FMHA_C4(d) FMHA_C3(d), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define FMHA_C5(d) FMHA_C4(d), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define FMHA_C6(d) FMHA_C5(d), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define FMHA_C7(d) FMHA_C6(d), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define FMHA_C8(d) FMHA_C7(d), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define FMHA_C9(d) FMHA_C8(d), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define FMHA_C10(d) FMHA_C9(d), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define FMHA_C11(d) FMHA_C10(d), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define FMHA_C12(d) FMHA_C11(d), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define FMHA_C13(d) FMHA_C12(d), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define FMHA_C14(d) FMHA_C13(d), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define FMHA_C15(d) FMHA_C14(d), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define FMHA_C16(d) FMHA_C15(d), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define FMHA_C17(d) FMHA_C16(d), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define FMHA_C18(d) FMHA_C17(d), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define FMHA_C19(d) FMHA_C18(d), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define FMHA_C20(d) FMHA_C19(d), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define FMHA_C21(d) FMHA_C20(d), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define FMHA_C22(d) FMHA_C21(d), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define FMHA_C23(d) FMHA_C22(d), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define FMHA_C24(d) FMHA_C23(d), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define FMHA_C25(d) FMHA_C24(d), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define FMHA_C26(d) FMHA_C25(d), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define FMHA_C27(d) FMHA_C26(d), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define FMHA_C28(d) FMHA_C27(d), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define FMHA_C29(d) FMHA_C28(d), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define FMHA_C30(d) FMHA_C29(d), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define FMHA_C31(d) FMHA_C30(d), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define FMHA_C32(d) FMHA_C31(d), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

namespace fmha {

// One m64nNk16 step of a warpgroup, asynchronous: d (+)= A B with fp32 accumulation; `accumulate` 0
// starts from zero. d is laid out like N / 8 accumulators of mma.m16n8k16 side by side, each warp
// holding 16 of the 64 rows.
//
// ss: A and B by shared-memory descriptor, both with the depth contiguous (Q and K as they are stored).
//
// rs_trans: A in registers (the operand of mma.m16n8k16), B with N contiguous (V as it is stored).
template <class Element, int kN>
struct Wgmma;

#define FMHA_WGMMA(Element, type, N, n, i0, i1, i2, i3, i4, i5)                                                   \
    template <>                                                                                                   \
    struct Wgmma<Element, N> {                                                                                    \
        FMHA_DEVICE static void ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {                   \
            asm volatile("{ .reg .pred p; setp.ne.b32 p, %" i2                                                    \
                         ", 0;\n"                                                                                 \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" FMHA_D##n           \
                         "}, %" i0 ", %" i1 ", p, 1, 1, 0, 0; }"                                                  \
                         : FMHA_C##n(d)                                                                           \
                         : "l"(a), "l"(b), "r"(accumulate));                                                      \
        }                                                                                                         \
        FMHA_DEVICE static void rs_trans(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) { \
            asm volatile("{ .reg .pred p; setp.ne.b32 p, %" i5                                                    \
                         ", 0;\n"                                                                                 \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" FMHA_D##n           \
                         "}, {%" i0 ", %" i1 ", %" i2 ", %" i3 "}, %" i4 ", p, 1, 1, 1; }"                        \
                         : FMHA_C##n(d)                                                                           \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                  \
        }                                                                                                         \
    };
#define FMHA_WGMMA_N(N, n, i0, i1, i2, i3, i4, i5)        \
    FMHA_WGMMA(Fp16, "f16", N, n, i0, i1, i2, i3, i4, i5) \
    FMHA_WGMMA(Bf16, "bf16", N, n, i0, i1, i2, i3, i4, i5)

FMHA_WGMMA_N(8, 1, "4", "5", "6", "7", "8", "9")
FMHA_WGMMA_N(16, 2, "8", "9", "10", "11", "12", "13")
FMHA_WGMMA_N(24, 3, "12", "13", "14", "15", "16", "17")
FMHA_WGMMA_N(32, 4, "16", "17", "18", "19", "20", "21")
FMHA_WGMMA_N(40, 5, "20", "21", "22", "23", "24", "25")
FMHA_WGMMA_N(48, 6, "24", "25", "26", "27", "28", "29")
FMHA_WGMMA_N(56, 7, "28", "29", "30", "31", "32", "33")
FMHA_WGMMA_N(64, 8, "32", "33", "34", "35", "36", "37")
FMHA_WGMMA_N(72, 9, "36", "37", "38", "39", "40", "41")
FMHA_WGMMA_N(80, 10, "40", "41", "42", "43", "44", "45")
FMHA_WGMMA_N(88, 11, "44", "45", "46", "47", "48", "49")
FMHA_WGMMA_N(96, 12, "48", "49", "50", "51", "52", "53")
FMHA_WGMMA_N(104, 13, "52", "53", "54", "55", "56", "57")
FMHA_WGMMA_N(112, 14, "56", "57", "58", "59", "60", "61")
FMHA_WGMMA_N(120, 15, "60", "61", "62", "63", "64", "65")
FMHA_WGMMA_N(128, 16, "64", "65", "66", "67", "68", "69")
FMHA_WGMMA_N(136, 17, "68", "69", "70", "71", "72", "73")
FMHA_WGMMA_N(144, 18, "72", "73", "74", "75", "76", "77")
FMHA_WGMMA_N(152, 19, "76", "77", "78", "79", "80", "81")
FMHA_WGMMA_N(160, 20, "80", "81", "82", "83", "84", "85")
FMHA_WGMMA_N(168, 21, "84", "85", "86", "87", "88", "89")
FMHA_WGMMA_N(176, 22, "88", "89", "90", "91", "92", "93")
FMHA_WGMMA_N(184, 23, "92", "93", "94", "95", "96", "97")
FMHA_WGMMA_N(192, 24, "96", "97", "98", "99", "100", "101")
FMHA_WGMMA_N(200, 25, "100", "101", "102", "103", "104", "105")
FMHA_WGMMA_N(208, 26, "104", "105", "106", "107", "108", "109")
FMHA_WGMMA_N(216, 27, "108", "109", "110", "111", "112", "113")
FMHA_WGMMA_N(224, 28, "112", "113", "114", "115", "116", "117")
FMHA_WGMMA_N(232, 29, "116", "117", "118", "119", "120", "121")
FMHA_WGMMA_N(240, 30, "120", "121", "122", "123", "124", "125")
FMHA_WGMMA_N(248, 31, "124", "125", "126", "127", "128", "129")
FMHA_WGMMA_N(256, 32, "128", "129", "130", "131", "132", "133")

#undef FMHA_WGMMA_N
#undef FMHA_WGMMA

}  // namespace fmha

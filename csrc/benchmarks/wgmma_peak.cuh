// wgmma m64nNk32 s8 for the microbenchmarks: operands from a 128-byte-swizzled shared tile, or A
// from registers. Sums stay in `d`; order and completion are the caller's business.
#pragma once

#include <cstdint>

// Operand lists of the inline assembly, sixteen accumulators at a time.
#define SWINQ_P16_0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define SWINQ_P16_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define SWINQ_P16_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define SWINQ_P16_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define SWINQ_P16_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define SWINQ_P16_80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define SWINQ_P16_96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define SWINQ_P16_112 \
    ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define SWINQ_P32 SWINQ_P16_0 SWINQ_P16_16
#define SWINQ_P48 SWINQ_P32 SWINQ_P16_32
#define SWINQ_P64 SWINQ_P48 SWINQ_P16_48
#define SWINQ_P96 SWINQ_P64 SWINQ_P16_64 SWINQ_P16_80
#define SWINQ_P128 SWINQ_P96 SWINQ_P16_96 SWINQ_P16_112

#define SWINQ_D4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define SWINQ_D16(i) SWINQ_D4(i), SWINQ_D4(i + 4), SWINQ_D4(i + 8), SWINQ_D4(i + 12)
#define SWINQ_D32 SWINQ_D16(0), SWINQ_D16(16)
#define SWINQ_D48 SWINQ_D32, SWINQ_D16(32)
#define SWINQ_D64 SWINQ_D48, SWINQ_D16(48)
#define SWINQ_D96 SWINQ_D64, SWINQ_D16(64), SWINQ_D16(80)
#define SWINQ_D128 SWINQ_D96, SWINQ_D16(96), SWINQ_D16(112)

// Overloads by the number of accumulators, N / 2. A predicate that is always true: add to `d`.
#define SWINQ_WGMMA(n, r, a_rs, b_rs, a_ss, b_ss)                                          \
    __device__ __forceinline__ void wgmma(int(&d)[r], const uint32_t(&a)[4], uint64_t b) { \
        asm volatile(                                                                      \
            "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                     \
            "wgmma.mma_async.sync.aligned.m64n" #n "k32.s32.s8.s8 {" SWINQ_P##r            \
            "}, " a_rs ", " b_rs ", p;\n}\n"                                               \
            : SWINQ_D##r                                                                   \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                         \
    }                                                                                      \
    __device__ __forceinline__ void wgmma(int(&d)[r], uint64_t a, uint64_t b) {            \
        asm volatile(                                                                      \
            "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                     \
            "wgmma.mma_async.sync.aligned.m64n" #n "k32.s32.s8.s8 {" SWINQ_P##r            \
            "}, " a_ss ", " b_ss ", p;\n}\n"                                               \
            : SWINQ_D##r                                                                   \
            : "l"(a), "l"(b));                                                             \
    }

SWINQ_WGMMA(64, 32, "{%32,%33,%34,%35}", "%36", "%32", "%33")
SWINQ_WGMMA(96, 48, "{%48,%49,%50,%51}", "%52", "%48", "%49")
SWINQ_WGMMA(128, 64, "{%64,%65,%66,%67}", "%68", "%64", "%65")
SWINQ_WGMMA(192, 96, "{%96,%97,%98,%99}", "%100", "%96", "%97")
SWINQ_WGMMA(256, 128, "{%128,%129,%130,%131}", "%132", "%128", "%129")

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// Rows of 128 bytes along k with the 128-byte swizzle, in groups of eight rows 1024 bytes apart.
__device__ __forceinline__ uint64_t swizzled_tile(uint32_t shared) {
    return static_cast<uint64_t>((shared & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) |
           (1ull << 62);
}

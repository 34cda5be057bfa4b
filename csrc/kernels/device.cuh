// Device code that all kernels share: PTX instructions by name, and the only rounding code in CUDA.
//
// Fragments (PTX ISA, "Matrix Fragments for mma.m16n8k32" and ".m16n8k16"), lane = 4 * g + t:
//   A  a[0]: row g,     first half of k    a[1]: row g + 8, first half
//      a[2]: row g,     second half        a[3]: row g + 8, second half; t-th 4 bytes of the half
//   B  b0: column g, t-th 4 bytes of the first half of k; b1: of the second half
//   C  c[0], c[1]: row g, columns 2t, 2t + 1;  c[2], c[3]: row g + 8
// k is 32 for 8-bit and 16 for fp16 operands: 32 bytes, two halves of 16, either way.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace swinq {

constexpr int kWarp = 32;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLog2Of255 = 7.9943534368588579f;

// ---- memory ----

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory; zeros where `valid` is false (nothing is read then).
__device__ __forceinline__ void copy_async_16(uint32_t shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
#else
    uint4 v = valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
#endif
}

__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `kPending` of this thread's committed groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Four 8 x 16-byte matrices; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

// 8 or 16 bytes that no other thread of this multiprocessor reads: L1 keeps no copy.
__device__ __forceinline__ void load_once(uint32_t (&r)[2], const void* global) {
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "l"(global)
                 : "memory");
}

__device__ __forceinline__ void load_once(uint32_t (&r)[4], const void* global) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "l"(global)
                 : "memory");
}

// A warp's 8 x 8 matrix of 2-byte elements: lane 4g + t gives elements 2t and 2t + 1 of row g and
// gets those of column g.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t row) {
    uint32_t column;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column) : "r"(row));
    return column;
}

// ---- order of kernels (programmatic dependent launch) ----

__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may be scheduled once every block here has called this or ended.
__device__ __forceinline__ void let_successor_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- matrix products ----

__device__ __forceinline__ void mma_s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    auto step = [](int& c0, int& c1, uint32_t x, uint32_t y) {
        asm volatile(
            "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(c0), "+r"(c1)
            : "r"(x), "r"(y));
    };
    step(c[0], c[1], a[0], b0);
    step(c[2], c[3], a[1], b0);
    step(c[0], c[1], a[2], b1);
    step(c[2], c[3], a[3], b1);
#endif
}

// A of u8, B of s8.
__device__ __forceinline__ void mma_u8s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    auto step = [](int& c0, int& c1, uint32_t x, uint32_t y) {
        asm volatile(
            "mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(c0), "+r"(c1)
            : "r"(x), "r"(y));
    };
    step(c[0], c[1], a[0], b0);
    step(c[2], c[3], a[1], b0);
    step(c[0], c[1], a[2], b1);
    step(c[2], c[3], a[3], b1);
#endif
}

// fp16 operands, fp32 sums, k = 16.
__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    auto step = [](float(&d)[4], uint32_t x, uint32_t y, uint32_t b) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(x), "r"(y), "r"(b));
    };
    step(c, a[0], a[1], b0);
    step(c, a[2], a[3], b1);
#endif
}

// ---- rounding ----

// clamp(rint(x * inverse), -128, 127): one fp32 multiply, half to even. NaN becomes 0.
__device__ __forceinline__ int quantize(float x, float inverse) {
    int code;
    asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(code) : "f"(__fmul_rn(x, inverse)));
    return code;
}

// Four codes in one register, x0 in the lowest byte.
__device__ __forceinline__ uint32_t pack_s8(float x0, float x1, float x2, float x3) {
    uint32_t low, all;
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;"
        : "=r"(low)
        : "r"(__float2int_rn(x3)), "r"(__float2int_rn(x2)));
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;"
        : "=r"(all)
        : "r"(__float2int_rn(x1)), "r"(__float2int_rn(x0)), "r"(low));
    return all;
}

// Four unsigned codes, 0 to 255, in one register, x0 in the lowest byte.
__device__ __forceinline__ uint32_t pack_u8(float x0, float x1, float x2, float x3) {
    uint32_t low, all;
    asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, 0;"
        : "=r"(low)
        : "r"(__float2int_rn(x3)), "r"(__float2int_rn(x2)));
    asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;"
        : "=r"(all)
        : "r"(__float2int_rn(x1)), "r"(__float2int_rn(x0)), "r"(low));
    return all;
}

// The same, the other bytes 0.
__device__ __forceinline__ uint32_t pack_u8(float x0, float x1) {
    uint32_t both;
    asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, 0;"
        : "=r"(both)
        : "r"(__float2int_rn(x1)), "r"(__float2int_rn(x0)));
    return both;
}

__device__ __forceinline__ uint32_t pack_u8(float x) {
    return __float_as_uint(__fadd_rn(x, 8388608.0f)) & 0xff;  // 2^23: the sum keeps no fraction
}

// Two halves in one register, x0 in the low one.
__device__ __forceinline__ uint32_t pack_half(float x0, float x1) {
    __half2 h = __floats2half2_rn(x0, x1);
    return *reinterpret_cast<uint32_t*>(&h);
}

__device__ __forceinline__ float2 unpack_half(uint32_t bits) {
    return __half22float2(*reinterpret_cast<__half2*>(&bits));
}

// ---- functions ----

// 2^x, relative error about 2^-22.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// x / y to the last bit but for rare cases of one more; y not subnormal, x / y neither.
__device__ __forceinline__ float divide_fast(float x, float y) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(y));
    float quotient = __fmul_rn(x, inverse);
    return __fmaf_rn(__fmaf_rn(-quotient, y, x), inverse, quotient);
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) {
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    }
    return x;
}

}  // namespace swinq

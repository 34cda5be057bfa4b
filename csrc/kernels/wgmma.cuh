// What only Hopper (sm_90a) has, by name: products of a warpgroup (wgmma), barriers in shared
// memory, bulk copies and clusters.
//
// An operand in shared memory is a slab: rows of 128 bytes of k, swizzled, first byte aligned to
// 1024. Byte b of row r lies at swizzle_128(128 * r + b). One product takes 32 bytes of k, so a
// slab holds four steps of k side by side; tile_descriptor(slab + 32 * step) names one.
//
// Fragments are those of device.cuh, warp w of the warpgroup holding rows 16 w to 16 w + 15:
//   a[0..3]  as of mma.m16n8k32 (s8), mma.m16n8k16 (fp16)
//   d[4 j + 2 h + e]  row 16 w + g + 8 h, column 8 j + 2 t + e
//
// Order of a chain: begin_products(), products, commit_products(), wait_for_products<pending>(),
// hold(d), then d may be read. Until then neither d nor a may be touched. begin_products() goes
// before every chain whose registers were written by anything else than products.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace swinq {

constexpr int kWarpgroup = 128;  // threads

// ---- slabs ----

__host__ __device__ constexpr uint32_t swizzle_128(uint32_t offset) {
    return offset ^ ((offset >> 3) & 0x70);
}

// K-major, 128-byte swizzle, 1024 bytes from one group of 8 rows to the next.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t shared) {
    constexpr uint64_t kConstant = (1ull << 62) | (uint64_t{1024 >> 4} << 32) | (1ull << 16);
    return kConstant | ((shared & 0x3ffff) >> 4);
}

// The descriptor of what lies 16 * `steps` bytes further.
__device__ __forceinline__ uint64_t move_descriptor(uint64_t descriptor, uint32_t steps) {
    return (descriptor >> 32 << 32) | (static_cast<uint32_t>(descriptor) + steps);
}

// ---- barriers in shared memory (8 bytes, 8-byte aligned) ----

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

// After the last init_barrier, before the block's other threads or a copy see the barriers.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase wait for `bytes` of copies as well.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Lets the phase under way wait for `bytes` of copies, without arriving.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
}

// Waits until the phase of this parity (0, 1, 0, ... from the first) has ended.
__device__ __forceinline__ void wait_for_barrier(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// ---- copies and order ----

// `bytes` (a multiple of 16) of global memory, both 16-byte aligned; completes on `barrier`.
__device__ __forceinline__ void copy_bulk(uint32_t shared, const void* global, uint32_t bytes,
                                          uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1], %2, [%3];" ::"r"(shared),
        "l"(global), "r"(bytes), "r"(barrier)
        : "memory");
}

// ---- clusters ----

// Where `shared` of this block lies in block `rank` of the cluster.
__device__ __forceinline__ uint32_t remote_address(uint32_t shared, int rank) {
    uint32_t remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(rank));
    return remote;
}

__device__ __forceinline__ void store_remote(uint32_t remote, uint4 value) {
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
}

// A barrier of all the cluster's threads in two halves, in turn; what was written before the first
// is seen behind the second.
__device__ __forceinline__ void arrive_at_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- products ----

__device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `kPending` of this warpgroup's committed groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of these registers over this point.
template <int kCount>
__device__ __forceinline__ void hold(int (&r)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(r[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void hold(uint32_t (&r)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(r[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void hold(float (&r)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

// d (64 x kN) = a b^T, plus d where accumulate != 0; all 128 threads of a warpgroup.
//   s8(d, a, b, accumulate)    k = 32, int32 sums      a: descriptor or 4 registers
//   f16(d, a, b, accumulate)   k = 16, fp32 sums       b: descriptor of kN rows
template <int kN>
struct Products;

#define SWINQ_R0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SWINQ_R1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SWINQ_R2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define SWINQ_R3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SWINQ_R4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define SWINQ_R5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SWINQ_R6 \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define SWINQ_R7                                                                                 \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
    "%127"
#define SWINQ_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SWINQ_R16 SWINQ_R0
#define SWINQ_R32 SWINQ_R16 ", " SWINQ_R1
#define SWINQ_R48 SWINQ_R32 ", " SWINQ_R2
#define SWINQ_R64 SWINQ_R48 ", " SWINQ_R3
#define SWINQ_R96 SWINQ_R64 ", " SWINQ_R4 ", " SWINQ_R5
#define SWINQ_R128 SWINQ_R96 ", " SWINQ_R6 ", " SWINQ_R7

#define SWINQ_D4(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define SWINQ_D8(c) SWINQ_D4(c, 0), SWINQ_D4(c, 4)
#define SWINQ_D16(c, i) SWINQ_D4(c, i), SWINQ_D4(c, i + 4), SWINQ_D4(c, i + 8), SWINQ_D4(c, i + 12)
#define SWINQ_D32(c) SWINQ_D16(c, 0), SWINQ_D16(c, 16)
#define SWINQ_D48(c) SWINQ_D32(c), SWINQ_D16(c, 32)
#define SWINQ_D64(c) SWINQ_D48(c), SWINQ_D16(c, 48)
#define SWINQ_D96(c) SWINQ_D64(c), SWINQ_D16(c, 64), SWINQ_D16(c, 80)
#define SWINQ_D128(c) SWINQ_D96(c), SWINQ_D16(c, 96), SWINQ_D16(c, 112)

// p0 to p5: the first six operands behind the sums.
#define SWINQ_PRODUCT(n, form, sums, a, b, flag, tail)                                         \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " flag ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n form \
    " {" sums "}, " a ", " b ", p" tail ";\n}"
#define SWINQ_PRODUCTS(n, sums, d_int, d_float, p0, p1, p2, p3, p4, p5)                         \
    template <>                                                                                 \
    struct Products<n> {                                                                        \
        __device__ static __forceinline__ void s8(int (&d)[n / 2], uint64_t a, uint64_t b,      \
                                                  int accumulate) {                             \
            asm volatile(SWINQ_PRODUCT(n, "k32.s32.s8.s8", sums, p0, p1, p2, "")                \
                         : d_int                                                                \
                         : "l"(a), "l"(b), "r"(accumulate)                                      \
                         : "memory");                                                           \
        }                                                                                       \
        __device__ static __forceinline__ void s8(int (&d)[n / 2], const uint32_t (&a)[4],      \
                                                  uint64_t b, int accumulate) {                 \
            asm volatile(SWINQ_PRODUCT(n, "k32.s32.s8.s8", sums,                                \
                                       "{" p0 ", " p1 ", " p2 ", " p3 "}", p4, p5, "")          \
                         : d_int                                                                \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate)  \
                         : "memory");                                                           \
        }                                                                                       \
        __device__ static __forceinline__ void f16(float (&d)[n / 2], uint64_t a, uint64_t b,   \
                                                   int accumulate) {                            \
            asm volatile(SWINQ_PRODUCT(n, "k16.f32.f16.f16", sums, p0, p1, p2, ", 1, 1, 0, 0")  \
                         : d_float                                                              \
                         : "l"(a), "l"(b), "r"(accumulate)                                      \
                         : "memory");                                                           \
        }                                                                                       \
        __device__ static __forceinline__ void f16(float (&d)[n / 2], const uint32_t (&a)[4],   \
                                                   uint64_t b, int accumulate) {                \
            asm volatile(SWINQ_PRODUCT(n, "k16.f32.f16.f16", sums,                              \
                                       "{" p0 ", " p1 ", " p2 ", " p3 "}", p4, p5, ", 1, 1, 0") \
                         : d_float                                                              \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate)  \
                         : "memory");                                                           \
        }                                                                                       \
    };

// clang-format off
SWINQ_PRODUCTS(16, SWINQ_R8, SWINQ_D8("+r"), SWINQ_D8("+f"),
               "%8", "%9", "%10", "%11", "%12", "%13")
SWINQ_PRODUCTS(32, SWINQ_R16, SWINQ_D16("+r", 0), SWINQ_D16("+f", 0),
               "%16", "%17", "%18", "%19", "%20", "%21")
SWINQ_PRODUCTS(64, SWINQ_R32, SWINQ_D32("+r"), SWINQ_D32("+f"),
               "%32", "%33", "%34", "%35", "%36", "%37")
SWINQ_PRODUCTS(96, SWINQ_R48, SWINQ_D48("+r"), SWINQ_D48("+f"),
               "%48", "%49", "%50", "%51", "%52", "%53")
SWINQ_PRODUCTS(128, SWINQ_R64, SWINQ_D64("+r"), SWINQ_D64("+f"),
               "%64", "%65", "%66", "%67", "%68", "%69")
SWINQ_PRODUCTS(192, SWINQ_R96, SWINQ_D96("+r"), SWINQ_D96("+f"),
               "%96", "%97", "%98", "%99", "%100", "%101")
SWINQ_PRODUCTS(256, SWINQ_R128, SWINQ_D128("+r"), SWINQ_D128("+f"),
               "%128", "%129", "%130", "%131", "%132", "%133")
// clang-format on

}  // namespace swinq

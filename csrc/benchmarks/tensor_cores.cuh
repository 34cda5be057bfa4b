// Tensor cores: wgmma s8 by width and place of A, mma.sync, and whether wgmma and the other pipes
// overlap.
#pragma once

#include "device.cuh"
#include "timing.cuh"
#include "wgmma_peak.cuh"

namespace swinq::benchmark {

// Every warpgroup multiplies its 64 rows by the same N columns, over and over. Warpgroups from
// kGroups on do FP32 fused multiply-adds instead, to see whether the two overlap.
template <int kN, bool kRegisters, int kGroups, int kOtherGroups>
__global__ void __launch_bounds__(128 * (kGroups + kOtherGroups), 1)
    wgmma_kernel(int iterations, int other_iterations, uint32_t* out, long long* clocks) {
    extern __shared__ uint8_t raw[];
    const uint32_t base = (swinq::shared_address(raw) + 1023) & ~1023u;
    const int words = (kGroups * 64 + kN) * 128 / 4;
    for (int i = threadIdx.x; i < words; i += blockDim.x) {
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(base + 4 * i), "r"(random_bits(i)) : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    const long long start = clock64();
    const int group = threadIdx.x / 128;
    if (group < kGroups) {
        const uint64_t a_tile = swizzled_tile(base + group * 64 * 128);
        const uint64_t b_tile = swizzled_tile(base + kGroups * 64 * 128);
        uint32_t a[4];
        int d[kN / 2];
        for (int i = 0; i < 4; ++i) a[i] = random_bits(threadIdx.x * 4 + i);
        for (int i = 0; i < kN / 2; ++i) d[i] = 0;
#pragma unroll 1
        for (int it = 0; it < iterations; ++it) {
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; ++k) {  // 32 of the 128 bytes of k each
                if constexpr (kRegisters) {
                    wgmma(d, a, b_tile + 2 * k);
                } else {
                    wgmma(d, a_tile + 2 * k, b_tile + 2 * k);
                }
            }
            wgmma_commit();
        }
        wgmma_wait();
        int sum = 0;
        for (int i = 0; i < kN / 2; ++i) sum ^= d[i];
        if (sum == kSumNeverSeen) out[0] = 1;
    } else {
        float x[8];
        for (int i = 0; i < 8; ++i) x[i] = static_cast<float>(threadIdx.x + i);
        for (int it = 0; it < other_iterations; ++it) {
#pragma unroll
            for (int j = 0; j < 16; ++j) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    asm volatile("fma.rn.f32 %0, %0, %1, %2;"
                                 : "+f"(x[i])
                                 : "f"(0.999f), "f"(0.5f));
                }
            }
        }
        float sum = 0;
        for (int i = 0; i < 8; ++i) sum += x[i];
        if (sum == -1.0f) out[0] = 1;
    }
    __syncthreads();
    if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - start;
}

template <int kN, bool kRegisters, int kGroups, int kOtherGroups = 0>
double wgmma_time(int iterations, int other_iterations) {
    const int shared = (kGroups * 64 + kN) * 128 + 1024;
    auto kernel = wgmma_kernel<kN, kRegisters, kGroups, kOtherGroups>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
          "cudaFuncSetAttribute");
    return milliseconds(nullptr, [&] {
        kernel<<<g_multiprocessors, 128 * (kGroups + kOtherGroups), shared>>>(
            iterations, other_iterations, g_out, g_cycles);
    });
}

template <int kN, bool kRegisters, int kGroups>
void wgmma_rate() {
    const int iterations = 40000 * 64 / kN / kGroups;
    const double ms = wgmma_time<kN, kRegisters, kGroups>(iterations, 0);
    const double macs = 64.0 * kN * 128 * iterations * kGroups;  // one SM
    char how[96];
    std::snprintf(how, sizeof how, "m64n%dk32, A from %s, %d warpgroup%s", kN,
                  kRegisters ? "registers" : "shared memory", kGroups, kGroups > 1 ? "s" : "");
    row("wgmma s8", how, 2 * macs * g_multiprocessors / ms / 1e9, "TOP/s",
        macs / cycles(g_multiprocessors), "MAC/clk/SM");
}

template <int kN>
void wgmma_rates() {
    wgmma_rate<kN, false, 1>();
    wgmma_rate<kN, false, 2>();
    wgmma_rate<kN, true, 1>();
    wgmma_rate<kN, true, 2>();
}

inline void overlap() {
    constexpr int kIterations = 10000;
    constexpr int kOther = 25000;
    const double mma = wgmma_time<128, true, 2, 2>(kIterations, 0);
    const double fma = wgmma_time<128, true, 2, 2>(0, kOther);
    const double both = wgmma_time<128, true, 2, 2>(kIterations, kOther);
    row("overlap", "2 warpgroups of wgmma s8 n128 alone", mma, "ms", 0, "");
    row("overlap", "2 warpgroups of FFMA alone", fma, "ms", 0, "");
    row("overlap", "both at once", both, "ms", 0, "");
}

template <bool kInt8>
__global__ void __launch_bounds__(256, 2)
    mma_kernel(int iterations, uint32_t* out, long long* clocks) {
    constexpr int kTiles = 8;
    uint32_t a[4];
    uint32_t b[2];
    int c_int[kTiles][4] = {};
    float c_float[kTiles][4] = {};
    // fp16 operands: small exponents, so that no sum overflows
    const uint32_t mask = kInt8 ? 0xffffffffu : 0x9fff9fffu;
    for (int i = 0; i < 4; ++i) a[i] = random_bits(threadIdx.x * 8 + i) & mask;
    for (int i = 0; i < 2; ++i) b[i] = random_bits(threadIdx.x * 8 + 4 + i) & mask;
    __syncthreads();
    const long long start = clock64();
    for (int it = 0; it < iterations; ++it) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            if constexpr (kInt8) {
                swinq::mma_s8(c_int[t], a, b[0], b[1]);
            } else {
                swinq::mma_f16(c_float[t], a, b[0], b[1]);
            }
        }
    }
    __syncthreads();
    const long long end = clock64();
    int sum = 0;
    for (int t = 0; t < kTiles; ++t) {
        for (int i = 0; i < 4; ++i) sum ^= c_int[t][i] ^ __float_as_int(c_float[t][i]);
    }
    if (sum == kSumNeverSeen) out[0] = 1;
    if (threadIdx.x == 0) clocks[blockIdx.x] = end - start;
}

template <bool kInt8>
void mma_rate() {
    constexpr int kIterations = 20000;
    const int blocks = 2 * g_multiprocessors;
    const double ms = milliseconds(
        nullptr, [&] { mma_kernel<kInt8><<<blocks, 256>>>(kIterations, g_out, g_cycles); });
    const double macs = 16.0 * 8 * (kInt8 ? 32 : 16) * 8 * 8 * 2 * kIterations;  // one SM
    row(kInt8 ? "mma.sync s8" : "mma.sync fp16",
        kInt8 ? "m16n8k32, 2 x 8 warps an SM" : "m16n8k16, 2 x 8 warps an SM",
        2 * macs * g_multiprocessors / ms / 1e9, kInt8 ? "TOP/s" : "TFLOP/s", macs / cycles(blocks),
        "MAC/clk/SM");
}

}  // namespace swinq::benchmark

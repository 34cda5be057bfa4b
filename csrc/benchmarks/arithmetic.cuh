// Arithmetic of the epilogues: conversions, packing, GELU's and softmax's functions.
#pragma once

#include "device.cuh"
#include "timing.cuh"

namespace swinq::benchmark {

enum Operation { kFfma, kHfma2, kI2f, kF2i, kPack, kTanh2, kTanh, kExp2, kExp2Half, kRsqrt };

template <Operation kOperation>
__device__ __forceinline__ void step(uint32_t (&x)[8]) {
    float f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        switch (kOperation) {
            case kFfma:
                asm volatile("fma.rn.f32 %0, %0, %1, %2;"
                             : "+r"(x[i])
                             : "r"(0x3f7fbe77), "r"(0x3f000000));
                break;
            case kHfma2:
                asm volatile("fma.rn.f16x2 %0, %0, %1, %2;"
                             : "+r"(x[i])
                             : "r"(0x3bff3bff), "r"(0x38003800));
                break;
            case kI2f:
                asm volatile("cvt.rn.f32.s32 %0, %1;" : "=f"(f) : "r"(x[i]));
                x[i] = __float_as_uint(f);
                break;
            case kF2i:
                asm volatile("cvt.rni.s32.f32 %0, %1;" : "=r"(x[i]) : "f"(__uint_as_float(x[i])));
                break;
            case kPack:  // four floats into four codes
                x[i] = swinq::pack_s8(__uint_as_float(x[i]), __uint_as_float(x[(i + 1) % 8]),
                                      __uint_as_float(x[(i + 2) % 8]),
                                      __uint_as_float(x[(i + 3) % 8]));
                break;
            case kTanh2:
                asm volatile("tanh.approx.f16x2 %0, %0;" : "+r"(x[i]));
                break;
            case kTanh:
                asm volatile("tanh.approx.f32 %0, %0;" : "+r"(x[i]));
                break;
            case kExp2:
                asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+r"(x[i]));
                break;
            case kExp2Half:
                asm volatile("ex2.approx.f16x2 %0, %0;" : "+r"(x[i]));
                break;
            case kRsqrt:
                asm volatile("rsqrt.approx.ftz.f32 %0, %0;" : "+r"(x[i]));
                break;
        }
    }
}

template <Operation kOperation>
__global__ void __launch_bounds__(1024, 1)
    operation_kernel(int iterations, uint32_t* out, long long* clocks) {
    uint32_t x[8];
    for (int i = 0; i < 8; ++i) x[i] = random_bits(threadIdx.x * 8 + i) & 0xbfffbfff;
    __syncthreads();
    const long long start = clock64();
    for (int it = 0; it < iterations; ++it) {
#pragma unroll
        for (int j = 0; j < 8; ++j) step<kOperation>(x);
    }
    __syncthreads();
    const long long end = clock64();
    uint32_t sum = 0;
    for (int i = 0; i < 8; ++i) sum ^= x[i];
    if (sum == kSumNeverSeen) out[0] = sum;
    if (threadIdx.x == 0) clocks[blockIdx.x] = end - start;
}

// Rate in elements: a packed instruction counts for as many as it handles.
template <Operation kOperation>
void operation_rate(const char* what, const char* how, int elements) {
    constexpr int kIterations = 500;
    const double ms = milliseconds(nullptr, [&] {
        operation_kernel<kOperation><<<g_multiprocessors, 1024>>>(kIterations, g_out, g_cycles);
    });
    const double count = 1024.0 * 64 * kIterations * elements;  // one SM
    row(what, how, count * g_multiprocessors / ms / 1e9, "T/s", count / cycles(g_multiprocessors),
        "elements/clk/SM");
}

}  // namespace swinq::benchmark

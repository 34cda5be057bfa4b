// Timing, and one row of the table, for the microbenchmarks.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

namespace swinq::benchmark {

constexpr int kRepeats = 7;
constexpr int kSumNeverSeen = 0x3f9d70a4;  // guards stores that keep results alive

inline void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
}

inline int g_multiprocessors = 0;
inline uint32_t* g_out = nullptr;      // results that are never written
inline long long* g_cycles = nullptr;  // (blocks)

__device__ __forceinline__ uint32_t random_bits(uint32_t x) {
    x = (x ^ 61) ^ (x >> 16);
    x *= 9;
    x ^= x >> 4;
    x *= 0x27d4eb2d;
    return x ^ (x >> 15);
}

// Median milliseconds of `enqueue` on a stream.
inline float milliseconds(cudaStream_t stream, const std::function<void()>& enqueue) {
    cudaEvent_t start, stop;
    check(cudaEventCreate(&start), "cudaEventCreate");
    check(cudaEventCreate(&stop), "cudaEventCreate");
    enqueue();
    std::vector<float> times;
    for (int i = 0; i < kRepeats; ++i) {
        check(cudaEventRecord(start, stream), "cudaEventRecord");
        enqueue();
        check(cudaEventRecord(stop, stream), "cudaEventRecord");
        check(cudaEventSynchronize(stop), "cudaEventSynchronize");
        float ms = 0;
        check(cudaEventElapsedTime(&ms, start, stop), "cudaEventElapsedTime");
        times.push_back(ms);
    }
    check(cudaGetLastError(), "a kernel");
    check(cudaEventDestroy(start), "cudaEventDestroy");
    check(cudaEventDestroy(stop), "cudaEventDestroy");
    std::sort(times.begin(), times.end());
    return times[kRepeats / 2];
}

// Cycles of the slowest block of the last launch.
inline double cycles(int blocks) {
    std::vector<long long> all(blocks);
    check(cudaMemcpy(all.data(), g_cycles, blocks * sizeof(long long), cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    return static_cast<double>(*std::max_element(all.begin(), all.end()));
}

inline void row(const char* what, const char* how, double value, const char* unit, double per_clock,
                const char* per_clock_unit) {
    std::printf("| %s | %s | %.4g %s |", what, how, value, unit);
    if (per_clock > 0) {
        std::printf(" %.4g %s |\n", per_clock, per_clock_unit);
    } else {
        std::printf(" |\n");
    }
}

}  // namespace swinq::benchmark

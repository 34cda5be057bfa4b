// Reads of the L2 cache and of DRAM.
#pragma once

#include "timing.cuh"

namespace swinq::benchmark {

constexpr int kTileBytes = 8 * 1024 * 16;  // what a block reads in one step

// Blocks read tiles of the buffer in turns, past the L1, over and over.
__global__ void __launch_bounds__(1024, 1)
    read_kernel(const uint4* buffer, int tiles, int steps, uint32_t* out, long long* clocks) {
    uint32_t sum = 0;
    __syncthreads();
    const long long start = clock64();
    for (int step = 0; step < steps; ++step) {
        const int64_t tile = (blockIdx.x + int64_t{gridDim.x} * step) % tiles;
        const uint4* in = buffer + tile * (kTileBytes / 16) + threadIdx.x;
        uint4 v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = __ldcg(in + 1024 * i);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
    }
    if (sum == kSumNeverSeen) out[0] = sum;
    __syncthreads();
    if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - start;
}

__global__ void fill_kernel(uint32_t* buffer, int64_t count) {
    for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
         i += int64_t{gridDim.x} * blockDim.x) {
        buffer[i] = random_bits(static_cast<uint32_t>(i));
    }
}

// `buffer` holds `megabytes` at least.
inline void read_rate(const uint4* buffer, double megabytes, int blocks) {
    const int tiles = static_cast<int>(megabytes * 1e6 / kTileBytes);
    const int steps = megabytes > 200 ? 200 : 400;
    const double ms = milliseconds(
        nullptr, [&] { read_kernel<<<blocks, 1024>>>(buffer, tiles, steps, g_out, g_cycles); });
    const double bytes = static_cast<double>(kTileBytes) * steps;  // one SM
    char how[96];
    std::snprintf(how, sizeof how, "%.0f MB, %d SM%s", megabytes, blocks, blocks > 1 ? "s" : "");
    row(megabytes > 200 ? "DRAM read" : "L2 read", how, bytes * blocks / ms / 1e6, "GB/s",
        bytes / cycles(blocks), "B/clk/SM");
}

}  // namespace swinq::benchmark

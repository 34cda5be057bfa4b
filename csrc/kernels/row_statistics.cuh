// How the LayerNorm kernels share rows among threads, and a row's mean and deviation.
//
// A row belongs to `lanes` threads, a power of two from 4 to 256. Thread `lane` of them holds the
// vectors (of 8 channels) lane, lane + lanes, ...: up to 3, so that its part of gamma, beta and
// scales stays in registers while it goes from row to row. A sum's order follows from the width.
#pragma once

#include "arguments.h"
#include "channels.cuh"

namespace swinq {

constexpr int kRowVectors = 3;    // of a thread, at most
constexpr int kRowLanes = 256;    // of a row, at most
constexpr int kRowThreads = 128;  // of a block whose rows have at most as many lanes
constexpr int kRowWarps = kRowLanes / kWarp;

// Of a multiprocessor, as many as the registers allow: the kernels wait for memory and shuffles.
template <typename T, int kVectors>
constexpr int kResidentThreads = kVectors == 1   ? 768
                                 : kVectors == 2 ? 512
                                                 : (sizeof(T) == 2 ? 384 : 256);

struct RowLayout {
    int rows, width;
    int lanes, vectors;  // vectors: of a thread, 1 to 3

    __host__ __device__ int threads() const { return lanes > kRowThreads ? lanes : kRowThreads; }
    __host__ __device__ int rows_per_block() const { return threads() / lanes; }

    // Vectors of this thread that lie within the row: the first ones.
    __device__ int held(int lane) const {
        const int all = width / kVector;
        return lane < all ? (all - lane + lanes - 1) / lanes : 0;
    }
};

inline RowLayout row_layout(const std::string& kernel, int rows, int width) {
    RowLayout layout = {rows, width, 4, 1};
    while (layout.lanes * kRowVectors * kVector < width) layout.lanes *= 2;
    if (layout.lanes > kRowLanes) {
        throw Error(Error::kUnsupported, kernel + ": rows of " + std::to_string(width) +
                                             " channels, the kernel holds " +
                                             std::to_string(kRowLanes * kRowVectors * kVector) +
                                             "\n  fix: use a narrower model, or run it on the CPU");
    }
    layout.vectors = static_cast<int>(ceil_div(width, layout.lanes * kVector));
    return layout;
}

// As many blocks as the device holds at once with `resident_threads` a multiprocessor, or fewer
// that all have the same number of rows to do.
inline unsigned row_blocks(const RowLayout& layout, int resident_threads) {
    const int64_t blocks = ceil_div(layout.rows, layout.rows_per_block());
    const int64_t resident =
        static_cast<int64_t>(multiprocessors()) * (resident_threads / layout.threads());
    return static_cast<unsigned>(ceil_div(blocks, ceil_div(blocks, resident)));
}

// Sum over a row's threads. Every thread of the block calls. `partial` serves rows of several warps
// and must not be that of the sum before, which other warps may still read.
__device__ __forceinline__ float row_sum(float x, int lanes, float (&partial)[kRowWarps]) {
#pragma unroll
    for (int offset = kWarp / 2; offset; offset /= 2) {
        if (offset < lanes) x += __shfl_xor_sync(0xffffffffu, x, offset);
    }
    if (lanes > kWarp) {
        const int warp = threadIdx.x / kWarp, first = warp & ~(lanes / kWarp - 1);
        if (threadIdx.x % kWarp == 0) partial[warp] = x;
        __syncthreads();
        x = 0;
#pragma unroll
        for (int i = 0; i < kRowWarps; ++i) {
            if (i < lanes / kWarp) x += partial[first + i];
        }
    }
    return x;
}

struct Statistics {
    float mean, rstd;
};

// What is divided by; the host knows the reciprocal.
struct Divisor {
    float value, reciprocal;

    __host__ __device__ explicit constexpr Divisor(int width)
        : value(static_cast<float>(width)), reciprocal(1.0f / static_cast<float>(width)) {}

    // One step of Newton's makes it as good as a division: equal halves do not deviate at all.
    __device__ float divide(float x) const {
        const float quotient = __fmul_rn(x, reciprocal);
        return __fmaf_rn(__fmaf_rn(-quotient, value, x), reciprocal, quotient);
    }
};

// Two passes over registers; the vectors from `held` on are zero. total(value, pass) sums over the
// row's threads. A row that holds a non-finite number has no finite mean, and of halves no other.
template <int kVectors, typename Total>
__device__ __forceinline__ Statistics row_statistics(const float (&x)[kVectors][kVector], int held,
                                                     const Divisor& width, float eps, Total total) {
    float sum = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        float part = x[v][0];
#pragma unroll
        for (int i = 1; i < kVector; ++i) part += x[v][i];
        sum += part;
    }
    const float mean = width.divide(total(sum, 0));
    float squares = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        float part = 0;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            const float deviation = __fsub_rn(x[v][i], mean);
            part = __fmaf_rn(deviation, deviation, part);
        }
        if (v < held) squares += part;
    }
    const float variance = width.divide(total(squares, 1));
    return {mean, rsqrtf(variance + eps)};
}

}  // namespace swinq

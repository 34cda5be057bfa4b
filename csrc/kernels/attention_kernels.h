// The attention kernels behind attention(): each takes arguments that attention() has checked.
#pragma once

#include "attention.h"

namespace swinq {

constexpr int kMaxAttentionWarps = 4;  // of a block

// Windows that attention_small() has: it reads the expanded bias.
constexpr bool is_small_window(int window) {
    return window == 4 || (window >= 6 && window <= 8);
}

// kInt8 and kHalf. Keys and values of a head in a warp's registers, windows of is_small_window().
void attention_small(const AttentionArguments& arguments, cudaStream_t stream);

// kInt8 and kHalf. Keys and values of a head in shared memory, windows 12, 16 and 24. False, and
// nothing enqueued, if the window is another or the device has too little shared memory.
bool attention_large(const AttentionArguments& arguments, cudaStream_t stream);

// kInt8 and kHalf, any window. Keys and values from global memory.
void attention_generic(const AttentionArguments& arguments, cudaStream_t stream);

// kFloat, any window. No tensor cores.
void attention_float(const AttentionArguments& arguments, cudaStream_t stream);

// Windows of an image.
inline int window_count(const AttentionArguments& a) {
    return (a.resolution / a.window) * (a.resolution / a.window);
}

// Into how many shares, a power of two, the `tiles` of queries of a warp go where a launch of
// `warps` would leave schedulers without other warps to hide a warp's latencies. Every share loads
// keys and values anew, and what a query gets does not depend on it.
inline int tile_splits(int64_t warps, int tiles) {
    constexpr int64_t kWarpsPerMultiprocessor = 10;
    int splits = 1;
    while (splits < tiles && warps * splits < kWarpsPerMultiprocessor * multiprocessors()) {
        splits *= 2;
    }
    return splits;
}

}  // namespace swinq

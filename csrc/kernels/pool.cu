// pool(): the final LayerNorm and the mean over an image's tokens.
//
// One block an image, a warp a token at a time. As the mean is linear, (x - mean) * rstd is summed
// over the tokens, and gamma and beta applied to the sum. A warp adds its tokens in order, then the
// sums of the warps are added in order: nothing depends on the batch.
#include <algorithm>

#include "layernorm.h"
#include "row_statistics.cuh"

namespace swinq {

namespace {

constexpr int kSharedBytes = 48 * 1024;  // what a block has without asking

// Of a block: at most 128 registers each, or 255 for the widest rows.
template <int kVectors>
constexpr int kMostWarps = kVectors > 4 ? 8 : 16;

template <typename T, int kVectors>
__global__ void __launch_bounds__(kMostWarps<kVectors>* kWarp, 1)
    pool_kernel(const PoolArguments a, const Divisor width) {
    extern __shared__ float sums[];  // (warps, channels)
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    const int all = a.channels / kVector;
    const int held = lane < all ? (all - lane + kWarp - 1) / kWarp : 0;
    wait_for_predecessor();
    let_successor_start();

    const T* image =
        static_cast<const T*>(a.x) + static_cast<int64_t>(blockIdx.x) * a.tokens * a.channels;
    Vector<T> vectors[kVectors];
    auto load = [&](int token) {
        if (token >= a.tokens) return;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            if (v >= held) continue;
            vectors[v].load(image + static_cast<int64_t>(token) * a.channels +
                            (v * kWarp + lane) * kVector);
        }
    };
    auto total = [](float value, int) { return warp_sum(value); };
    float sum[kVectors][kVector] = {};
    load(warp);
    for (int token = warp; token < a.tokens; token += warps) {
        float x[kVectors][kVector];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) vectors[v].unpack(x[v]);
        load(token + warps);  // on its way while this token is computed
        const Statistics s = row_statistics(x, held, width, a.eps, total);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                sum[v][i] = __fmaf_rn(__fsub_rn(x[v][i], s.mean), s.rstd, sum[v][i]);
            }
        }
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        if (v >= held) continue;
        Vector<float> part;
        part.pack(sum[v]);
        part.store(sums + warp * a.channels + (v * kWarp + lane) * kVector);
    }
    __syncthreads();

    const bool poisoned = a.status && a.status[blockIdx.x] != 0;
    T* pooled = static_cast<T*>(a.pooled) + static_cast<int64_t>(blockIdx.x) * a.channels;
    for (int channel = threadIdx.x; channel < a.channels; channel += blockDim.x) {
        const float gamma = __ldg(a.gamma + channel), beta = __ldg(a.beta + channel);
        float all_tokens = 0;
        for (int w = 0; w < warps; ++w) all_tokens += sums[w * a.channels + channel];
        const float mean = __fdiv_rn(all_tokens, static_cast<float>(a.tokens));
        const T rounded = T(__fmaf_rn(mean, gamma, beta));
        const bool finite = !poisoned && isfinite(static_cast<float>(rounded));
        pooled[channel] = finite ? rounded : T(__int_as_float(0x7fffffff));  // NaN
    }
}

template <typename T, int kVectors>
void launch_pool(const PoolArguments& a, cudaStream_t stream) {
    const int row_bytes = a.channels * static_cast<int>(sizeof(float));
    const int warps = std::min({kMostWarps<kVectors>, kSharedBytes / row_bytes, a.tokens});
    launch(pool_kernel<T, kVectors>, a.batch, warps * kWarp, warps * row_bytes, stream, a,
           Divisor(a.channels));
}

template <typename T>
void dispatch(const PoolArguments& a, cudaStream_t stream) {
    switch (ceil_div(a.channels, kWarp * kVector)) {
        case 1:
            return launch_pool<T, 1>(a, stream);
        case 2:
            return launch_pool<T, 2>(a, stream);
        case 3:
            return launch_pool<T, 3>(a, stream);
        case 4:
            return launch_pool<T, 4>(a, stream);
        case 5:
        case 6:
            return launch_pool<T, 6>(a, stream);
        default:
            throw Error(Error::kUnsupported, "pool: channels is " + std::to_string(a.channels) +
                                                 ", the kernel has at most 1536\n  fix: use a "
                                                 "narrower model, or run it on the CPU");
    }
}

void check(const PoolArguments& a) {
    require_matrix("pool", static_cast<int64_t>(a.batch) * a.tokens, a.channels);
    if (a.tokens <= 0) {
        refuse_argument("pool", "tokens is " + std::to_string(a.tokens), "an image has at least 1");
    }
    require_pointer("pool", "x", a.x);
    require_pointer("pool", "pooled", a.pooled);
    require_pointer("pool", "gamma", a.gamma);
    require_pointer("pool", "beta", a.beta);
    if (a.stream != Type::kHalf && a.stream != Type::kFloat) {
        refuse_type("pool", "stream", a.stream, "half or float");
    }
}

}  // namespace

void pool(const PoolArguments& a, cudaStream_t stream) {
    check(a);
    if (a.batch == 0) return;
    if (a.stream == Type::kHalf) return dispatch<__half>(a, stream);
    dispatch<float>(a, stream);
}

}  // namespace swinq

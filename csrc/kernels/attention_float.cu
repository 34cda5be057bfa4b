// Attention of fp32 models: any window, one thread a query, fp32 throughout. Keys and values pass
// through shared memory; the softmax is rescaled whenever a row's maximum grows.
#include "attention_kernels.h"
#include "attention_tile.cuh"

namespace swinq {
namespace {

constexpr int kThreads = 64;  // queries of a block
constexpr int kKeys = 32;     // staged at a time

struct Key {
    float4 k[kHeadDim / 4], v[kHeadDim / 4];
    uint32_t region;
    int y, x;
};

__device__ __forceinline__ const float4* part_of(const AttentionArguments& a, uint32_t token,
                                                 int part, int head) {
    const uint64_t row = (static_cast<uint64_t>(token) * 3 + part) * a.heads + head;
    return static_cast<const float4*>(a.qkv) + row * (kHeadDim / 4);
}

// Grid (heads of the batch, windows of an image, blocks of queries).
__global__ void __launch_bounds__(kThreads) attention_float_kernel(const AttentionArguments a) {
    __shared__ Key keys[kKeys];
    const int count = a.window * a.window, width = 2 * a.window - 1;
    const int image = blockIdx.x / a.heads, head = blockIdx.x - image * a.heads;
    const int row = blockIdx.z * kThreads + threadIdx.x;
    const int y = row / a.window, x = row - y * a.window;
    const Token token = token_at(a, a.window, image, blockIdx.y, min(row, count - 1));
    const float* bias = a.bias_table + head * width * width;
    const float factor = __ldg(a.factor + head);
    wait_for_predecessor();
    let_successor_start();

    float zeros = 0;  // NaN once something that is not finite was loaded
    auto load = [&](uint32_t from, int part, int word) {
        const float4 x = part_of(a, from, part, head)[word];
        for (float value : {x.x, x.y, x.z, x.w}) zeros = __fmaf_rn(value, 0.0f, zeros);
        return x;
    };
    float4 q[kHeadDim / 4], o[kHeadDim / 4] = {};
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) q[i] = load(token.index, 0, i);
    float top = -INFINITY, total = 0;
    for (int first = 0; first < count; first += kKeys) {
        const int staged = min(kKeys, count - first);
        __syncthreads();
        for (int i = threadIdx.x; i < staged * (kHeadDim / 4); i += kThreads) {
            Key& key = keys[i / (kHeadDim / 4)];
            const int key_row = first + i / (kHeadDim / 4), word = i % (kHeadDim / 4);
            const Token key_token = token_at(a, a.window, image, blockIdx.y, key_row);
            key.k[word] = load(key_token.index, 1, word);
            key.v[word] = load(key_token.index, 2, word);
            if (word == 0) {
                key.region = key_token.region;
                key.y = key_row / a.window;
                key.x = key_row - key.y * a.window;
            }
        }
        __syncthreads();
        for (int j = 0; j < staged && row < count; ++j) {
            const Key& key = keys[j];
            float4 s = {0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < kHeadDim / 4; ++i) {
                s.x = __fmaf_rn(q[i].x, key.k[i].x, s.x);
                s.y = __fmaf_rn(q[i].y, key.k[i].y, s.y);
                s.z = __fmaf_rn(q[i].z, key.k[i].z, s.z);
                s.w = __fmaf_rn(q[i].w, key.k[i].w, s.w);
            }
            float b = __ldg(bias + (y - key.y + a.window - 1) * width + x - key.x + a.window - 1);
            if (key.region != token.region) b = __fadd_rn(b, -100.0f);
            const float sum = __fadd_rn(__fadd_rn(s.x, s.y), __fadd_rn(s.z, s.w));
            const float logit = __fadd_rn(__fmul_rn(sum, factor), b);
            if (logit > top) {
                const float shrink = expf(top - logit);
                top = logit;
                total *= shrink;
#pragma unroll
                for (int i = 0; i < kHeadDim / 4; ++i) {
                    o[i].x *= shrink, o[i].y *= shrink, o[i].z *= shrink, o[i].w *= shrink;
                }
            }
            const float p = expf(logit - top);
            total += p;
#pragma unroll
            for (int i = 0; i < kHeadDim / 4; ++i) {
                o[i].x = __fmaf_rn(p, key.v[i].x, o[i].x);
                o[i].y = __fmaf_rn(p, key.v[i].y, o[i].y);
                o[i].z = __fmaf_rn(p, key.v[i].z, o[i].z);
                o[i].w = __fmaf_rn(p, key.v[i].w, o[i].w);
            }
        }
    }
    if (a.status && zeros != 0) a.status[image] = 1;
    if (row >= count) return;
#pragma unroll
    for (int i = 0; i < kHeadDim / kVector; ++i) {
        const float4 low = o[2 * i], high = o[2 * i + 1];
        float values[kVector] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int c = 0; c < kVector; ++c) values[c] = __fdiv_rn(values[c], total);
        OutputRows(a, head * kHeadDim + kVector * i).store(token.index, values);
    }
}

}  // namespace

void attention_float(const AttentionArguments& a, cudaStream_t stream) {
    const dim3 grid(a.batch * a.heads, window_count(a),
                    static_cast<unsigned>(ceil_div(a.window * a.window, kThreads)));
    launch(attention_float_kernel, grid, dim3(kThreads), 0, stream, a);
}

}  // namespace swinq

// Patch embedding of an fp32 stream: a warp computes four tokens, a lane every 32nd channel.
#include "channels.cuh"
#include "patch_embed_kernels.h"
#include "patch_geometry.cuh"

namespace swinq {

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kWarpRows = 4;
constexpr int kRows = kWarps * kWarpRows;  // of a block
constexpr int kChunk = 32;                 // k in shared memory at once

// kColumns: channels of a lane.
template <typename Pixel, int kColumns>
__global__ void __launch_bounds__(kThreads)
    patch_embed_float_kernel(const PatchEmbedArguments a, const PatchGeometry geometry) {
    __shared__ float weights[kChunk][kColumns * kWarp + 1];  // odd: written without bank conflicts
    __shared__ float pixels[kRows][kChunk];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int block_row = blockIdx.x * kRows;
    const Pixel* images = static_cast<const Pixel*>(a.images);
    const float* weight = static_cast<const float*>(a.weight);
    wait_for_predecessor();
    let_successor_start();

    float y[kWarpRows][kColumns] = {};
    for (int start = 0; start < geometry.depth; start += kChunk) {
        const int k = start + lane;  // a lane has the same k throughout
        const bool inside = k < geometry.depth;
        const int offset = inside ? geometry.offset(k) : 0;
        for (int channel = warp; channel < kColumns * kWarp; channel += kWarps) {
            const bool exists = inside && channel < a.channels;
            weights[lane][channel] = exists ? __ldg(weight + channel * geometry.depth + k) : 0.0f;
        }
        for (int i = warp; i < kRows; i += kWarps) {
            const int row = block_row + i;
            const bool exists = inside && row < geometry.rows;
            pixels[i][lane] =
                exists ? static_cast<float>(images[geometry.start(row) + offset]) : 0.0f;
        }
        __syncthreads();
        for (int i = 0; i < kChunk; ++i) {
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
                const float w = weights[i][c * kWarp + lane];
#pragma unroll
                for (int r = 0; r < kWarpRows; ++r) {
                    y[r][c] = __fmaf_rn(pixels[warp * kWarpRows + r][i], w, y[r][c]);
                }
            }
        }
        __syncthreads();
    }

    const float channels = static_cast<float>(a.channels);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
        const int row = block_row + warp * kWarpRows + r;
        if (row >= geometry.rows) break;  // the same for the whole warp
        float sum = 0;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            const int channel = c * kWarp + lane;
            if (channel >= a.channels) continue;
            y[r][c] = __fadd_rn(y[r][c], __ldg(a.bias + channel));
            sum += y[r][c];
        }
        const float mean = __fdiv_rn(warp_sum(sum), channels);
        float squares = 0;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            const float deviation = y[r][c] - mean;
            if (c * kWarp + lane < a.channels) squares = __fmaf_rn(deviation, deviation, squares);
        }
        const float rstd = rsqrtf(__fdiv_rn(warp_sum(squares), channels) + a.eps);
        if (lane == 0 && a.status && !isfinite(mean)) a.status[row / geometry.tokens] = 1;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            const int channel = c * kWarp + lane;
            if (channel >= a.channels) continue;
            const float x =
                normalized(y[r][c], mean, rstd, __ldg(a.gamma + channel), __ldg(a.beta + channel));
            const int64_t at = static_cast<int64_t>(row) * a.channels + channel;
            static_cast<float*>(a.x)[at] = x;
            if (a.operand) {
                a.operand[at] = static_cast<int8_t>(quantize(x, __ldg(a.inverse + channel)));
            }
        }
    }
}

template <typename Pixel>
void dispatch(const PatchEmbedArguments& a, cudaStream_t stream) {
    const PatchGeometry geometry(a);
    const auto kernel = a.channels <= 4 * kWarp ? patch_embed_float_kernel<Pixel, 4>
                                                : patch_embed_float_kernel<Pixel, 8>;
    launch(kernel, static_cast<unsigned>(ceil_div(geometry.rows, kRows)), kThreads, 0, stream, a,
           geometry);
}

}  // namespace

void patch_embed_float(const PatchEmbedArguments& a, cudaStream_t stream) {
    (a.image_type == Type::kHalf ? dispatch<__half> : dispatch<float>)(a, stream);
}

}  // namespace swinq

// Patch embedding of an fp16 stream: pixels go from the image straight into mma fragments.
//
// A warp computes 16 tokens with all channels, so the LayerNorm is a matter of quads. Two
// permutations make every access wide: of k, so that the four pixels that a thread needs of a slab
// (16 k) are neighbours, and of the weight's rows, so that it ends with 8 neighbouring channels.
#include "arguments.h"
#include "channels.cuh"
#include "patch_embed_kernels.h"
#include "patch_geometry.cuh"

namespace swinq {

namespace {

constexpr int kTileRows = 16;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSlab = 16;  // k of one mma
constexpr int kSlabs = 3;  // of a chunk, loaded at once: a patch of 3 channels, 4 x 4 pixels
constexpr int kChunk = kSlabs * kSlab;
constexpr int kGroup = 32;  // channels of four n8 tiles

// Registers of a thread are mostly its accumulators, 16 a group.
constexpr int blocks_per_multiprocessor(int groups) {
    return groups <= 4 ? 3 : 2;
}

// Four pixels, as they lie in memory and as two registers of halves.
template <typename Pixel>
struct Pixels;

template <>
struct Pixels<__half> {
    uint2 bits;

    __device__ __forceinline__ void load(const __half* from) {
        bits = *reinterpret_cast<const uint2*>(from);
    }
    __device__ __forceinline__ void set(__half p0, __half p1, __half p2, __half p3) {
        bits = make_uint2(pack_half(p0, p1), pack_half(p2, p3));
    }
    __device__ __forceinline__ uint2 halves() const { return bits; }
};

template <>
struct Pixels<float> {
    float4 values;

    __device__ __forceinline__ void load(const float* from) {
        values = *reinterpret_cast<const float4*>(from);
    }
    __device__ __forceinline__ void set(float p0, float p1, float p2, float p3) {
        values = make_float4(p0, p1, p2, p3);
    }
    __device__ __forceinline__ uint2 halves() const {
        return make_uint2(pack_half(values.x, values.y), pack_half(values.z, values.w));
    }
};

// Shared memory of a block, in this order.
struct SharedLayout {
    int chunks, pitch;  // pitch: halves of a weight row, an odd number of slabs: no bank conflicts
    int channels;       // padded to groups

    SharedLayout(int depth, int groups)
        : chunks(static_cast<int>(ceil_div(depth, kChunk))),
          pitch((chunks * kSlabs | 1) * kSlab),
          channels(groups * kGroup) {}

    int bytes() const {
        return channels * pitch * static_cast<int>(sizeof(__half)) +
               (4 * channels + chunks * kChunk) * static_cast<int>(sizeof(float));
    }
};

// Channel of row n (of 32) of a group: column 2t + e of n8 tile j = n / 8 is channel 8t + 2j + e.
__device__ __forceinline__ int channel_of_row(int n) {
    return n % 8 / 2 * 8 + n / 8 * 2 + n % 2;
}

// Starts copying weights k, ..., k + 7 of a row into shared memory; zeros beyond its end.
__device__ __forceinline__ void copy_weights(__half* to, const __half* row, int k, int depth) {
    if (depth % kVector == 0) {
        const bool valid = k < depth;
        copy_async_16(shared_address(to), valid ? row + k : row, valid);
        return;
    }
    for (int i = k; i < k + kVector; ++i) *to++ = i < depth ? row[i] : __half(0.0f);
}

__device__ __forceinline__ void read_shared(float (&x)[kVector], const float* from) {
    Vector<float> vector;
    vector.load(from);
    vector.unpack(x);
}

// kNeighbours: the patch's width is a multiple of 4, so k, ..., k + 3 are neighbours in the image.
template <typename Pixel, int kGroups, bool kNeighbours>
__global__ void __launch_bounds__(kThreads, blocks_per_multiprocessor(kGroups))
    patch_embed_half_kernel(const PatchEmbedArguments a, const PatchGeometry geometry,
                            const SharedLayout layout) {
    extern __shared__ __align__(16) unsigned char shared[];
    __half* weights = reinterpret_cast<__half*>(shared);  // (channels, pitch)
    float* bias = reinterpret_cast<float*>(weights + layout.channels * layout.pitch);
    float* gamma = bias + layout.channels;
    float* beta = gamma + layout.channels;
    float* inverse = beta + layout.channels;
    int* offsets = reinterpret_cast<int*>(inverse + layout.channels);  // -1 beyond the patch
    const int vectors = layout.pitch / kVector;
    for (int i = threadIdx.x; i < layout.channels * vectors; i += kThreads) {
        const int n = i / vectors, k = i % vectors * kVector;
        const int channel = n / kGroup * kGroup + channel_of_row(n % kGroup);
        const bool exists = channel < a.channels;
        const __half* row = static_cast<const __half*>(a.weight) + channel * geometry.depth;
        copy_weights(weights + i * kVector, exists ? row : static_cast<const __half*>(a.weight), k,
                     exists ? geometry.depth : 0);
    }
    commit_copies();
    for (int channel = threadIdx.x; channel < layout.channels; channel += kThreads) {
        const bool exists = channel < a.channels;
        bias[channel] = exists ? a.bias[channel] : 0.0f;
        gamma[channel] = exists ? a.gamma[channel] : 0.0f;
        beta[channel] = exists ? a.beta[channel] : 0.0f;
        inverse[channel] = exists && a.operand ? a.inverse[channel] : 0.0f;
    }
    for (int k = threadIdx.x; k < layout.chunks * kChunk; k += kThreads) {
        offsets[k] = k < geometry.depth ? geometry.offset(k) : -1;
    }
    wait_for_copies<0>();
    __syncthreads();
    wait_for_predecessor();
    let_successor_start();

    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const Pixel* images = static_cast<const Pixel*>(a.images);
    Pixels<Pixel> pixels[kSlabs][2];  // of rows g and g + 8
    auto load = [&](int tile, int chunk) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = tile * kTileRows + half * 8 + g;
            const bool exists = row < geometry.rows;
            const Pixel* patch = images + (exists ? geometry.start(row) : 0);
#pragma unroll
            for (int slab = 0; slab < kSlabs; ++slab) {
                const int4 offset =
                    *reinterpret_cast<const int4*>(offsets + chunk * kChunk + slab * kSlab + 4 * t);
                if (kNeighbours) {
                    pixels[slab][half].set(0.0f, 0.0f, 0.0f, 0.0f);
                    if (exists && offset.x >= 0) pixels[slab][half].load(patch + offset.x);
                } else {
                    auto pixel = [&](int at) {
                        return exists && at >= 0 ? patch[at] : Pixel(0.0f);
                    };
                    pixels[slab][half].set(pixel(offset.x), pixel(offset.y), pixel(offset.z),
                                           pixel(offset.w));
                }
            }
        }
    };

    const int tiles = (geometry.rows + kTileRows - 1) / kTileRows, stride = gridDim.x * kWarps;
    int tile = blockIdx.x * kWarps + threadIdx.x / kWarp;
    load(tile, 0);
    for (; tile < tiles; tile += stride) {
        float y[kGroups * 4][4] = {};
        for (int chunk = 0; chunk < layout.chunks; ++chunk) {
            uint32_t patches[kSlabs][4];
#pragma unroll
            for (int slab = 0; slab < kSlabs; ++slab) {
                const uint2 low = pixels[slab][0].halves(), high = pixels[slab][1].halves();
                patches[slab][0] = low.x, patches[slab][2] = low.y;
                patches[slab][1] = high.x, patches[slab][3] = high.y;
            }
            const bool last = chunk + 1 == layout.chunks;
            load(last ? tile + stride : tile, last ? 0 : chunk + 1);  // used in the next round
            const __half* column = weights + g * layout.pitch + chunk * kChunk + 4 * t;
#pragma unroll
            for (int n = 0; n < kGroups * 4; ++n) {
#pragma unroll
                for (int slab = 0; slab < kSlabs; ++slab) {
                    const uint2 w = *reinterpret_cast<const uint2*>(column + n * 8 * layout.pitch +
                                                                    slab * kSlab);
                    mma_f16(y[n], patches[slab], w.x, w.y);
                }
            }
        }
        // From here on y[4 i + j][2 half + e] is channel 32 i + 8 t + 2 j + e of row g + 8 half.
        float mean[2] = {}, rstd[2] = {};
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            float b[kVector];
            read_shared(b, bias + i * kGroup + t * kVector);
            if (i * kGroup + t * kVector >= a.channels) continue;
#pragma unroll
            for (int c = 0; c < kVector; ++c) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float& value = y[4 * i + c / 2][2 * half + c % 2];
                    value = __fadd_rn(value, b[c]);
                    mean[half] += value;
                }
            }
        }
        const float channels = static_cast<float>(a.channels);
#pragma unroll
        for (int half = 0; half < 2; ++half) mean[half] = __fdiv_rn(quad_sum(mean[half]), channels);
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            if (i * kGroup + t * kVector >= a.channels) continue;
#pragma unroll
            for (int c = 0; c < kVector; ++c) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float deviation = y[4 * i + c / 2][2 * half + c % 2] - mean[half];
                    rstd[half] = __fmaf_rn(deviation, deviation, rstd[half]);
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            rstd[half] = rsqrtf(__fdiv_rn(quad_sum(rstd[half]), channels) + a.eps);
            const int row = tile * kTileRows + half * 8 + g;
            if (t == 0 && row < geometry.rows && a.status && !isfinite(mean[half])) {
                a.status[row / geometry.tokens] = 1;
            }
        }
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const int channel = i * kGroup + t * kVector;
            if (channel >= a.channels) continue;
            float scale[kVector], shift[kVector], codes[kVector];
            read_shared(scale, gamma + channel);
            read_shared(shift, beta + channel);
            read_shared(codes, inverse + channel);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = tile * kTileRows + half * 8 + g;
                if (row >= geometry.rows) continue;
                float x[kVector];
#pragma unroll
                for (int c = 0; c < kVector; ++c) {
                    x[c] = normalized(y[4 * i + c / 2][2 * half + c % 2], mean[half], rstd[half],
                                      scale[c], shift[c]);
                }
                const int64_t at = static_cast<int64_t>(row) * a.channels + channel;
                Vector<__half> stored;
                stored.pack(x);
                stored.store(static_cast<__half*>(a.x) + at);
                if (a.operand) {
                    stored.unpack(x);
                    store_codes(x, codes, a.operand + at);
                }
            }
        }
    }
}

template <typename Pixel, int kGroups, bool kNeighbours>
void launch_kernel(const PatchEmbedArguments& a, cudaStream_t stream) {
    const PatchGeometry geometry(a);
    const SharedLayout layout(geometry.depth, kGroups);
    const int64_t blocks = ceil_div(ceil_div(geometry.rows, kTileRows), kWarps);
    const int64_t resident =
        static_cast<int64_t>(multiprocessors()) * blocks_per_multiprocessor(kGroups);
    const int64_t rounds = ceil_div(blocks, resident);
    launch(patch_embed_half_kernel<Pixel, kGroups, kNeighbours>,
           static_cast<unsigned>(ceil_div(blocks, rounds)), kThreads, layout.bytes(), stream, a,
           geometry, layout);
}

bool has_neighbours(const PatchEmbedArguments& a) {
    return a.patch_size % 4 == 0;
}

// Groups of channels of the kernel that takes them all.
int groups_of(const PatchEmbedArguments& a) {
    if (!has_neighbours(a)) return 8;
    const auto groups = static_cast<int>(ceil_div(a.channels, kGroup));
    return groups <= 2 ? 2 : groups <= 4 ? groups : groups <= 6 ? 6 : 8;
}

template <typename Pixel>
void dispatch(const PatchEmbedArguments& a, cudaStream_t stream) {
    switch (groups_of(a)) {
        case 2:
            return launch_kernel<Pixel, 2, true>(a, stream);
        case 3:
            return launch_kernel<Pixel, 3, true>(a, stream);
        case 4:
            return launch_kernel<Pixel, 4, true>(a, stream);
        case 6:
            return launch_kernel<Pixel, 6, true>(a, stream);
        default:
            return has_neighbours(a) ? launch_kernel<Pixel, 8, true>(a, stream)
                                     : launch_kernel<Pixel, 8, false>(a, stream);
    }
}

}  // namespace

int64_t patch_embed_shared_bytes(const PatchEmbedArguments& a) {
    if (a.stream == Type::kFloat) return 0;
    return SharedLayout(a.in_chans * a.patch_size * a.patch_size, groups_of(a)).bytes();
}

void patch_embed_half(const PatchEmbedArguments& a, cudaStream_t stream) {
    (a.image_type == Type::kHalf ? dispatch<__half> : dispatch<float>)(a, stream);
}

}  // namespace swinq

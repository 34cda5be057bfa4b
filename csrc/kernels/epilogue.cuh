// What a GEMM does with its accumulators before anything is written: csrc/NUMERICS.md, "Epilogues".
//
// The plan permutes the weight's rows so that the four n8 tiles of 32 columns give the thread with
// t = lane % 4 the 8 neighbouring channels 8t ... 8t + 7: stores are 8 (codes) to 32 (fp32) bytes
// wide and a v2 head is one quad of threads.
#pragma once

#include "device.cuh"
#include "gelu.cuh"
#include "gemm.h"

namespace swinq {

constexpr int kGroup = 32;    // columns that a quad holds
constexpr int kChannels = 8;  // of them, a thread's
constexpr float kSmallestNorm = 1e-12f;

template <Type kType>
struct Number;
template <>
struct Number<Type::kInt8> {
    using Value = int8_t;
    using Accumulator = int;
};
template <>
struct Number<Type::kHalf> {
    using Value = __half;
    using Accumulator = float;
};
template <>
struct Number<Type::kFloat> {
    using Value = float;
    using Accumulator = float;
};

struct EpilogueArguments {
    void* out;
    const float* factor;
    const float* bias;
    const float* out_inverse;
    const float* out_scale;
    int m, n;
};

__device__ __forceinline__ void load_channels(float (&values)[kChannels], const float* source) {
    float4 low = __ldg(reinterpret_cast<const float4*>(source));
    float4 high = __ldg(reinterpret_cast<const float4*>(source) + 1);
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

// Brings what an epilogue reads of the tile's columns near while the products are under way:
// constants, so they need not wait for the kernel before. A line of 128 bytes a thread.
template <int kColumns>
__device__ __forceinline__ void prefetch_channels(const EpilogueArguments& arguments, int column) {
    constexpr int kLines = (kColumns + 31) / 32;
    const int which = threadIdx.x / kLines, first = column + threadIdx.x % kLines * 32;
    const float* vector = which == 0   ? arguments.factor
                          : which == 1 ? arguments.bias
                          : which == 2 ? arguments.out_inverse
                          : which == 3 ? arguments.out_scale
                                       : nullptr;
    if (vector && first < arguments.n) {
        asm volatile("prefetch.global.L1 [%0];" ::"l"(vector + first));
    }
}

// The same for the rows of the stream that a tile adds to; behind wait_for_predecessor(). kThreads
// threads take kRows rows of kColumns halves.
template <int kRows, int kColumns, int kThreads>
__device__ __forceinline__ void prefetch_stream(const EpilogueArguments& arguments, int row,
                                                int column) {
    constexpr int kLines = (kColumns + 63) / 64;
#pragma unroll
    for (int i = threadIdx.x; i < kRows * kLines; i += kThreads) {
        const int r = row + i / kLines, c = column + i % kLines * 64;
        if (r < arguments.m && c < arguments.n) {
            asm volatile(
                "prefetch.global.L1 [%0];" ::"l"(static_cast<const __half*>(arguments.out) +
                                                 static_cast<int64_t>(r) * arguments.n + c));
        }
    }
}

// rint of what lies within +-2^22, half to even: the sum keeps no fraction.
__device__ __forceinline__ float round_small(float x) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
    return __fadd_rn(__fadd_rn(x, kMagic), -kMagic);
}

// quantize(y) as a float.
__device__ __forceinline__ float code_of(float y, float inverse) {
    return round_small(fminf(fmaxf(__fmul_rn(y, inverse), -128.0f), 127.0f));
}

__device__ __forceinline__ void store_codes(const float (&y)[kChannels],
                                            const float (&inverse)[kChannels], void* out,
                                            int64_t at) {
    float scaled[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) scaled[i] = __fmul_rn(y[i], inverse[i]);
    uint2 codes = {pack_s8(scaled[0], scaled[1], scaled[2], scaled[3]),
                   pack_s8(scaled[4], scaled[5], scaled[6], scaled[7])};
    *reinterpret_cast<uint2*>(static_cast<int8_t*>(out) + at) = codes;
}

template <Type kStream>
__device__ __forceinline__ void store_stream(const float (&y)[kChannels], void* out, int64_t at) {
    if constexpr (kStream == Type::kHalf) {
        uint4 bits = {pack_half(y[0], y[1]), pack_half(y[2], y[3]), pack_half(y[4], y[5]),
                      pack_half(y[6], y[7])};
        *reinterpret_cast<uint4*>(static_cast<__half*>(out) + at) = bits;
    } else {
        float4* to = reinterpret_cast<float4*>(static_cast<float*>(out) + at);
        to[0] = make_float4(y[0], y[1], y[2], y[3]);
        to[1] = make_float4(y[4], y[5], y[6], y[7]);
    }
}

__device__ __forceinline__ void add_half(float (&y)[kChannels], const uint4& bits) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 x = unpack_half(words[i]);
        y[2 * i] = __fadd_rn(x.x, y[2 * i]);
        y[2 * i + 1] = __fadd_rn(x.y, y[2 * i + 1]);
    }
}

template <Type kStream>
__device__ __forceinline__ void add_stream(float (&y)[kChannels], const void* out, int64_t at) {
    if constexpr (kStream == Type::kHalf) {
        add_half(y, *reinterpret_cast<const uint4*>(static_cast<const __half*>(out) + at));
    } else {
        float x[kChannels];
        const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(out) + at);
        float4 low = from[0], high = from[1];
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
        x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
            y[i] = __fadd_rn(x[i], y[i]);
        }
    }
}

// y of one accumulator, before the activation.
template <Type kOperand, typename Accumulator>
__device__ __forceinline__ float linear(Accumulator sum, float factor, float bias) {
    if constexpr (kOperand == Type::kInt8) {
        return __fmaf_rn(__int2float_rn(sum), factor, bias);
    } else {
        return __fadd_rn(sum, bias);
    }
}

// What a warp adds to of the fp16 stream: 16 rows, in groups of columns. The first kAhead groups
// are read before the products, so that they need not be waited for behind them; each of the others
// as soon as one of those has been added.
template <int kAhead>
struct StreamRows {
    uint4 bits[kAhead][2];

    __device__ __forceinline__ void load_group(const EpilogueArguments& arguments, int row,
                                               int column, int group) {
        const int lane = threadIdx.x % kWarp;
        const int c = column + group * kGroup + lane % 4 * kChannels;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int r = row + half * 8 + lane / 4;
            uint4& to = bits[group % kAhead][half];
            to = make_uint4(0, 0, 0, 0);
            if (r < arguments.m && c < arguments.n) {
                to = *reinterpret_cast<const uint4*>(static_cast<const __half*>(arguments.out) +
                                                     static_cast<int64_t>(r) * arguments.n + c);
            }
        }
    }

    static __device__ __forceinline__ StreamRows load(const EpilogueArguments& arguments, int row,
                                                      int column) {
        StreamRows rows;
#pragma unroll
        for (int group = 0; group < kAhead; ++group) {
            rows.load_group(arguments, row, column, group);
        }
        return rows;
    }
};
template <>
struct StreamRows<0> {};

template <Type kOperand, Activation kActivation, Output kOutput, Type kStream>
struct Epilogue {
    using Accumulator = typename Number<kOperand>::Accumulator;
    static constexpr bool kAddsStream = kOutput == Output::kResidual && kStream == Type::kHalf;
    static constexpr bool kToStream = kOutput == Output::kResidual || kOutput == Output::kStream;

    // A warp's accumulators of kRowBlocks * 16 rows and kTiles * 8 columns; `row` and `column` are
    // the first of them. Every lane of the warp must call.
    // `stream`: the rows to add to, if they were read before.
    template <int kRowBlocks, int kTiles, int kAhead = 0>
    static __device__ __forceinline__ void run(const Accumulator (&acc)[kRowBlocks][kTiles][4],
                                               const EpilogueArguments& arguments, int row,
                                               int column, StreamRows<kAhead> stream = {}) {
        static_assert(kTiles % 4 == 0, "columns come in groups of 32");
        static_assert(kAhead == 0 || kRowBlocks == 1, "rows of the stream are those of one block");
        const int lane = threadIdx.x % kWarp;
        const bool rounded = kToStream && arguments.out_scale != nullptr;
#pragma unroll
        for (int group = 0; group < kTiles / 4; ++group) {
            const int first = column + group * kGroup;
            if (first >= arguments.n) return;  // the same for the whole warp
            const int channel = first + lane % 4 * kChannels;
            const bool inside = channel < arguments.n;
            const int safe = inside ? channel : first;
            float factor[kChannels], bias[kChannels], inverse[kChannels], scale[kChannels];
            if constexpr (kOperand == Type::kInt8) {
                load_channels(factor, arguments.factor + safe);
            }
            load_channels(bias, arguments.bias + safe);
            if (kOutput == Output::kCodes || rounded) {
                load_channels(inverse, arguments.out_inverse + safe);
            }
            if (rounded) load_channels(scale, arguments.out_scale + safe);
            // a group is one head of q, k or v; q and k come first
            const bool normalized =
                kActivation == Activation::kNormalize && first < arguments.n / 3 * 2;
#pragma unroll
            for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int r = row + block * 16 + half * 8 + lane / 4;
                    float y[kChannels];
#pragma unroll
                    for (int i = 0; i < kChannels; ++i) {
                        y[i] = linear<kOperand>(acc[block][group * 4 + i / 2][half * 2 + i % 2],
                                                factor[i], bias[i]);
                        if constexpr (kActivation == Activation::kGelu) y[i] = gelu(y[i]);
                    }
                    if (normalized) normalize(y);
                    if (rounded) {
#pragma unroll
                        for (int i = 0; i < kChannels; ++i) {
                            y[i] = __fmul_rn(code_of(y[i], inverse[i]), scale[i]);
                        }
                    }
                    if constexpr (kAhead > 0) add_half(y, stream.bits[group % kAhead][half]);
                    if (r < arguments.m && inside) {
                        write<(kAhead > 0)>(y, inverse, arguments.out,
                                            static_cast<int64_t>(r) * arguments.n + channel);
                    }
                }
            }
            if constexpr (kAhead > 0) {
                if (group + kAhead < kTiles / 4) {
                    stream.load_group(arguments, row, column, group + kAhead);
                }
            }
        }
    }

  private:
    static __device__ __forceinline__ void normalize(float (&y)[kChannels]) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kChannels; ++i) sum = __fmaf_rn(y[i], y[i], sum);
        const float inverse = rsqrtf(fmaxf(quad_sum(sum), kSmallestNorm * kSmallestNorm));
#pragma unroll
        for (int i = 0; i < kChannels; ++i) y[i] = __fmul_rn(y[i], inverse);
    }

    template <bool kAdded>
    static __device__ __forceinline__ void write(float (&y)[kChannels],
                                                 const float (&inverse)[kChannels], void* out,
                                                 int64_t at) {
        if constexpr (kOutput == Output::kCodes) {
            store_codes(y, inverse, out, at);
        } else if constexpr (kOutput == Output::kHalf) {
            store_stream<Type::kHalf>(y, out, at);
        } else if constexpr (kOutput == Output::kFloat) {
            store_stream<Type::kFloat>(y, out, at);
        } else {
            if constexpr (kOutput == Output::kResidual && !kAdded) add_stream<kStream>(y, out, at);
            store_stream<kStream>(y, out, at);
        }
    }
};

}  // namespace swinq

// Eight neighbouring channels of a row: loaded, widened to fp32, rounded and stored at once.
#pragma once

#include "device.cuh"

namespace swinq {

constexpr int kVector = 8;  // channels: 16 bytes of halves

// As they lie in memory.
template <typename T>
struct Vector;

template <>
struct Vector<int8_t> {
    uint2 bits = {0, 0};

    __device__ __forceinline__ void load(const int8_t* from) {
        bits = *reinterpret_cast<const uint2*>(from);
    }
    __device__ __forceinline__ void unpack(float (&x)[kVector]) const {
        const uint32_t words[2] = {bits.x, bits.y};
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            x[i] = static_cast<float>(static_cast<int8_t>(words[i / 4] >> (8 * (i % 4))));
        }
    }
};

template <>
struct Vector<__half> {
    uint4 bits = {0, 0, 0, 0};

    __device__ __forceinline__ void load(const __half* from) {
        bits = *reinterpret_cast<const uint4*>(from);
    }
    __device__ __forceinline__ void store(__half* to) const {
        *reinterpret_cast<uint4*>(to) = bits;
    }
    __device__ __forceinline__ void pack(const float (&x)[kVector]) {
        bits = make_uint4(pack_half(x[0], x[1]), pack_half(x[2], x[3]), pack_half(x[4], x[5]),
                          pack_half(x[6], x[7]));
    }
    __device__ __forceinline__ void unpack(float (&x)[kVector]) const {
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack_half(words[i]);
            x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
        }
    }
};

template <>
struct Vector<float> {
    float4 low = {0, 0, 0, 0}, high = {0, 0, 0, 0};

    __device__ __forceinline__ void load(const float* from) {
        low = reinterpret_cast<const float4*>(from)[0];
        high = reinterpret_cast<const float4*>(from)[1];
    }
    __device__ __forceinline__ void store(float* to) const {
        reinterpret_cast<float4*>(to)[0] = low;
        reinterpret_cast<float4*>(to)[1] = high;
    }
    __device__ __forceinline__ void pack(const float (&x)[kVector]) {
        low = make_float4(x[0], x[1], x[2], x[3]);
        high = make_float4(x[4], x[5], x[6], x[7]);
    }
    __device__ __forceinline__ void unpack(float (&x)[kVector]) const {
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
        x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    }
};

// quantize(x, inverse), as 8 bytes.
__device__ __forceinline__ void store_codes(const float (&x)[kVector],
                                            const float (&inverse)[kVector], int8_t* to) {
    float y[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) y[i] = __fmul_rn(x[i], inverse[i]);
    *reinterpret_cast<uint2*>(to) =
        make_uint2(pack_s8(y[0], y[1], y[2], y[3]), pack_s8(y[4], y[5], y[6], y[7]));
}

// Of a vector that no kernel writes: may be loaded before wait_for_predecessor().
__device__ __forceinline__ void load_constants(float (&x)[kVector], const float* from) {
    const float4 low = __ldg(reinterpret_cast<const float4*>(from));
    const float4 high = __ldg(reinterpret_cast<const float4*>(from) + 1);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

// (x - mean) * rstd * gamma + beta
__device__ __forceinline__ float normalized(float x, float mean, float rstd, float gamma,
                                            float beta) {
    return __fmaf_rn(__fmul_rn(__fsub_rn(x, mean), rstd), gamma, beta);
}

}  // namespace swinq

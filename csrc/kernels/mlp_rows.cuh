// What the fused MLP's threads do to the rows that they hold: codes of x or of its LayerNorm, GELU,
// and what becomes of fc2's sums. Who holds what: top of mlp_kernel.cuh.
#pragma once

#include "channels.cuh"
#include "gelu.cuh"
#include "mlp_memory.cuh"
#include "row_statistics.cuh"

namespace swinq {

__device__ __forceinline__ void load_shared(float (&x)[4], const float* s_from) {
    const float4 v = *reinterpret_cast<const float4*>(s_from);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

// What a thread holds of x: 8 channels of each block, of two rows.
template <int kBlocks>
struct MlpRows {
    __half* first;  // of row g
    bool inside[2];
    Vector<__half> bits[2][kBlocks];

    __device__ __forceinline__ MlpRows(__half* x, int row, int m)
        : first(x + static_cast<int64_t>(row) * kBlocks * kGroup + threadIdx.x % 4 * kVector),
          inside{row < m, row + 8 < m} {}

    __device__ __forceinline__ __half* at(int h, int block) const {
        return first + (8 * h * kBlocks + block) * kGroup;
    }
    __device__ __forceinline__ void load(int block) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (inside[h]) bits[h][block].load(at(h, block));
        }
    }
};

// Codes of LayerNorm of what a thread holds of a row: of each block two registers of an A fragment,
// the first and last four channels.
template <typename Shape>
__device__ __forceinline__ void normalize(uint32_t (&codes)[Shape::kBlocks][2],
                                          const Vector<__half> (&bits)[Shape::kBlocks], float eps,
                                          const MlpConstants<Shape>& s) {
    const int first = static_cast<int>(threadIdx.x) % 4 * kVector;
    float v[Shape::kBlocks][kVector];
    float sum = 0;
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) {
        bits[block].unpack(v[block]);
        float part = v[block][0];
#pragma unroll
        for (int i = 1; i < kVector; ++i) part += v[block][i];
        sum += part;
    }
    const float mean = quad_sum(sum) * (1.0f / Shape::kChannels);
    float squares = 0;
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) {
        float part = 0;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            const float deviation = __fsub_rn(v[block][i], mean);
            part = __fmaf_rn(deviation, deviation, part);
        }
        squares += part;
    }
    const float rstd = rsqrtf(quad_sum(squares) * (1.0f / Shape::kChannels) + eps);
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < kVector; i += 4) {
            const int channel = block * kGroup + first + i;
            float gamma[4], beta[4], inverse[4], y[4];
            load_shared(gamma, s.gamma + channel);
            load_shared(beta, s.beta + channel);
            load_shared(inverse, s.x_inverse + channel);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                y[c] = normalized(v[block][i + c], mean, rstd, gamma[c], beta[c]) * inverse[c];
            }
            codes[block][i / 4] = pack_s8(y[0], y[1], y[2], y[3]);
        }
    }
}

// Codes of GELU of one group's sums, as an A fragment; `hidden` is the thread's first channel.
template <typename Shape, int kSums>
__device__ __forceinline__ void activate(uint32_t (&a)[4], const int (&acc)[kSums], int group,
                                         int hidden, const MlpConstants<Shape>& s) {
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
        float factor[4], bias[4], inverse[4];
        load_shared(factor, s.fc1_factor + hidden + i);
        load_shared(bias, s.fc1_bias + hidden + i);
        load_shared(inverse, s.hidden_inverse + hidden + i);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float y[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int sum = acc[(group * 4 + (i + c) / 2) * 4 + h * 2 + c % 2];
                y[c] = gelu(__fmaf_rn(__int2float_rn(sum), factor[c], bias[c])) * inverse[c];
            }
            a[i / 2 + h] = pack_s8(y[0], y[1], y[2], y[3]);
        }
    }
}

// y of channel c of four from its sum of fc2.
template <bool kRounded>
__device__ __forceinline__ float output(int sum, int c, const float (&factor)[4],
                                        const float (&bias)[4], const float (&inverse)[4],
                                        const float (&scale)[4]) {
    const float y = __fmaf_rn(__int2float_rn(sum), factor[c], bias[c]);
    if constexpr (!kRounded) return y;
    return __fmul_rn(__int2float_rn(quantize(y, inverse[c])), scale[c]);
}

// x := fp16(x + y), y from the sums of fc2. The first kAhead blocks of x are loaded.
template <typename Shape, bool kRounded>
__device__ __forceinline__ void add_residual(const int (&acc)[Shape::kChannels / 2],
                                             MlpRows<Shape::kBlocks>& rows,
                                             const MlpConstants<Shape>& s) {
    const int first = static_cast<int>(threadIdx.x) % 4 * kVector;
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) {
        const int channel = block * kGroup + first;
        float y[2][kVector];
#pragma unroll
        for (int i = 0; i < kVector; i += 4) {
            float factor[4], bias[4], inverse[4], scale[4];
            load_shared(factor, s.fc2_factor + channel + i);
            load_shared(bias, s.fc2_bias + channel + i);
            if constexpr (kRounded) {
                load_shared(inverse, s.out_inverse + channel + i);
                load_shared(scale, s.out_scale + channel + i);
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const int sum = acc[(block * 4 + (i + c) / 2) * 4 + h * 2 + c % 2];
                    y[h][i + c] = output<kRounded>(sum, c, factor, bias, inverse, scale);
                }
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float before[kVector];
            rows.bits[h][block].unpack(before);
#pragma unroll
            for (int i = 0; i < kVector; ++i) y[h][i] = __fadd_rn(before[i], y[h][i]);
            Vector<__half> after;
            after.pack(y[h]);
            if (rows.inside[h]) after.store(rows.at(h, block));
        }
        if (block + Shape::kAhead < Shape::kBlocks) rows.load(block + Shape::kAhead);
        __syncwarp();  // else the compiler loads constants for so many blocks that registers spill
    }
}

// What a thread holds of x's codes, as fragments.
template <int kBlocks>
__device__ __forceinline__ void load_codes(uint32_t (&input)[kBlocks][4], const int8_t* from,
                                           const bool (&inside)[2]) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            Vector<int8_t> codes;
            if (inside[h]) codes.load(from + (8 * h * kBlocks + block) * kGroup);
            input[block][h] = codes.bits.x;
            input[block][2 + h] = codes.bits.y;
        }
    }
}

// The sum over a row in the order of row_sum(): a thread stands for one or two of its lanes.
template <int kLanes>
__device__ __forceinline__ float quad_total(const float (&parts)[kLanes]) {
    float x = kLanes == 2 ? parts[0] + parts[kLanes - 1] : parts[0];
    x += __shfl_xor_sync(0xffffffffu, x, 2);
    return x + __shfl_xor_sync(0xffffffffu, x, 1);
}

// x := fp16(x + LayerNorm(y)), y from the sums of fc2, and x's codes if `operand` is not null; the
// bits of postnorm().
template <typename Shape, bool kRounded>
__device__ __forceinline__ void add_normed(int (&acc)[Shape::kChannels / 2],
                                           MlpRows<Shape::kBlocks>& rows, int8_t* operand,
                                           float eps, const MlpConstants<Shape>& s) {
    constexpr int kBlocks = Shape::kBlocks;
    constexpr int kLanes = Shape::kChannels > 4 * kRowVectors * kVector ? 2 : 1;  // of row_layout()
    constexpr Divisor kWidth(Shape::kChannels);
    const int first = static_cast<int>(threadIdx.x) % 4 * kVector;
    auto at = [](int block, int h, int i) { return (block * 4 + i / 2) * 4 + h * 2 + i % 2; };

    float sums[2][kLanes] = {};
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
        float part[2];
#pragma unroll
        for (int i = 0; i < kVector; i += 4) {
            const int channel = block * kGroup + first + i;
            float factor[4], bias[4], inverse[4], scale[4];
            load_shared(factor, s.fc2_factor + channel);
            load_shared(bias, s.fc2_bias + channel);
            if constexpr (kRounded) {
                load_shared(inverse, s.out_inverse + channel);
                load_shared(scale, s.out_scale + channel);
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    int& held = acc[at(block, h, i + c)];
                    const float y = output<kRounded>(held, c, factor, bias, inverse, scale);
                    held = __float_as_int(y);
                    part[h] = i + c == 0 ? y : part[h] + y;
                }
            }
            __syncwarp();
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) sums[h][block % kLanes] += part[h];
        __syncwarp();  // as in add_residual()
    }
    constexpr int kAhead = 1;  // blocks of x in registers: y takes more than sums do
#pragma unroll
    for (int block = 0; block < kAhead; ++block) rows.load(block);
    float mean[2], rstd[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        mean[h] = kWidth.divide(quad_total(sums[h]));
        float squares[kLanes] = {};
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            float part = 0;
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                const float deviation = __fsub_rn(__int_as_float(acc[at(block, h, i)]), mean[h]);
                part = __fmaf_rn(deviation, deviation, part);
            }
            squares[block % kLanes] += part;
        }
        rstd[h] = rsqrtf(kWidth.divide(quad_total(squares)) + eps);
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
        float y[2][kVector], inverse[kVector];
#pragma unroll
        for (int i = 0; i < kVector; i += 4) {
            const int channel = block * kGroup + first + i;
            float gamma[4], beta[4], next[4];
            load_shared(gamma, s.gamma + channel);
            load_shared(beta, s.beta + channel);
            load_shared(next, s.x_inverse + channel);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                inverse[i + c] = next[c];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    y[h][i + c] = normalized(__int_as_float(acc[at(block, h, i + c)]), mean[h],
                                             rstd[h], gamma[c], beta[c]);
                }
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float x[kVector];
            rows.bits[h][block].unpack(x);
#pragma unroll
            for (int i = 0; i < kVector; ++i) x[i] = __fadd_rn(x[i], y[h][i]);
            Vector<__half> after;
            after.pack(x);
            if (!rows.inside[h]) continue;
            after.store(rows.at(h, block));
            if (operand == nullptr) continue;
            after.unpack(x);
            store_codes(x, inverse, operand + (8 * h * kBlocks + block) * kGroup);
        }
        if (block + kAhead < kBlocks) rows.load(block + kAhead);
        __syncwarp();
    }
}

}  // namespace swinq

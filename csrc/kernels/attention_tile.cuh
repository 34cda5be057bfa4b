// What the tensor-core attention kernels share: where the tokens of a window lie, and the products,
// codes and stores of one tile of 16 queries, all in registers.
//
// Lane 4g + t holds channels 8t to 8t + 7 of each row that it loads: one vector load, a whole
// sector a quad. Queries and keys agree about the channels, so Q K^T does not mind their order.
// Scores leave it as C fragments; packed in place they are an A fragment of P V, up to an order of
// the keys within a group that order_values() gives to V as well. The lane ends with channels 8t to
// 8t + 7 of rows g and g + 8.
#pragma once

#include "attention.h"
#include "channels.cuh"

namespace swinq {

constexpr float kMaskedLogit = -100.0f * kLog2E;  // logits are kept as multiples of ln 2, for exp2
constexpr int kTileRows = 16;                     // queries of a tile
constexpr int kTileKeys = 8;                      // keys of one C fragment

// ---- tokens of a window ----

struct Token {
    uint32_t index;  // in the batch
    uint32_t
        region;  // bit 0: below, bit 1: right of the edge that the shift rolled into the window
};

// Row `row` of window `place` of image `image`. `side`: tokens of the window's side.
__device__ __forceinline__ Token token_at(const AttentionArguments& a, int side, int image,
                                          int place, int row) {
    const int across = a.resolution / side;
    const int window_y = static_cast<uint32_t>(place) / across;
    const int window_x = place - window_y * across;
    const int y = row / side, x = row - y * side;
    int map_y = window_y * side + y + a.shift, map_x = window_x * side + x + a.shift;
    map_y -= map_y >= a.resolution ? a.resolution : 0;
    map_x -= map_x >= a.resolution ? a.resolution : 0;
    const int edge = side - a.shift;
    Token token;
    token.index = (image * a.resolution + map_y) * a.resolution + map_x;
    token.region =
        ((window_y == across - 1) & (y >= edge)) | ((window_x == across - 1) & (x >= edge)) << 1;
    return token;
}

// ---- operands ----

// `kGroup` tiles of keys are the depth of one instruction of P V. A group's keys, and its values,
// are 8 words a lane in both types.
template <Type kType>
struct Operand;

template <>
struct Operand<Type::kInt8> {
    using Sum = int;
    static constexpr int kWords = 2;  // of a lane's 8 channels
    static constexpr int kGroup = 4;
    static constexpr float kTop = kLog2Of255;  // log2 of the largest p
    static constexpr uint32_t kOne = 0x01010101;

    // Scores of 16 queries, q[0] in row g and q[1] in row g + 8, and 8 keys.
    static __device__ __forceinline__ void multiply_keys(int (&s)[4],
                                                         const uint32_t (&q)[2][kWords],
                                                         const uint32_t* k) {
        const uint32_t a[4] = {q[0][0], q[1][0], q[0][1], q[1][1]};
        mma_s8(s, a, k[0], k[1]);
    }

    static __device__ __forceinline__ void multiply_values(int (&o)[4], const uint32_t (&p)[4],
                                                           uint32_t v0, uint32_t v1) {
        mma_u8s8(o, p, v0, v1);
    }

    // A group's rows, each word transposed -> B fragments v[2n], v[2n + 1] of 4 tiles of channels.
    static __device__ __forceinline__ void order_values(uint32_t (&v)[8]) {
        uint32_t ordered[8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int word = i & 1, half = i >> 1;
            const uint32_t low = v[4 * half + word], high = v[4 * half + 2 + word];
            ordered[4 * word + half] = __byte_perm(low, high, 0x6420);
            ordered[4 * word + 2 + half] = __byte_perm(low, high, 0x7531);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = ordered[i];
    }

    // `columns`: how many of a lane's 8 keys exist in some lane, the first ones.
    static __device__ __forceinline__ void pack(uint32_t (&packed)[4], const float (&p)[kGroup][4],
                                                int columns) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int tile = i & 2, c = 2 * (i & 1), count = columns - 2 * tile;
            packed[i] =
                count > 2 ? pack_u8(p[tile][c], p[tile][c + 1], p[tile + 1][c], p[tile + 1][c + 1])
                : count == 2 ? pack_u8(p[tile][c], p[tile][c + 1])
                : count == 1 ? pack_u8(p[tile][c])
                             : 0;
        }
    }

    // Sum of channel 8t + i, row g + 8 * half.
    static __device__ __forceinline__ float channel(const int (&o)[4][4], int half, int i) {
        return static_cast<float>(o[2 * (i >> 2) + (i & 1)][2 * half + ((i >> 1) & 1)]);
    }
};

template <>
struct Operand<Type::kHalf> {
    using Sum = float;
    static constexpr int kWords = 4;
    static constexpr int kGroup = 2;
    static constexpr float kTop = 0;
    static constexpr uint32_t kOne = 0x3C003C00;

    static __device__ __forceinline__ void multiply_keys(float (&s)[4],
                                                         const uint32_t (&q)[2][kWords],
                                                         const uint32_t* k) {
#pragma unroll
        for (int i = 0; i < kWords; i += 2) {
            const uint32_t a[4] = {q[0][i], q[1][i], q[0][i + 1], q[1][i + 1]};
            mma_f16(s, a, k[i], k[i + 1]);
        }
    }

    static __device__ __forceinline__ void multiply_values(float (&o)[4], const uint32_t (&p)[4],
                                                           uint32_t v0, uint32_t v1) {
        mma_f16(o, p, v0, v1);
    }

    static __device__ __forceinline__ void order_values(uint32_t (&v)[8]) {
        const uint32_t rows[8] = {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]};
#pragma unroll
        for (int i = 0; i < 8; ++i) v[2 * (i & 3) + (i >> 2)] = rows[i];
    }

    static __device__ __forceinline__ void pack(uint32_t (&packed)[4], const float (&p)[kGroup][4],
                                                int) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            packed[i] = pack_half(p[i >> 1][2 * (i & 1)], p[i >> 1][2 * (i & 1) + 1]);
        }
    }

    static __device__ __forceinline__ float channel(const float (&o)[4][4], int half, int i) {
        return o[i >> 1][2 * half + (i & 1)];
    }
};

// ---- rows in memory ----

// base + token * stride, one wide multiply-add for each address as long as the compiler does not
// know what base and stride are made of.
struct TokenRows {
    char* base;       // of token 0, the lane's channels
    uint32_t stride;  // bytes from token to token

    __device__ __forceinline__ TokenRows(char* base, uint32_t stride) : base(base), stride(stride) {
        asm("" : "+l"(this->base), "+r"(this->stride));
    }
    __device__ __forceinline__ char* at(uint32_t token) const {
        char* row = base + static_cast<uint64_t>(token) * stride;
        __builtin_assume(__isGlobal(row));
        return row;
    }
};

// Of one head, `part` 0 of q, 1 of k, 2 of v.
template <Type kType>
struct InputRows : TokenRows {
    static constexpr uint32_t kLaneBytes = 4 * Operand<kType>::kWords;

    __device__ __forceinline__ InputRows(const AttentionArguments& a, int head, int part, int t)
        : TokenRows(static_cast<char*>(const_cast<void*>(a.qkv)) +
                        (4 * (part * a.heads + head) + t) * kLaneBytes,
                    12 * a.heads * kLaneBytes) {}

    __device__ __forceinline__ void load(uint32_t* words, uint32_t token) const {
        uint32_t r[Operand<kType>::kWords];
        load_once(r, at(token));
#pragma unroll
        for (int i = 0; i < Operand<kType>::kWords; ++i) words[i] = r[i];
    }
};

// Whether all that it was shown is finite: a sum of zeros, or NaN. Codes always are. Outputs do not
// tell, because codes have no NaN, and a key that scores -infinity has no weight.
template <Type kType>
struct FiniteCheck {
    __half2 zeros = {};

    template <int kCount>
    __device__ __forceinline__ void see(const uint32_t (&words)[kCount]) {
        if constexpr (kType == Type::kHalf) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const __half2 halves = *reinterpret_cast<const __half2*>(&words[i]);
                zeros = __hfma2(halves, __half2{}, zeros);
            }
        }
    }

    __device__ __forceinline__ void report(int* status, int image) const {
        if constexpr (kType == Type::kHalf) {
            const float2 sums = __half22float2(zeros);
            if (status && !(sums.x + sums.y == 0)) status[image] = 1;
        }
    }
};

struct OutputRows : TokenRows {
    Type type;
    float inverse[kVector] = {};

    __device__ __forceinline__ OutputRows(const AttentionArguments& a, int channel)
        : TokenRows(static_cast<char*>(a.out) + channel * bytes(a.out_type),
                    a.heads * kHeadDim * bytes(a.out_type)),
          type(a.out_type) {
        if (type == Type::kInt8) load_constants(inverse, a.out_inverse + channel);
    }

    // In the type that the next layer reads.
    __device__ __forceinline__ void store(uint32_t token, const float (&o)[kVector]) const {
        char* to = at(token);
        if (type == Type::kInt8) {
            store_codes(o, inverse, reinterpret_cast<int8_t*>(to));
        } else if (type == Type::kHalf) {
            Vector<__half> halves;
            halves.pack(o);
            halves.store(reinterpret_cast<__half*>(to));
        } else {
            Vector<float> floats;
            floats.pack(o);
            floats.store(reinterpret_cast<float*>(to));
        }
    }

  private:
    static __device__ __forceinline__ uint32_t bytes(Type type) {
        return 1u << static_cast<int>(type);
    }
};

// ---- from scores to outputs ----

// t = S * factor + b, both premultiplied by log2(e); `kHalves` 1: of row g only.
template <int kHalves, typename Sum>
__device__ __forceinline__ void to_logits(float (&t)[4], const Sum (&s)[4], float factor,
                                          const float (&bias)[4]) {
#pragma unroll
    for (int i = 0; i < 2 * kHalves; ++i) {
        t[i] = __fmaf_rn(static_cast<float>(s[i]), factor, bias[i]);
    }
}

// Running sums of p * v, and of p itself in every element of `total`.
template <Type kType>
struct WeightedValues {
    using Op = Operand<kType>;
    typename Op::Sum values[4][4] = {};
    typename Op::Sum total[4] = {};

    __device__ __forceinline__ void add(const float (&p)[Op::kGroup][4], int columns,
                                        const uint32_t (&v)[8]) {
        uint32_t packed[4];
        Op::pack(packed, p, columns);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            Op::multiply_values(values[n], packed, v[2 * n], v[2 * n + 1]);
        }
        Op::multiply_values(total, packed, Op::kOne, Op::kOne);
    }

    // o = (sum p v) * (v_scale / sum p) of row g + 8 * half; v_scale 1 for fp16.
    __device__ __forceinline__ void store(const OutputRows& rows, uint32_t token, float v_scale,
                                          int half) const {
        const float scale = divide_fast(v_scale, static_cast<float>(total[2 * half]));
        float o[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) o[i] = __fmul_rn(Op::channel(values, half, i), scale);
        rows.store(token, o);
    }
};

}  // namespace swinq

// Attention of windows of up to 64 tokens, int8 and fp16: one warp a (window, head), or a share of
// its tiles of queries. Keys and values stay in registers for all of them; nothing is exchanged but
// the table of tokens.
#include <cmath>

#include "attention_kernels.h"
#include "attention_tile.cuh"

namespace swinq {
namespace {

// Tiles of queries and of keys, rounded up.
__host__ __device__ constexpr int row_tiles(int window) {
    return (window * window + kTileRows - 1) / kTileRows;
}
__host__ __device__ constexpr int key_tiles(int window) {
    return (window * window + kTileKeys - 1) / kTileKeys;
}

// Regions of the up to 64 keys, a bit each; the lane's own keys (8j + 2t and the next) are at bits
// 8j and 8j + 1.
struct KeyRegions {
    uint32_t below[2], right[2];

    __device__ __forceinline__ void load(const uint32_t* regions, int count, int lane) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t region = regions[min(i * kWarp + lane, count - 1)];
            const int offset = 2 * (lane & 3);
            below[i] = __ballot_sync(0xffffffffu, region & 1) >> offset;
            right[i] = __ballot_sync(0xffffffffu, region & 2) >> offset;
        }
    }

    // Keys of another region, those 32 of word i.
    __device__ __forceinline__ uint32_t differing(uint32_t region, int i) const {
        return (below[i] ^ (region & 1 ? ~0u : 0u)) | (right[i] ^ (region & 2 ? ~0u : 0u));
    }
};

// One (window, head) as a warp holds it.
template <Type kType, int kWindow>
struct WindowHead {
    using Op = Operand<kType>;
    static constexpr int kTokens = kWindow * kWindow;
    static constexpr int kKeyTiles = key_tiles(kWindow);
    static constexpr int kGroups = (kKeyTiles + Op::kGroup - 1) / Op::kGroup;

    uint32_t keys[kGroups][8] = {};  // zeros where there are no keys
    uint32_t values[kGroups][8] = {};

    __device__ __forceinline__ WindowHead(const AttentionArguments& a, int head, int lane,
                                          const uint32_t* tokens) {
        const InputRows<kType> key_rows(a, head, 1, lane % 4), value_rows(a, head, 2, lane % 4);
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j) {
            const uint32_t token = tokens[j * kTileKeys + lane / 4];
            key_rows.load(keys[j / Op::kGroup] + j % Op::kGroup * Op::kWords, token);
            value_rows.load(values[j / Op::kGroup] + j % Op::kGroup * Op::kWords, token);
        }
#pragma unroll
        for (int i = 0; i < kKeyTiles * Op::kWords; ++i) {
            values[i / 8][i % 8] = transpose_matrix(values[i / 8][i % 8]);
        }
#pragma unroll
        for (int group = 0; group < kGroups; ++group) Op::order_values(values[group]);
    }

    __device__ __forceinline__ void show(FiniteCheck<kType>& check) const {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            check.see(keys[group]);
            check.see(values[group]);
        }
    }

    // Whether column c (0 or 1 of the lane's pair) of tile j is a key in some lane.
    static __device__ constexpr bool has_keys(int j, int c) { return j * kTileKeys + c < kTokens; }

    // Rows g, and with `kHalves` 2 also g + 8, of one tile. `bias`: the tile's, of this lane.
    template <int kHalves>
    __device__ __forceinline__ void attend(WeightedValues<kType>& sums,
                                           const uint32_t (&q)[2][Op::kWords], float factor,
                                           const float4* __restrict__ bias, bool masked,
                                           const KeyRegions& key_regions,
                                           const uint32_t* regions) const {
        float t[kKeyTiles][4];
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j) {
            const float4 b = __ldg(bias + j * kWarp);
            typename Op::Sum s[4] = {};
            Op::multiply_keys(s, q, keys[j / Op::kGroup] + j % Op::kGroup * Op::kWords);
            to_logits<kHalves>(t[j], s, factor, {b.x, b.y, b.z, b.w});
        }
        if (masked) {
#pragma unroll
            for (int h = 0; h < kHalves; ++h) {
                const uint32_t region = regions[8 * h];
                const uint32_t differ[2] = {key_regions.differing(region, 0),
                                            key_regions.differing(region, 1)};
#pragma unroll
                for (int i = 0; i < 2 * kKeyTiles; ++i) {
                    const int j = i / 2, c = i % 2;
                    const bool other = differ[j / 4] >> (j % 4 * kTileKeys + c) & 1;
                    t[j][2 * h + c] += other ? kMaskedLogit : 0.0f;
                }
            }
        }
        float top[2];
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
            top[h] = t[0][2 * h];
#pragma unroll
            for (int j = 0; j < kKeyTiles; ++j) {
                top[h] = fmaxf(top[h], t[j][2 * h]);
                if (has_keys(j, 1)) top[h] = fmaxf(top[h], t[j][2 * h + 1]);
            }
            top[h] = quad_max(top[h]) - Op::kTop;
        }
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            float p[Op::kGroup][4] = {};
            int columns = 0;
#pragma unroll
            for (int i = 0; i < 2 * Op::kGroup; ++i) {
                const int j = group * Op::kGroup + i / 2, c = i % 2;
                if (!has_keys(j, c)) break;
                ++columns;
#pragma unroll
                for (int h = 0; h < kHalves; ++h) {
                    p[i / 2][2 * h + c] = exp2_fast(t[j][2 * h + c] - top[h]);
                }
            }
            sums.add(p, columns, values[group]);
        }
    }
};

// Grid (images, windows of an image, blocks of warps). A warp's item is a head and, of its tiles of
// queries, those from (item % splits) * tiles on.
template <Type kType, int kWindow>
__global__ void __launch_bounds__(kMaxAttentionWarps* kWarp, kType == Type::kInt8 ? 4 : 3)
    attention_small_kernel(const AttentionArguments a, int split_bits, int tiles) {
    using Op = Operand<kType>;
    constexpr int kTokens = kWindow * kWindow;
    constexpr int kRowTiles = row_tiles(kWindow), kKeyTiles = key_tiles(kWindow);
    constexpr int kLastRows = kTokens - (kRowTiles - 1) * kTileRows;
    constexpr bool kHalfTile = kLastRows <= kTileRows / 2;
    static_assert(kHalfTile || kLastRows == kTileRows, "rows g + 8 are stored without a test");
    constexpr int kTableRows =
        (kRowTiles + 1) * kTileRows;         // one tile more is loaded than there is
    __shared__ uint32_t tokens[kTableRows];  // beyond the window the last one repeats
    __shared__ uint32_t regions[kTableRows];

    for (int row = threadIdx.x; row < kTableRows; row += blockDim.x) {
        const Token token = token_at(a, kWindow, blockIdx.x, blockIdx.y, min(row, kTokens - 1));
        tokens[row] = token.index;
        regions[row] = token.region;
    }
    __syncthreads();
    wait_for_predecessor();
    let_successor_start();

    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarp, 0);  // the same, known to be
    const int item = blockIdx.z * (blockDim.x / kWarp) + warp;
    const int head = item >> split_bits;
    const int first = (item & ((1 << split_bits) - 1)) * tiles;
    const int last = min(first + tiles, kRowTiles);
    if (head >= a.heads || first >= last) return;

    const InputRows<kType> query_rows(a, head, 0, t);
    const uint32_t* row_tokens = tokens + first * kTileRows + g;
    uint32_t next[2][Op::kWords];
    query_rows.load(next[0], row_tokens[0]);
    query_rows.load(next[1], row_tokens[8]);
    const WindowHead<kType, kWindow> window_head(a, head, lane, tokens);
    FiniteCheck<kType> check;
    window_head.show(check);
    const OutputRows output_rows(a, head * kHeadDim + kVector * t);
    const float factor = __fmul_rn(__ldg(a.factor + head), kLog2E);
    const float v_scale = kType == Type::kInt8 ? a.v_scale : 1.0f;
    const bool masked = regions[kTokens - 1] != 0;  // the last token is beyond every edge there is
    KeyRegions key_regions;
    if (masked) key_regions.load(regions, kTokens, lane);
    const float4* bias = reinterpret_cast<const float4*>(a.bias) +
                         (head * kRowTiles + first) * kKeyTiles * kWarp + lane;
#pragma unroll 1
    for (int tile = first; tile < last; ++tile) {
        uint32_t q[2][Op::kWords];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int word = 0; word < Op::kWords; ++word) q[i][word] = next[i][word];
        }
        check.see(q[0]);
        check.see(q[1]);
        query_rows.load(next[0], row_tokens[kTileRows]);
        query_rows.load(next[1], row_tokens[kTileRows + 8]);
        const uint32_t* row_regions = row_tokens - tokens + regions;
        WeightedValues<kType> sums;
        if (kHalfTile && tile == kRowTiles - 1) {
            window_head.template attend<1>(sums, q, factor, bias, masked, key_regions, row_regions);
            if (g < kLastRows) sums.store(output_rows, row_tokens[0], v_scale, 0);
        } else {
            window_head.template attend<2>(sums, q, factor, bias, masked, key_regions, row_regions);
            sums.store(output_rows, row_tokens[0], v_scale, 0);
            sums.store(output_rows, row_tokens[8], v_scale, 1);
        }
        bias += kKeyTiles * kWarp;
        row_tokens += kTileRows;
    }
    check.report(a.status, blockIdx.x);
}

template <Type kType, int kWindow>
void launch_small(const AttentionArguments& a, cudaStream_t stream) {
    const int places = window_count(a);
    const int splits =
        tile_splits(static_cast<int64_t>(a.batch) * places * a.heads, row_tiles(kWindow));
    const int split_bits = splits == 1 ? 0 : splits == 2 ? 1 : 2;
    const int tiles = static_cast<int>(ceil_div(row_tiles(kWindow), splits));
    const int items = a.heads << split_bits;
    const int blocks = static_cast<int>(ceil_div(items, kMaxAttentionWarps));
    const int warps = static_cast<int>(ceil_div(items, blocks));
    launch(attention_small_kernel<kType, kWindow>, dim3(a.batch, places, blocks), dim3(warps * 32),
           0, stream, a, split_bits, tiles);
}

template <Type kType>
void select_window(const AttentionArguments& a, cudaStream_t stream) {
    switch (a.window) {
        case 4:
            return launch_small<kType, 4>(a, stream);
        case 6:
            return launch_small<kType, 6>(a, stream);
        case 7:
            return launch_small<kType, 7>(a, stream);
        default:
            return launch_small<kType, 8>(a, stream);
    }
}

}  // namespace

void attention_small(const AttentionArguments& a, cudaStream_t stream) {
    return a.type == Type::kInt8 ? select_window<Type::kInt8>(a, stream)
                                 : select_window<Type::kHalf>(a, stream);
}

int64_t expanded_bias_size(int window, int heads) {
    if (!is_small_window(window)) return 0;
    return static_cast<int64_t>(heads) * row_tiles(window) * key_tiles(window) * kWarp * 4;
}

// Order (head, tile of queries, tile of keys, lane, element of the C fragment), times log2(e). Keys
// beyond the window get -inf: they enter neither maximum nor sum.
void expand_bias(const float* table, int window, int heads, float* expanded) {
    if (!is_small_window(window)) return;
    const int tokens = window * window, width = 2 * window - 1;
    for (int head = 0; head < heads; ++head, table += width * width) {
        for (int tile = 0; tile < row_tiles(window) * key_tiles(window); ++tile) {
            for (int element = 0; element < kWarp * 4; ++element) {
                const int lane = element / 4, c = element % 4;
                const int row = tile / key_tiles(window) * kTileRows + lane / 4 + c / 2 * 8;
                const int key = tile % key_tiles(window) * kTileKeys + lane % 4 * 2 + c % 2;
                const int y = row / window - key / window, x = row % window - key % window;
                *expanded++ = key >= tokens ? -INFINITY
                              : row >= tokens
                                  ? 0.0f
                                  : table[(y + window - 1) * width + x + window - 1] * kLog2E;
            }
        }
    }
}

}  // namespace swinq

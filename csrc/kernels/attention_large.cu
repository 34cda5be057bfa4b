// Attention of windows of 12, 16 and 24, int8 and fp16: one block a (window, head), or a share of
// its tiles of queries. Keys and values lie in shared memory as the fragments that the products
// take; the bias comes from the compact table.
//
// p is relative to the row's final maximum. Up to 144 tokens a warp keeps all logits of a tile;
// with more it makes them twice, for the maximum and for p.
#include <algorithm>

#include "attention_kernels.h"
#include "attention_tile.cuh"

namespace swinq {
namespace {

// `kStep` groups of keys are unrolled: whole lines of the window, so that a key's place in its line
// is known to the compiler.
template <Type kType, int kWindow>
struct Shape {
    using Op = Operand<kType>;
    static constexpr int kTokens = kWindow * kWindow;
    static constexpr int kRowTiles = kTokens / kTileRows;
    static constexpr int kKeyTiles = kTokens / kTileKeys;
    static constexpr int kGroups = (kKeyTiles + Op::kGroup - 1) / Op::kGroup;
    static constexpr int kGroupKeys = Op::kGroup * kTileKeys;
    static constexpr bool kOnePass = kTokens <= 144;
    static constexpr int kStep = kOnePass ? kGroups : (kWindow == 16 ? 64 : 96) / kGroupKeys;
    static constexpr int kWarps = kWindow == 12 ? 3 : kWindow == 16 ? 4 : 8;
    static constexpr int kBlocks = kOnePass ? 4 : 16 / kWarps;  // of a multiprocessor, at least
    static_assert(kTokens % kTileRows == 0 && kWindow % 4 == 0, "no row or pair of keys is cut");
    static_assert(kOnePass || (kGroups % kStep == 0 && kStep * kGroupKeys % kWindow == 0),
                  "steps are whole lines");

    // The table of bias: lines of 2 * kWindow, the last one unused, so that keys 2t and 2t + 1 of a
    // query are 8 aligned bytes in the table or in its copy, which is one element further on. The
    // copy starts half the banks away: lanes of even and of odd x do not meet.
    static constexpr int kBiasLine = 2 * kWindow;
    static constexpr int kBias = (2 * kWindow - 1) * kBiasLine;
    static constexpr int kCopy = (kBias + kWarp) / kWarp * kWarp + kWarp / 2;

    // Parts of shared memory, in words.
    static constexpr int kValues = kGroups * 8 * kWarp;  // keys before it
    static constexpr int kBiasStart = 2 * kValues;
    static constexpr int kTokenStart = kBiasStart + kCopy + kBias + 2;
    static constexpr int kRegionStart = kTokenStart + kTokens;
    static constexpr int kWords = kRegionStart + kTokens;
};

// A group's fragments as two vectors a lane, conflict-free.
__device__ __forceinline__ void store_fragments(uint32_t* to, int lane, const uint32_t (&r)[8]) {
    reinterpret_cast<uint4*>(to)[lane] = make_uint4(r[0], r[1], r[2], r[3]);
    reinterpret_cast<uint4*>(to)[kWarp + lane] = make_uint4(r[4], r[5], r[6], r[7]);
}

__device__ __forceinline__ void load_fragments(uint32_t (&r)[8], const uint32_t* from, int lane) {
    const uint4 low = reinterpret_cast<const uint4*>(from)[lane];
    const uint4 high = reinterpret_cast<const uint4*>(from)[kWarp + lane];
    r[0] = low.x, r[1] = low.y, r[2] = low.z, r[3] = low.w;
    r[4] = high.x, r[5] = high.y, r[6] = high.z, r[7] = high.w;
}

// A tile of queries: rows g and g + 8 as a lane sees them.
template <Type kType, int kWindow>
struct QueryTile {
    using Op = Operand<kType>;
    using S = Shape<kType, kWindow>;

    uint32_t q[2][Op::kWords];
    uint32_t region[2];
    const float* bias[2];      // of the lane's first key
    const float* bias_cut[2];  // of keys beyond the end of a line that a tile of keys crosses
    float factor;              // times log2(e)

    __device__ __forceinline__ QueryTile(const InputRows<kType>& rows, const uint32_t* shared,
                                         int first_row, int lane, float factor)
        : factor(factor) {
        const int t = lane % 4;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first_row + lane / 4 + 8 * h;
            rows.load(q[h], shared[S::kTokenStart + row]);
            region[h] = shared[S::kRegionStart + row];
            const int y = row / kWindow, x = row % kWindow;
            const int start = (kWindow - 1 - y) * S::kBiasLine + kWindow - 1 - x + 2 * t;
            const int odd = (kWindow - 1 - x) & 1;
            bias[h] = reinterpret_cast<const float*>(shared) + S::kBiasStart + start +
                      odd * (S::kCopy + 1);
            bias_cut[h] = bias[h] + (2 * t >= kWindow % kTileKeys ? kWindow : 0);
        }
    }

    // Logits of group `first + i`, `first` a multiple of S::kStep.
    template <bool kMasked>
    __device__ __forceinline__ void logits(float (&l)[Op::kGroup][4], const uint32_t* shared,
                                           int first, int i, int lane) const {
        uint32_t k[8];
        load_fragments(k, shared + (first + i) * 8 * kWarp, lane);
        const int first_line = first * S::kGroupKeys / kWindow * S::kBiasLine;
#pragma unroll
        for (int tile = 0; tile < Op::kGroup; ++tile) {
            const int key = (i * Op::kGroup + tile) * kTileKeys;  // after those of `first`
            if (S::kOnePass && key >= S::kTokens) break;
            const bool cut = key % kWindow + kTileKeys > kWindow;
            const int offset = first_line + key / kWindow * S::kBiasLine + key % kWindow;
            typename Op::Sum s[4] = {};
            Op::multiply_keys(s, q, k + tile * Op::kWords);
            const float2 low =
                *reinterpret_cast<const float2*>((cut ? bias_cut : bias)[0] + offset);
            const float2 high =
                *reinterpret_cast<const float2*>((cut ? bias_cut : bias)[1] + offset);
            to_logits<2>(l[tile], s, factor, {low.x, low.y, high.x, high.y});
            if (kMasked) {
                const uint2 key_regions = *reinterpret_cast<const uint2*>(
                    shared + S::kRegionStart + first * S::kGroupKeys + key + lane % 4 * 2);
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const uint32_t key_region = c % 2 ? key_regions.y : key_regions.x;
                    l[tile][c] += key_region != region[c / 2] ? kMaskedLogit : 0.0f;
                }
            }
        }
    }

    // Sums over all keys. `kMasked`: whether the window has tokens of more than one region.
    template <bool kMasked>
    __device__ __forceinline__ void attend(WeightedValues<kType>& sums, const uint32_t* shared,
                                           int lane) const {
        float l[S::kOnePass ? S::kGroups : 1][Op::kGroup][4];
        float top[2] = {-INFINITY, -INFINITY};
#pragma unroll 1
        for (int first = 0; first < S::kGroups; first += S::kStep) {
#pragma unroll
            for (int i = 0; i < S::kStep; ++i) {
                auto& group = l[S::kOnePass ? i : 0];
                logits<kMasked>(group, shared, first, i, lane);
#pragma unroll
                for (int j = 0; j < Op::kGroup * 4; ++j) {
                    if (!has_keys(first + i, j / 4)) break;
                    top[j % 4 / 2] = fmaxf(top[j % 4 / 2], group[j / 4][j % 4]);
                }
            }
        }
        top[0] = quad_max(top[0]) - Op::kTop;
        top[1] = quad_max(top[1]) - Op::kTop;
#pragma unroll 1
        for (int first = 0; first < S::kGroups; first += S::kStep) {
#pragma unroll
            for (int i = 0; i < S::kStep; ++i) {
                auto& group = l[S::kOnePass ? i : 0];
                if (!S::kOnePass) logits<kMasked>(group, shared, first, i, lane);
                uint32_t v[8];
                load_fragments(v, shared + S::kValues + (first + i) * 8 * kWarp, lane);
                float p[Op::kGroup][4] = {};
                int columns = 0;
#pragma unroll
                for (int tile = 0; tile < Op::kGroup; ++tile) {
                    if (!has_keys(first + i, tile)) break;
                    columns += 2;
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        p[tile][c] = exp2_fast(group[tile][c] - top[c / 2]);
                    }
                }
                sums.add(p, columns, v);
            }
        }
    }

    // Only one pass has a group that is not full.
    static __device__ __forceinline__ bool has_keys(int group, int tile) {
        return !S::kOnePass || group * Op::kGroup + tile < S::kKeyTiles;
    }
};

// Grid (heads of the batch, windows of an image, splits): heads of one image are neighbours,
// because they share the lines of memory.
template <Type kType, int kWindow>
__global__ void __launch_bounds__(Shape<kType, kWindow>::kWarps* kWarp,
                                  Shape<kType, kWindow>::kBlocks)
    attention_large_kernel(const AttentionArguments a) {
    using Op = Operand<kType>;
    using S = Shape<kType, kWindow>;
    extern __shared__ uint4 shared_vectors[];
    uint32_t* shared = reinterpret_cast<uint32_t*>(shared_vectors);
    const int image = blockIdx.x / a.heads, head = blockIdx.x - image * a.heads;
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarp, 0);  // the same, known to be

    for (int row = threadIdx.x; row < S::kTokens; row += blockDim.x) {
        const Token token = token_at(a, kWindow, image, blockIdx.y, row);
        shared[S::kTokenStart + row] = token.index;
        shared[S::kRegionStart + row] = token.region;
    }
    // Backwards: the table is over query minus key, and keys run along the lines here.
    constexpr int kWidth = 2 * kWindow - 1;
    const float* table = a.bias_table + head * kWidth * kWidth;
    float* bias = reinterpret_cast<float*>(shared) + S::kBiasStart;
    for (int i = threadIdx.x; i < kWidth * kWidth; i += blockDim.x) {
        const float b = __fmul_rn(__ldg(table + kWidth * kWidth - 1 - i), kLog2E);
        const int at = i / kWidth * S::kBiasLine + i % kWidth;
        bias[at] = b;
        bias[S::kCopy + 1 + at] = b;
    }
    const float factor = __fmul_rn(__ldg(a.factor + head), kLog2E);
    const OutputRows output_rows(a, head * kHeadDim + kVector * t);
    __syncthreads();
    wait_for_predecessor();
    let_successor_start();

    const InputRows<kType> query_rows(a, head, 0, t), key_rows(a, head, 1, t);
    const InputRows<kType> value_rows(a, head, 2, t);
    FiniteCheck<kType> check;
    for (int group = warp; group < S::kGroups; group += S::kWarps) {
        uint32_t k[8], v[8];
#pragma unroll
        for (int tile = 0; tile < Op::kGroup; ++tile) {
            const int row = min((group * Op::kGroup + tile) * kTileKeys + g, S::kTokens - 1);
            const uint32_t token = shared[S::kTokenStart + row];
            key_rows.load(k + tile * Op::kWords, token);
            value_rows.load(v + tile * Op::kWords, token);
        }
        check.see(k);
        check.see(v);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = transpose_matrix(v[i]);
        Op::order_values(v);
        store_fragments(shared + group * 8 * kWarp, lane, k);
        store_fragments(shared + S::kValues + group * 8 * kWarp, lane, v);
    }
    __syncthreads();

    const bool masked =
        shared[S::kRegionStart + S::kTokens - 1] != 0;  // beyond all edges there are
    const float v_scale = kType == Type::kInt8 ? a.v_scale : 1.0f;
#pragma unroll 1
    for (int tile = blockIdx.z * S::kWarps + warp; tile < S::kRowTiles;
         tile += gridDim.z * S::kWarps) {
        const int row = tile * kTileRows;
        const QueryTile<kType, kWindow> queries(query_rows, shared, row, lane, factor);
        check.see(queries.q[0]);
        check.see(queries.q[1]);
        WeightedValues<kType> sums;
        if (masked) {
            queries.template attend<true>(sums, shared, lane);
        } else {
            queries.template attend<false>(sums, shared, lane);
        }
        sums.store(output_rows, shared[S::kTokenStart + row + g], v_scale, 0);
        sums.store(output_rows, shared[S::kTokenStart + row + 8 + g], v_scale, 1);
    }
    check.report(a.status, image);
}

template <Type kType, int kWindow>
bool launch_large(const AttentionArguments& a, cudaStream_t stream) {
    using S = Shape<kType, kWindow>;
    constexpr int kBytes = S::kWords * 4;
    int device = 0, limit = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "cudaDeviceGetAttribute");
    if (limit < kBytes) return false;
    const int places = window_count(a);
    const int tiles = static_cast<int>(ceil_div(S::kRowTiles, S::kWarps));  // of a warp
    const int64_t warps = static_cast<int64_t>(a.batch) * a.heads * places * S::kWarps;
    const int splits = std::min(tile_splits(warps, tiles), tiles);
    launch(attention_large_kernel<kType, kWindow>, dim3(a.batch * a.heads, places, splits),
           dim3(S::kWarps * 32), kBytes, stream, a);
    return true;
}

template <Type kType>
bool select_window(const AttentionArguments& a, cudaStream_t stream) {
    switch (a.window) {
        case 12:
            return launch_large<kType, 12>(a, stream);
        case 16:
            return launch_large<kType, 16>(a, stream);
        case 24:
            return launch_large<kType, 24>(a, stream);
        default:
            return false;
    }
}

}  // namespace

bool attention_large(const AttentionArguments& a, cudaStream_t stream) {
    return a.type == Type::kInt8 ? select_window<Type::kInt8>(a, stream)
                                 : select_window<Type::kHalf>(a, stream);
}

}  // namespace swinq

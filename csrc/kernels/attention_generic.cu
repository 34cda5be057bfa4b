// Attention of any window, int8 and fp16: for windows, and devices, that the other kernels do not
// have. One warp a tile of queries; keys and values come from global memory, twice for the keys,
// because p is relative to the row's final maximum.
#include <algorithm>

#include "attention_kernels.h"
#include "attention_tile.cuh"

namespace swinq {
namespace {

// The window's tokens, in shared memory.
struct WindowTable {
    const uint32_t* index;
    const uint32_t* region;
    const int* offset;  // y * (2 * window - 1) + x: bias of query minus key is at the difference
    int count;

    __device__ __forceinline__ int clamp(int row) const { return min(row, count - 1); }
};

// A tile of queries of one head: rows g and g + 8 as a lane sees them, and the keys they meet.
template <Type kType>
struct QueryTile {
    using Op = Operand<kType>;

    const WindowTable& window;
    InputRows<kType> keys, values;
    uint32_t q[2][Op::kWords];
    uint32_t region[2];
    const float* bias[2];  // of a key with offset 0
    float factor;          // times log2(e)
    int lane;

    __device__ __forceinline__ QueryTile(const AttentionArguments& a, const WindowTable& window,
                                         int head, int first_row, int lane)
        : window(window), keys(a, head, 1, lane % 4), values(a, head, 2, lane % 4), lane(lane) {
        factor = __fmul_rn(__ldg(a.factor + head), kLog2E);
        const InputRows<kType> queries(a, head, 0, lane % 4);
        const int width = 2 * a.window - 1;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = window.clamp(first_row + lane / 4 + 8 * h);
            queries.load(q[h], window.index[row]);
            region[h] = window.region[row];
            bias[h] = a.bias_table + head * width * width + (a.window - 1) * (width + 1) +
                      window.offset[row];
        }
    }

    __device__ __forceinline__ void load_group(uint32_t (&r)[8], const InputRows<kType>& rows,
                                               int first_key) const {
#pragma unroll
        for (int tile = 0; tile < Op::kGroup; ++tile) {
            const int row = window.clamp(first_key + tile * kTileKeys + lane / 4);
            rows.load(r + tile * Op::kWords, window.index[row]);
        }
    }

    // -inf for keys that do not exist.
    __device__ __forceinline__ void logits(float (&l)[Op::kGroup][4], int first_key,
                                           FiniteCheck<kType>& check) const {
        uint32_t k[8];
        load_group(k, keys, first_key);
        check.see(k);
#pragma unroll
        for (int tile = 0; tile < Op::kGroup; ++tile) {
            typename Op::Sum s[4] = {};
            Op::multiply_keys(s, q, k + tile * Op::kWords);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int key = first_key + tile * kTileKeys + lane % 4 * 2 + c % 2;
                const int row = window.clamp(key);
                const float b = __fmul_rn(__ldg(bias[c / 2] - window.offset[row]), kLog2E);
                float logit = __fmaf_rn(static_cast<float>(s[c]), factor, b);
                logit += window.region[row] != region[c / 2] ? kMaskedLogit : 0.0f;
                l[tile][c] = key < window.count ? logit : -INFINITY;
            }
        }
    }

    __device__ __forceinline__ void attend(WeightedValues<kType>& sums,
                                           FiniteCheck<kType>& check) const {
        constexpr int kKeys = Op::kGroup * kTileKeys;
        float l[Op::kGroup][4];
        float top[2] = {-INFINITY, -INFINITY};
#pragma unroll 1
        for (int first_key = 0; first_key < window.count; first_key += kKeys) {
            logits(l, first_key, check);
#pragma unroll
            for (int i = 0; i < Op::kGroup * 4; ++i) {
                top[i % 4 / 2] = fmaxf(top[i % 4 / 2], l[i / 4][i % 4]);
            }
        }
        top[0] = quad_max(top[0]) - Op::kTop;
        top[1] = quad_max(top[1]) - Op::kTop;
#pragma unroll 1
        for (int first_key = 0; first_key < window.count; first_key += kKeys) {
            logits(l, first_key, check);
            uint32_t v[8];
            load_group(v, values, first_key);
            check.see(v);
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] = transpose_matrix(v[i]);
            Op::order_values(v);
#pragma unroll
            for (int i = 0; i < Op::kGroup * 4; ++i) {
                l[i / 4][i % 4] = exp2_fast(l[i / 4][i % 4] - top[i % 4 / 2]);
            }
            sums.add(l, 2 * Op::kGroup, v);
        }
    }
};

// Grid (heads of the batch, windows of an image, blocks of tiles).
template <Type kType>
__global__ void __launch_bounds__(kMaxAttentionWarps* kWarp)
    attention_generic_kernel(const AttentionArguments a) {
    extern __shared__ uint4 shared_vectors[];
    const int count = a.window * a.window;
    uint32_t* index = reinterpret_cast<uint32_t*>(shared_vectors);
    uint32_t* region = index + count;
    int* offset = reinterpret_cast<int*>(region + count);
    const int image = blockIdx.x / a.heads, head = blockIdx.x - image * a.heads;
    for (int row = threadIdx.x; row < count; row += blockDim.x) {
        const Token token = token_at(a, a.window, image, blockIdx.y, row);
        index[row] = token.index;
        region[row] = token.region;
        offset[row] = row / a.window * (2 * a.window - 1) + row % a.window;
    }
    __syncthreads();
    wait_for_predecessor();
    let_successor_start();

    const int lane = threadIdx.x % kWarp;
    const int warp = blockIdx.z * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    const int first_row = warp * kTileRows;
    if (first_row >= count) return;
    const WindowTable window = {index, region, offset, count};
    const QueryTile<kType> queries(a, window, head, first_row, lane);
    FiniteCheck<kType> check;
    check.see(queries.q[0]);
    check.see(queries.q[1]);
    WeightedValues<kType> sums;
    queries.attend(sums, check);
    const OutputRows output_rows(a, head * kHeadDim + kVector * (lane % 4));
    const float v_scale = kType == Type::kInt8 ? a.v_scale : 1.0f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = first_row + lane / 4 + 8 * h;
        if (row < count) sums.store(output_rows, index[row], v_scale, h);
    }
    check.report(a.status, image);
}

int64_t window_table_bytes(int window) {
    return int64_t{window} * window * 3 * static_cast<int64_t>(sizeof(int));
}

}  // namespace

int64_t attention_shared_bytes(const AttentionArguments& a) {
    return a.type == Type::kFloat || is_small_window(a.window) ? 0 : window_table_bytes(a.window);
}

void attention_generic(const AttentionArguments& a, cudaStream_t stream) {
    const int count = a.window * a.window;
    const int tiles = static_cast<int>(ceil_div(count, kTileRows));
    const int warps = std::min(tiles, kMaxAttentionWarps);
    const dim3 grid(a.batch * a.heads, window_count(a),
                    static_cast<unsigned>(ceil_div(tiles, warps)));
    const auto bytes = static_cast<int>(window_table_bytes(a.window));
    auto kernel = a.type == Type::kInt8 ? attention_generic_kernel<Type::kInt8>
                                        : attention_generic_kernel<Type::kHalf>;
    launch(kernel, grid, dim3(warps * 32), bytes, stream, a);
}

}  // namespace swinq

// prenorm(): a row is read once, normalised in registers and written as the next GEMM's operand.
#include "layernorm.h"
#include "row_statistics.cuh"

namespace swinq {

namespace {

__device__ __forceinline__ void store_operand(const float (&x)[kVector],
                                              const float (&inverse)[kVector], Type operand,
                                              void* out, int64_t at) {
    if (operand == Type::kInt8) {
        store_codes(x, inverse, static_cast<int8_t*>(out) + at);
    } else if (operand == Type::kHalf) {
        Vector<__half> halves;
        halves.pack(x);
        halves.store(static_cast<__half*>(out) + at);
    } else {
        Vector<float> floats;
        floats.pack(x);
        floats.store(static_cast<float*>(out) + at);
    }
}

// Where a row begins in x: with merging, at the upper left one of its four tokens.
__device__ __forceinline__ int64_t row_start(const PrenormArguments& a, int row) {
    if (!a.merge) return static_cast<int64_t>(row) * a.channels;
    const int side = a.resolution / 2;
    const int top = row / side;  // image * side + row of the merged image
    return (static_cast<int64_t>(2 * top) * a.resolution + 2 * (row - top * side)) * a.channels;
}

// Where a column lies in x, from its row's start.
__device__ __forceinline__ int column_offset(const PrenormArguments& a, int column) {
    if (!a.merge) return column;
    const int neighbour = column / a.channels;  // 2 * dx + dy
    return (neighbour % 2 * a.resolution + neighbour / 2) * a.channels + column % a.channels;
}

template <typename T, int kVectors>
__global__ void __launch_bounds__((kResidentThreads<T, kVectors>), 1)
    prenorm_kernel(const PrenormArguments a, const RowLayout layout, const Divisor width) {
    __shared__ float partial[2][kRowWarps];
    const int lane = threadIdx.x & (layout.lanes - 1);
    const int held = layout.held(lane);
    float gamma[kVectors][kVector], beta[kVectors][kVector], inverse[kVectors][kVector];
    int offset[kVectors] = {};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        if (v >= held) continue;
        const int column = (v * layout.lanes + lane) * kVector;
        offset[v] = column_offset(a, column);
        if (a.gamma) load_constants(gamma[v], a.gamma + column);
        if (a.gamma) load_constants(beta[v], a.beta + column);
        if (a.operand == Type::kInt8) load_constants(inverse[v], a.inverse + column);
    }
    wait_for_predecessor();
    let_successor_start();

    auto total = [&](float value, int pass) { return row_sum(value, layout.lanes, partial[pass]); };
    const int stride = gridDim.x * layout.rows_per_block();
    Vector<T> vectors[kVectors];
    auto load = [&](int row) {
        if (row >= layout.rows) return;
        const T* from = static_cast<const T*>(a.x) + row_start(a, row);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            if (v < held) vectors[v].load(from + offset[v]);
        }
    };
    int row = blockIdx.x * layout.rows_per_block() + threadIdx.x / layout.lanes;
    load(row);
    // the block's first row decides, so that all threads meet at barriers and in shuffles
    for (int first = blockIdx.x * layout.rows_per_block(); first < layout.rows;
         first += stride, row += stride) {
        float x[kVectors][kVector];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) vectors[v].unpack(x[v]);
        load(row + stride);  // on its way while this row is computed
        bool finite;
        if (a.gamma) {
            const Statistics s = row_statistics(x, held, width, a.eps, total);
            finite = isfinite(s.mean);
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
#pragma unroll
                for (int i = 0; i < kVector; ++i) {
                    x[v][i] = normalized(x[v][i], s.mean, s.rstd, gamma[v][i], beta[v][i]);
                }
            }
        } else {
            float zero = 0;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
#pragma unroll
                for (int i = 0; i < kVector; ++i) zero = __fmaf_rn(x[v][i], 0.0f, zero);
            }
            finite = zero == 0;
        }
        if (row >= layout.rows) continue;
        if (!finite && a.status) {
            const int side = a.merge ? a.resolution / 2 : a.resolution;
            a.status[row / (side * side)] = 1;
        }
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            if (v >= held) continue;
            const int64_t at =
                static_cast<int64_t>(row) * layout.width + (v * layout.lanes + lane) * kVector;
            store_operand(x[v], inverse[v], a.operand, a.out, at);
        }
    }
}

template <typename T, int kVectors>
void launch_rows(const PrenormArguments& a, const RowLayout& layout, cudaStream_t stream) {
    launch(prenorm_kernel<T, kVectors>, row_blocks(layout, kResidentThreads<T, kVectors>),
           layout.threads(), 0, stream, a, layout, Divisor(layout.width));
}

template <typename T>
void launch_prenorm(const PrenormArguments& a, const RowLayout& layout, cudaStream_t stream) {
    if (layout.vectors == 1) return launch_rows<T, 1>(a, layout, stream);
    if (layout.vectors == 2) return launch_rows<T, 2>(a, layout, stream);
    launch_rows<T, 3>(a, layout, stream);
}

void check(const PrenormArguments& a, int64_t rows) {
    require_matrix("prenorm", rows, a.channels);
    require_pointer("prenorm", "x", a.x);
    require_pointer("prenorm", "out", a.out);
    if (a.gamma) {
        require_pointer("prenorm", "gamma", a.gamma);
        require_pointer("prenorm", "beta", a.beta);
    }
    if (a.operand == Type::kInt8) require_pointer("prenorm", "inverse", a.inverse);
    if (a.stream != Type::kHalf && a.stream != Type::kFloat) {
        refuse_type("prenorm", "stream", a.stream, "half or float");
    }
    if (a.merge && a.resolution % 2 != 0) {
        refuse_argument("prenorm", "resolution is " + std::to_string(a.resolution) + " with merge",
                        "only an even number of tokens a side can be merged");
    }
}

}  // namespace

void prenorm(const PrenormArguments& a, cudaStream_t stream) {
    if (a.batch < 0 || a.resolution <= 0 || a.channels > INT32_MAX / 4) {
        refuse_argument("prenorm",
                        "batch " + std::to_string(a.batch) + ", resolution " +
                            std::to_string(a.resolution) + ", channels " +
                            std::to_string(a.channels),
                        "use positive sizes that fit in memory");
    }
    const int64_t tokens = static_cast<int64_t>(a.resolution) * a.resolution;
    const int64_t rows = a.batch * tokens;
    check(a, rows);
    if (rows == 0) return;
    const RowLayout layout = row_layout("prenorm", static_cast<int>(a.merge ? rows / 4 : rows),
                                        a.merge ? 4 * a.channels : a.channels);
    if (a.stream == Type::kHalf) return launch_prenorm<__half>(a, layout, stream);
    launch_prenorm<float>(a, layout, stream);
}

}  // namespace swinq

// postnorm(): LayerNorm of a layer's output, the residual sum and the next layer's codes at once.
#include "layernorm.h"
#include "row_statistics.cuh"

namespace swinq {

namespace {

template <typename Y, typename T, int kVectors>
__global__ void __launch_bounds__((kResidentThreads<T, kVectors>), 1)
    postnorm_kernel(const PostnormArguments a, const RowLayout layout, const Divisor width) {
    __shared__ float partial[2][kRowWarps];
    const int lane = threadIdx.x & (layout.lanes - 1);
    const int held = layout.held(lane);
    float gamma[kVectors][kVector], beta[kVectors][kVector], inverse[kVectors][kVector];
    float y_scale[kVectors][kVector];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        if (v >= held) continue;
        const int column = (v * layout.lanes + lane) * kVector;
        load_constants(gamma[v], a.gamma + column);
        load_constants(beta[v], a.beta + column);
        if (a.operand) load_constants(inverse[v], a.inverse + column);
        if (sizeof(Y) == 1) load_constants(y_scale[v], a.y_scale + column);
    }
    wait_for_predecessor();
    let_successor_start();

    auto total = [&](float value, int pass) { return row_sum(value, layout.lanes, partial[pass]); };
    const int stride = gridDim.x * layout.rows_per_block();
    auto element = [&](int row, int v) {
        return static_cast<int64_t>(row) * layout.width + (v * layout.lanes + lane) * kVector;
    };
    Vector<Y> y_vectors[kVectors];
    Vector<T> x_vectors[kVectors];
    auto load_y = [&](int row, int v) {
        if (row < layout.rows && v < held) {
            y_vectors[v].load(static_cast<const Y*>(a.y) + element(row, v));
        }
    };
    auto load_x = [&](int row, int v) {
        if (a.residual && row < layout.rows && v < held) {
            x_vectors[v].load(static_cast<const T*>(a.x) + element(row, v));
        }
    };
    int row = blockIdx.x * layout.rows_per_block() + threadIdx.x / layout.lanes;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        load_y(row, v);
        load_x(row, v);
    }
    // the block's first row decides, so that all threads meet at barriers and in shuffles
    for (int first = blockIdx.x * layout.rows_per_block(); first < layout.rows;
         first += stride, row += stride) {
        float y[kVectors][kVector];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            y_vectors[v].unpack(y[v]);
            load_y(row + stride, v);  // on its way while this row is computed
            if (sizeof(Y) == 1 && v < held) {
#pragma unroll
                for (int i = 0; i < kVector; ++i) y[v][i] = __fmul_rn(y[v][i], y_scale[v][i]);
            }
        }
        const Statistics s = row_statistics(y, held, width, a.eps, total);
        if (row >= layout.rows) continue;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            if (v >= held) continue;
            float x[kVector];
            x_vectors[v].unpack(x);
            load_x(row + stride, v);
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                const float normal = normalized(y[v][i], s.mean, s.rstd, gamma[v][i], beta[v][i]);
                x[i] = a.residual ? __fadd_rn(x[i], normal) : normal;
            }
            Vector<T> stored;
            stored.pack(x);
            stored.store(static_cast<T*>(a.x) + element(row, v));
            if (a.operand) {
                stored.unpack(x);
                store_codes(x, inverse[v], a.operand + element(row, v));
            }
        }
    }
}

template <typename Y, typename T, int kVectors>
void launch_rows(const PostnormArguments& a, const RowLayout& layout, cudaStream_t stream) {
    launch(postnorm_kernel<Y, T, kVectors>, row_blocks(layout, kResidentThreads<T, kVectors>),
           layout.threads(), 0, stream, a, layout, Divisor(layout.width));
}

template <typename Y, typename T>
void launch_postnorm(const PostnormArguments& a, const RowLayout& layout, cudaStream_t stream) {
    if (layout.vectors == 1) return launch_rows<Y, T, 1>(a, layout, stream);
    if (layout.vectors == 2) return launch_rows<Y, T, 2>(a, layout, stream);
    launch_rows<Y, T, 3>(a, layout, stream);
}

void check(const PostnormArguments& a) {
    require_matrix("postnorm", a.rows, a.channels);
    if (a.y_type != Type::kInt8 && a.y_type != Type::kFloat) {
        refuse_type("postnorm", "y_type", a.y_type, "int8 or float");
    }
    if (a.stream != Type::kHalf && a.stream != Type::kFloat) {
        refuse_type("postnorm", "stream", a.stream, "half or float");
    }
    require_pointer("postnorm", "y", a.y);
    require_pointer("postnorm", "x", a.x);
    require_pointer("postnorm", "gamma", a.gamma);
    require_pointer("postnorm", "beta", a.beta);
    if (a.y_type == Type::kInt8) require_pointer("postnorm", "y_scale", a.y_scale);
    if (a.operand) {
        require_pointer("postnorm", "operand", a.operand);
        require_pointer("postnorm", "inverse", a.inverse);
    }
}

}  // namespace

void postnorm(const PostnormArguments& a, cudaStream_t stream) {
    check(a);
    if (a.rows == 0) return;
    const RowLayout layout = row_layout("postnorm", a.rows, a.channels);
    const bool codes = a.y_type == Type::kInt8;
    if (a.stream == Type::kHalf) {
        return (codes ? launch_postnorm<int8_t, __half> : launch_postnorm<float, __half>)(a, layout,
                                                                                          stream);
    }
    (codes ? launch_postnorm<int8_t, float> : launch_postnorm<float, float>)(a, layout, stream);
}

}  // namespace swinq

// How weights and scales lie in the plan: host functions from tensors of the checkpoint to the
// layouts that kernels read.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/types.h"

namespace swinq {

constexpr int kRowGroup = 32;  // output channels that are permuted among themselves

// Rows of a laid out weight: n and the zero rows behind it.
constexpr int64_t padded_rows(int64_t n) {
    return ceil_div(n, kRowGroup) * kRowGroup;
}

// The logical channel in physical row p. Within a group of 32, row j*8 + 2*t + e holds channel
// t*8 + j*2 + e (t, j in 0..3, e in 0..1): an mma gives thread t columns 2t and 2t + 1 of each
// eight j, which so are 8 neighbouring channels.
constexpr int64_t channel_of_row(int64_t p) {
    const int64_t q = p % kRowGroup;
    return p - q + (q % 8) / 2 * 8 + q / 8 * 2 + q % 2;
}

// (n, k) of `type` into (padded_rows(n), k), rows permuted, zeros behind.
void gemm_layout(Type type, const void* weight, int64_t n, int64_t k, void* laid_out);

// (rows, heads, head_dim, bytes) into (rows, heads, kHeadDim, bytes), zeros behind each head. For
// rows of qkv: rows 1, heads 3 * heads, bytes those of a row. For columns of proj: bytes of an
// element.
std::vector<uint8_t> pad_heads(const void* data, int64_t rows, int64_t heads, int64_t head_dim,
                               int64_t bytes);

// The same of a vector (heads, head_dim) of fp32.
std::vector<float> pad_heads(const std::vector<float>& vector, int64_t heads);

// fp32(1 / scale); 0 where the scale is 0, so that everything gets code 0.
float inverse_of(float scale);
std::vector<float> inverses(const std::vector<float>& scales);

// `count` scales: those of a vector, or one repeated.
std::vector<float> scale_vector(const float* scale, bool is_vector, int64_t count);

// What one unit of an accumulator is worth: weight_scale[c], times a scalar input scale. A vector
// of input scales is in the weight's columns already.
std::vector<float> gemm_factor(const float* input_scale, bool is_vector, const float* weight_scale,
                               int64_t n);

// The scales of q, k and v as columns of qkv, (3, heads, kHeadDim).
std::vector<float> qkv_scales(const float* q, const float* k, float v, int64_t heads);

// (q_scale * k_scale) * softmax_scale, two products rounded each; (heads).
std::vector<float> attention_factor(const float* q, const float* k, const float* softmax_scale,
                                    int64_t heads);

// ((2W-1)^2, heads) into (heads, (2W-1)^2).
std::vector<float> transposed(const float* table, int64_t rows, int64_t columns);

}  // namespace swinq

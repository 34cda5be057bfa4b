// LayerNorm and what surrounds it: csrc/NUMERICS.md, "LayerNorm". Statistics are fp32, two passes
// over registers; a row is read once.
#pragma once

#include "types.h"

namespace swinq {

// operand := LayerNorm(x) [v1: norm1, norm2], or of four neighbours [v1: merge], or x itself
// [v2: merge, first block], quantized or rounded for the GEMM that reads it.
struct PrenormArguments {
    Type stream;           // of x: kHalf or kFloat
    Type operand;          // of out: kInt8 (quantize by inverse[c]), kHalf, kFloat
    const void* x;         // (batch * resolution^2, channels)
    void* out;             // (rows, width)
    const float* gamma;    // (width); null: no norm, out is x itself
    const float* beta;     // (width)
    const float* inverse;  // (width), kInt8 only
    int* status;           // (batch) or null: set to 1 where an image holds a non-finite number
    float eps;
    int batch, resolution, channels;
    bool merge;  // width = 4 * channels: (dx, dy, channel), half the resolution
};

void prenorm(const PrenormArguments& arguments, cudaStream_t stream);

// x := T(x + LayerNorm(y)) or, without residual, x := T(LayerNorm(y)), T the stream's type; and, if
// wanted, operand := quantize(x) for the layer that reads x next [v2: norm1, norm2, merge].
struct PostnormArguments {
    Type y_type;           // kInt8: y = code * y_scale[c]; kFloat
    Type stream;           // of x: kHalf or kFloat
    const void* y;         // (rows, channels)
    const float* y_scale;  // (channels), kInt8 only
    void* x;               // (rows, channels), read only if `residual`
    int8_t* operand;       // (rows, channels) or null
    const float* inverse;  // (channels), with operand
    const float* gamma;    // (channels)
    const float* beta;     // (channels)
    float eps;
    int rows, channels;
    bool residual;
};

void postnorm(const PostnormArguments& arguments, cudaStream_t stream);

// pooled := T(mean over an image's tokens of LayerNorm(x)), T the type of x; NaN for an image whose
// status is set or that holds a non-finite number, so that its logits are NaN.
struct PoolArguments {
    Type stream;    // of x and pooled
    const void* x;  // (batch * tokens, channels)
    void* pooled;   // (batch, channels)
    const float* gamma;
    const float* beta;
    const int* status;  // (batch) or null
    float eps;
    int batch, tokens, channels;
};

void pool(const PoolArguments& arguments, cudaStream_t stream);

}  // namespace swinq

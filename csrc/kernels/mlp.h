// The MLP of a block in one kernel (sm_90): v1's LayerNorm, fc1, GELU, fc2, residual, or v2's fc1,
// GELU, fc2, LayerNorm, residual, codes. The hidden layer never leaves the chip. Same equations,
// same codes as the separate kernels; v2's has their bits.
#pragma once

#include "types.h"

namespace swinq {

struct MlpArguments {
    void* x;                      // (m, channels) fp16, read and written
    const float* gamma;           // (channels)
    const float* beta;            // (channels)
    const float* in_inverse;      // (channels), v1: codes of LayerNorm(x)
    int8_t* operand;              // (m, channels), v2: codes of x, read; null in v1
    const float* next_inverse;    // (channels) or null, v2: codes of the new x, into operand
    const int8_t* fc1_weight;     // mlp_layout_fc1()
    const float* fc1_factor;      // (hidden)
    const float* fc1_bias;        // (hidden)
    const float* hidden_inverse;  // (hidden): codes of GELU
    const int8_t* fc2_weight;     // mlp_layout_fc2()
    const float* fc2_factor;      // (channels)
    const float* fc2_bias;        // (channels)
    const float* out_inverse;     // (channels) or null: mode 1's rounding of y
    const float* out_scale;       // (channels) or null
    float eps;
    int m, channels, hidden;
};

// Whether this device and these sizes have the kernel.
bool mlp_supported(int channels, int hidden);
// Rows up to which v2's separate kernels are faster; v1 has a form of its own for few.
int mlp_few_rows_v2();
void mlp(const MlpArguments& arguments, cudaStream_t stream);

// Host side, at plan time: weights (hidden, channels) and (channels, hidden) into the kernel's
// order, in buffers of the same size.
void mlp_layout_fc1(const int8_t* weight, int channels, int hidden, int8_t* laid_out);
void mlp_layout_fc2(const int8_t* weight, int channels, int hidden, int8_t* laid_out);

}  // namespace swinq

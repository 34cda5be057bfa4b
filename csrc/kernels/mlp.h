// The MLP of a v1 block in one kernel (sm_90): LayerNorm, fc1, GELU, fc2, residual. The hidden
// layer never leaves the chip. Same equations, same codes as the separate kernels.
#pragma once

#include "types.h"

namespace swinq {

struct MlpArguments {
    void* x;                      // (m, channels) fp16, read and written
    const float* gamma;           // (channels)
    const float* beta;            // (channels)
    const float* in_inverse;      // (channels): codes of LayerNorm(x)
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
void mlp(const MlpArguments& arguments, cudaStream_t stream);

// Host side, at plan time: weights (hidden, channels) and (channels, hidden) into the kernel's
// order, in buffers of the same size.
void mlp_layout_fc1(const int8_t* weight, int channels, int hidden, int8_t* laid_out);
void mlp_layout_fc2(const int8_t* weight, int channels, int hidden, int8_t* laid_out);

}  // namespace swinq

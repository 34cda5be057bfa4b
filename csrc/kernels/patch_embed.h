// Patch embedding: a strided convolution as an fp16 (or fp32) GEMM over the pixels of a patch, then
// LayerNorm: csrc/NUMERICS.md, "Patch embedding".
#pragma once

#include "types.h"

namespace swinq {

struct PatchEmbedArguments {
    Type image_type;       // kHalf or kFloat
    Type stream;           // kHalf: pixels and weights are rounded to fp16; kFloat: fp32 throughout
    const void* images;    // (batch, in_chans, img_size, img_size)
    const void* weight;    // (channels, in_chans * patch_size^2) of the stream's type
    const float* bias;     // (channels)
    const float* gamma;    // (channels)
    const float* beta;     // (channels)
    void* x;               // (batch * tokens, channels) of the stream's type
    int8_t* operand;       // (batch * tokens, channels) or null: quantize(x) [v2's first qkv]
    const float* inverse;  // (channels), with operand
    int* status;  // (batch) or null: written here first: 1 where an image is non-finite, else 0
    float eps;
    int batch, in_chans, img_size, patch_size, channels;
};

// Dynamic shared memory that its kernel wants of a block, in bytes; what it is for must be set.
int64_t patch_embed_shared_bytes(const PatchEmbedArguments& arguments);

// Enqueues one or two kernels: `status` is cleared before it is set.
void patch_embed(const PatchEmbedArguments& arguments, cudaStream_t stream);

}  // namespace swinq

// Attention within (shifted) windows: csrc/NUMERICS.md, "Attention". Tokens stay in image order;
// which window a token belongs to is index arithmetic. The shift mask is a comparison of region
// numbers.
#pragma once

#include "types.h"

namespace swinq {

struct AttentionArguments {
    Type type;                // of qkv: kInt8 codes, kHalf or kFloat
    Type out_type;            // kInt8: quantize(o, out_inverse[c]); kHalf; kFloat
    const void* qkv;          // (batch * resolution^2, 3, heads, 32), 16-byte aligned
    void* out;                // (batch * resolution^2, heads, 32)
    const float* bias_table;  // (heads, (2 * window - 1)^2) fp32: see docs/checkpoint-format.md
    const float* bias;  // windows of <= 64 tokens: the table expanded by expand_bias(); else null
    const float*
        factor;     // (heads): s = S * factor + bias. kInt8: (q_scale * k_scale) * softmax_scale
    float v_scale;  // kInt8 only
    const float* out_inverse;                     // (heads * 32), out_type kInt8 only
    int batch, resolution, window, shift, heads;  // window divides resolution; shift 0: no mask
    int* status;  // (batch) or null: set to 1 where q, k or v of an image is not finite
};

void attention(const AttentionArguments& arguments, cudaStream_t stream);

// Dynamic shared memory that its kernel cannot do without, in bytes of a block.
int64_t attention_shared_bytes(const AttentionArguments& arguments);

// Host side, at plan time: floats that expand_bias() writes (0 where the kernel reads the table
// itself), and the expansion of a table (heads, (2 * window - 1)^2) into the kernel's own order.
int64_t expanded_bias_size(int window, int heads);
void expand_bias(const float* table, int window, int heads, float* expanded);

}  // namespace swinq

// y = a w^T with everything that follows up to the next tensor in memory: csrc/NUMERICS.md, "GEMM".
//
// Weights come as the plan lays them out (engine/weights.h): rows of each group of 32 output
// channels permuted so that a thread's accumulators are 8 neighbouring channels, and padded with
// zero rows to a multiple of 32.
#pragma once

#include "types.h"

namespace swinq {

enum class Activation : int {
    kNone = 0,
    kGelu = 1,
    kNormalize = 2,  // v2: divide each head's 32 channels by their norm, in the first 2/3 of n
};

// What becomes of y (after the activation), all in (m, n) row-major.
enum class Output : int {
    kCodes = 0,     // s8: quantize(y, out_inverse[c])
    kHalf = 1,      // fp16(y)
    kFloat = 2,     // y
    kResidual = 3,  // stream := T(stream + y), T the stream's type
    kStream = 4,    // stream := T(y)
};

struct GemmArguments {
    Type operand;  // of a and w
    Type stream;   // of `out` in kResidual and kStream: kHalf or kFloat
    Activation activation;
    Output output;
    const void* a;        // (m, k) row-major, 16-byte aligned
    const void* w;        // (n padded to 32, k) in the plan's layout
    void* out;            // (m, n); never overlaps a
    const float* factor;  // (n): s8 only, y = fma(acc, factor[c], bias[c]); else y = acc + bias
    const float* bias;    // (n)
    const float* out_inverse;  // (n): kCodes; or, with out_scale, the rounding of y to int8
    const float* out_scale;    // (n) or null: kResidual, kStream: y := quantize(y) * out_scale[c]
    int m, n, k;               // k a multiple of 16 bytes, n of 8

    // v2: y := LayerNorm(y) before the output, and the codes of x for the layer that reads it next.
    // Half operands, kResidual and kStream of a half stream, where can_normalize(n).
    bool has_norm;
    const float* norm_gamma;  // (n)
    const float* norm_beta;   // (n)
    float norm_eps;
    int8_t* norm_operand;       // (m, n) or null: quantize(x)
    const float* norm_inverse;  // (n), with norm_operand
};

// Tile of one block. `instruction` 0: mma.sync, 1: wgmma (sm_90 only).
struct GemmTile {
    int instruction, rows, columns;
};

// Enqueues the product. `tile` null: the default for this shape and device.
void gemm(const GemmArguments& arguments, const GemmTile* tile, cudaStream_t stream);

// Whether gemm() on this device can normalize rows of n.
bool can_normalize(Type operand, int n);

// The default tile, and all that exist for these arguments on this device (for tuning).
GemmTile default_tile(const GemmArguments& arguments);
int list_tiles(const GemmArguments& arguments, GemmTile* tiles, int capacity);

}  // namespace swinq

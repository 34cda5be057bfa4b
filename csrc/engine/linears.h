// The linear layers of a model as they lie on the device, each laid out for the kernel that runs
// it.
#pragma once

#include <limits>
#include <map>
#include <string>

#include "engine/arena.h"
#include "engine/model.h"

namespace swinq {

// Heads are padded to kHeadDim channels: qkv has 3 * heads * kHeadDim rows, proj as many columns by
// three. Pointers that its precision or its kernel does not need are null.
struct Linear {
    Type type;
    int n, k;
    const void* weight;        // for gemm()
    const int8_t* mlp_weight;  // for mlp()
    const float* bias;         // (n)
    const float* factor;       // (n), int8
    const float* in_inverse;   // (k), int8: turns what the layer reads into codes
    const float* out_inverse;  // (n), where the output is rounded to int8
    const float* out_scale;
};

using Linears = std::map<std::string, Linear>;

constexpr int kAnyBatch = std::numeric_limits<int>::max();

// The largest batch whose MLP of this block runs in separate kernels on this device; larger ones
// take the fused kernel. `fuse` is the plan's option.
int most_for_separate_mlp(const Model& model, const Stage& stage, const std::string& block,
                          bool fuse);

Linears add_linears(const Model& model, bool fuse_mlp, Arena& arena);

// The head, its rows padded with zeros to a multiple of 8.
Linear add_head_linear(const Model& model, Arena& arena);

}  // namespace swinq

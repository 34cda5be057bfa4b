// Every layer, name, type and shape of a model's tensors, derived from what the model says it is:
// the counterpart of swinq/export/format.py (docs/checkpoint-format.md).
#pragma once

#include <map>
#include <string>
#include <vector>

#include "engine/architecture.h"

namespace swinq {

enum class LayerKind { kAttention, kQkv, kProj, kFc1, kFc2, kReduction };

// Something with a precision of its own: a linear layer, or the arithmetic of an attention.
struct Layer {
    std::string name;
    LayerKind kind;
    int stage;
    int in, out;
    int heads, window;  // 0 for a reduction
};

// What one tensor must look like; any one of the shapes.
struct TensorSpec {
    swinq_type type;
    std::vector<std::vector<int64_t>> shapes;
    bool is_scale;  // 0, or from 2^-126 to 2^14
};

using PrecisionTable = std::map<std::string, swinq_precision>;

std::string block_name(int stage, int block);  // layers.S.blocks.B
std::string merge_name(int stage);             // layers.S.downsample
const char* type_name(swinq_type type);        // as torch says it
const char* precision_name(swinq_precision precision);
std::string shape_text(const std::vector<int64_t>& shape);

// Every layer with a precision of its own, in the order in which the model runs them.
std::vector<Layer> layers(const swinq_architecture& architecture);

// The element type of a layer's weight, or of q, k and v.
swinq_type element_type(swinq_precision precision);

// Whether the layer's output is rounded to int8 before it reaches the residual stream.
bool is_rounded(LayerKind kind, swinq_precision precision);

// Throws unless the table names every layer and no other, each with a precision that it may have:
// INT8_UNROUNDED only for proj, fc2 and reduction; FP32 for all layers or none.
void validate_precisions(const swinq_architecture& architecture, const PrecisionTable& precisions);

// Name -> form of every tensor that there must be, and no other.
std::map<std::string, TensorSpec> expected_tensors(const swinq_architecture& architecture,
                                                   const PrecisionTable& precisions);

}  // namespace swinq

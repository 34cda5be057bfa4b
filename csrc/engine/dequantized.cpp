// Int8 layers as floats: see dequantized.h; docs/numerics.md has what they compute.
#include "engine/dequantized.h"

#include <cuda_fp16.h>

#include <algorithm>

#include "engine/weights.h"

namespace swinq {
namespace {

std::vector<float> widened(const swinq_tensor& tensor) {
    const auto count = static_cast<size_t>(element_count(tensor));
    switch (tensor.type) {
        case SWINQ_INT8: {
            const auto* codes = static_cast<const int8_t*>(tensor.data);
            return std::vector<float>(codes, codes + count);
        }
        case SWINQ_HALF: {
            const auto* halves = static_cast<const __half*>(tensor.data);
            std::vector<float> values(count);
            std::transform(halves, halves + count, values.begin(),
                           [](__half x) { return __half2float(x); });
            return values;
        }
        default: {
            const auto* values = static_cast<const float*>(tensor.data);
            return std::vector<float>(values, values + count);
        }
    }
}

}  // namespace

Dequantized::Dequantized(const Model& model)
    : architecture_(model.architecture()), layers_(layers(model.architecture())) {
    PrecisionTable in_fp32;
    for (const Layer& layer : layers_) {
        in_fp32[layer.name] = SWINQ_PRECISION_FP32;
        precisions_.push_back({layer.name.c_str(), SWINQ_PRECISION_FP32});
    }
    const std::map<std::string, TensorSpec> wanted = expected_tensors(architecture_, in_fp32);
    for (const auto& entry : wanted) {
        values_[entry.first] = widened(model.tensor(entry.first));
    }
    for (const Layer& layer : layers_) {
        if (layer.kind != LayerKind::kAttention && model.type(layer.name) == Type::kInt8) {
            dequantize(model, layer);
        }
        kill_dead_channels(model, layer);
    }
    for (const auto& [name, values] : values_) {
        swinq_tensor tensor = model.tensor(name);  // the shape is the same
        tensor.name = name.c_str();
        tensor.type = SWINQ_FLOAT;
        tensor.data = values.data();
        tensors_.push_back(tensor);
    }
}

// Codes to the weights that a float input meets. A vector of input scales lies in the columns
// already and comes out of them; an input whose scale is 0 has no codes but 0 and counts for
// nothing.
void Dequantized::dequantize(const Model& model, const Layer& layer) {
    Values& weight = values_.at(layer.name + ".weight");
    const float* row_scale = model.floats(layer.name + ".weight_scale");
    const float* input_scale = model.floats(layer.name + ".input_scale");
    const bool is_vector = model.tensor(layer.name + ".input_scale").rank == 1;
    size_t at = 0;
    for (int row = 0; row < layer.out; ++row) {
        for (int column = 0; column < layer.in; ++column, ++at) {
            const float scale = input_scale[is_vector ? column : 0];
            const float unit = is_vector ? inverse_of(scale) : scale == 0.0f ? 0.0f : 1.0f;
            weight[at] *= row_scale[row] * unit;
        }
    }
}

// What is rounded with the scale 0 is 0, bias included.
void Dequantized::kill_dead_channels(const Model& model, const Layer& layer) {
    if (layer.kind == LayerKind::kAttention) {
        if (model.type(layer.name) != Type::kInt8) {
            return;
        }
        const float* q_scale = model.floats(layer.name + ".q_scale");
        const float* k_scale = model.floats(layer.name + ".k_scale");
        const float v_scale = *model.floats(layer.name + ".v_scale");
        const int head_dim = layer.in / layer.heads;
        for (int channel = 0; channel < 3 * layer.in; ++channel) {
            const int part = channel / layer.in, head = channel % layer.in / head_dim;
            if ((part == 0 ? q_scale[head] : part == 1 ? k_scale[head] : v_scale) == 0.0f) {
                kill(layer.name + ".qkv", channel);
            }
        }
    } else if (is_rounded(layer.kind, model.precision(layer.name))) {
        const float* output_scale = model.floats(layer.name + ".output_scale");
        for (int channel = 0; channel < layer.out; ++channel) {
            if (output_scale[channel] == 0.0f) {
                kill(layer.name, channel);
            }
        }
    }
}

void Dequantized::kill(const std::string& layer, int64_t channel) {
    Values& weight = values_.at(layer + ".weight");
    Values& bias = values_.at(layer + ".bias");
    const auto row = static_cast<int64_t>(weight.size() / bias.size());
    std::fill_n(weight.begin() + channel * row, row, 0.0f);
    bias[static_cast<size_t>(channel)] = 0.0f;
}

swinq_model Dequantized::model() const {
    return {architecture_, tensors_.data(), tensors_.size(), precisions_.data(),
            precisions_.size()};
}

}  // namespace swinq

// Codes taken back to floats: the made-up model of codes becomes the made-up model of floats, and
// what a scale of 0 or a vector of scales does to it.
#include <cuda_fp16.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "engine/dequantized.h"
#include "engine/error.h"
#include "programs/made_up_model.h"
#include "tests/engine_test.h"

namespace swinq::testing {
namespace {

using programs::MadeUpModel;
using programs::Numbers;
using Values = std::vector<float>;

// Two stages with heads of 16 channels, so that a head is not a layer.
swinq_architecture small_architecture(int version) {
    swinq_architecture a = programs::architecture_of(version, programs::Size::kTiny, 4, 32);
    a.stages = 2;
    a.embed_dim = 32;
    for (int stage = 0; stage < a.stages; ++stage) {
        a.depths[stage] = 2;
        a.num_heads[stage] = 2 << stage;
    }
    return a;
}

std::map<std::string, Values> floats_of(const swinq_model& model) {
    std::map<std::string, Values> values;
    for (size_t i = 0; i < model.tensor_count; ++i) {
        const swinq_tensor& tensor = model.tensors[i];
        check(tensor.type == SWINQ_FLOAT, text(tensor.name, " is fp32"));
        const auto* data = static_cast<const float*>(tensor.data);
        values[tensor.name] = Values(data, data + element_count(tensor));
    }
    return values;
}

std::map<std::string, Values> dequantized(const swinq_model& model) {
    const Dequantized made{Model(model)};
    const Model accepted(made.model());  // names, shapes and precisions are those of a model
    check(accepted.stream() == Type::kFloat, "all layers are fp32");
    return floats_of(made.model());
}

// The model of codes with other numbers in one tensor, dequantized.
std::map<std::string, Values> with(const swinq_model& model, const std::string& name,
                                   const Values& values, int rank) {
    std::vector<swinq_tensor> tensors(model.tensors, model.tensors + model.tensor_count);
    for (swinq_tensor& tensor : tensors) {
        if (tensor.name == name) {
            tensor.rank = rank;
            tensor.shape[0] = static_cast<int64_t>(values.size());
            tensor.data = values.data();
        }
    }
    swinq_model changed = model;
    changed.tensors = tensors.data();
    return dequantized(changed);
}

// `wanted` with zeros in some rows of a layer and of its bias.
std::map<std::string, Values> without_rows(std::map<std::string, Values> wanted,
                                           const std::string& layer, size_t first, size_t count) {
    Values &weight = wanted.at(layer + ".weight"), &bias = wanted.at(layer + ".bias");
    const size_t row = weight.size() / bias.size();
    for (size_t c = first; c < first + count; ++c) {
        std::fill_n(weight.begin() + static_cast<std::ptrdiff_t>(c * row), row, 0.0f);
        bias[c] = 0;
    }
    return wanted;
}

void test_scales_of(int version, const swinq_model& codes,
                    const std::map<std::string, Values>& floats) {
    const std::string block = "layers.0.blocks.1.", fc1 = block + "mlp.fc1";
    const std::string attention = block + "attn", proj = attention + ".proj";
    auto same = [&](const std::map<std::string, Values>& found,
                    const std::map<std::string, Values>& wanted,
                    const char* what) { check(found == wanted, text("v", version, ": ", what)); };

    std::map<std::string, Values> wanted = floats;
    Values scales(32);
    for (size_t i = 0; i < scales.size(); ++i) {
        scales[i] = i == 3 ? 0.0f : static_cast<float>(1 << i % 5);
    }
    Values& weight = wanted.at(fc1 + ".weight");
    for (size_t i = 0; i < weight.size(); ++i) {  // powers of two: exact in any order
        const float scale = scales[i % scales.size()];
        weight[i] = scale == 0.0f ? 0.0f : weight[i] / scale;
    }
    same(with(codes, fc1 + ".input_scale", scales, 1), wanted, "scales of input channels");

    wanted = floats;
    std::fill(wanted.at(fc1 + ".weight").begin(), wanted.at(fc1 + ".weight").end(), 0.0f);
    same(with(codes, fc1 + ".input_scale", {0}, 0), wanted, "an input that has no codes");

    scales.assign(32, 1);
    scales[5] = 0;
    same(with(codes, proj + ".output_scale", scales, 1), without_rows(floats, proj, 5, 1),
         "an output channel that is rounded to 0");
    const std::string qkv = attention + ".qkv";
    same(with(codes, attention + ".q_scale", {1, 0}, 1), without_rows(floats, qkv, 16, 16),
         "queries of the second head");
    same(with(codes, attention + ".k_scale", {0, 1}, 1), without_rows(floats, qkv, 32, 16),
         "keys of the first head");
    same(with(codes, attention + ".v_scale", {0}, 0), without_rows(floats, qkv, 64, 32),
         "all values");
}

}  // namespace

void test_dequantized() {
    for (int version : {1, 2}) {
        const swinq_architecture a = small_architecture(version);
        const MadeUpModel in_floats(a, Numbers::kFloat), in_halves(a, Numbers::kHalf);
        const std::map<std::string, Values> floats = floats_of(in_floats.model());
        for (Numbers numbers : {Numbers::kInt8Mode1, Numbers::kInt8Mode2}) {
            const MadeUpModel in_codes(a, numbers);
            check(dequantized(in_codes.model()) == floats, text("v", version, ": codes to floats"));
            test_scales_of(version, in_codes.model(), floats);
        }
        std::map<std::string, Values> rounded = floats;
        for (const Layer& layer : layers(a)) {
            if (layer.kind == LayerKind::kAttention) {
                continue;
            }
            for (float& value : rounded.at(layer.name + ".weight")) {
                value = __half2float(__float2half_rn(value));
            }
        }
        check(dequantized(in_halves.model()) == rounded, text("v", version, ": halves to floats"));
        check(dequantized(in_floats.model()) == floats, text("v", version, ": floats stay"));
    }
}

}  // namespace swinq::testing

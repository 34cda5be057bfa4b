// Every tensor of a model: see format.h.
#include "engine/format.h"

#include "engine/error.h"

namespace swinq {
namespace {

using Specs = std::map<std::string, TensorSpec>;

TensorSpec fp32(std::vector<int64_t> shape) {
    return {SWINQ_FLOAT, {std::move(shape)}, false};
}

TensorSpec scale(std::vector<int64_t> shape) {
    return {SWINQ_FLOAT, {std::move(shape)}, true};
}

void add_norm(Specs& specs, const std::string& name, int64_t width) {
    specs[name + ".weight"] = fp32({width});
    specs[name + ".bias"] = fp32({width});
}

void add_linear(Specs& specs, const Layer& layer, swinq_precision precision) {
    const swinq_type type = element_type(precision);
    specs[layer.name + ".weight"] = {type, {{layer.out, layer.in}}, false};
    specs[layer.name + ".bias"] = fp32({layer.out});
    if (type != SWINQ_INT8) {
        return;
    }
    specs[layer.name + ".weight_scale"] = scale({layer.out});
    specs[layer.name + ".input_scale"] = {SWINQ_FLOAT, {{}, {layer.in}}, true};
    if (is_rounded(layer.kind, precision)) {
        specs[layer.name + ".output_scale"] = scale({layer.out});
    }
}

void add_attention(Specs& specs, const Layer& layer, swinq_precision precision) {
    const int64_t side = 2 * layer.window - 1;
    specs[layer.name + ".relative_position_bias_table"] = fp32({side * side, layer.heads});
    specs[layer.name + ".softmax_scale"] = fp32({layer.heads});
    if (precision == SWINQ_PRECISION_INT8) {
        specs[layer.name + ".q_scale"] = scale({layer.heads});
        specs[layer.name + ".k_scale"] = scale({layer.heads});
        specs[layer.name + ".v_scale"] = scale({});
    }
}

bool writes_stream(LayerKind kind) {
    return kind == LayerKind::kProj || kind == LayerKind::kFc2 || kind == LayerKind::kReduction;
}

}  // namespace

std::string block_name(int stage, int block) {
    return text("layers.", stage, ".blocks.", block);
}

std::string merge_name(int stage) {
    return text("layers.", stage, ".downsample");
}

const char* type_name(swinq_type type) {
    return type == SWINQ_INT8 ? "int8" : type == SWINQ_HALF ? "float16" : "float32";
}

const char* precision_name(swinq_precision precision) {
    switch (precision) {
        case SWINQ_PRECISION_INT8:
            return "int8";
        case SWINQ_PRECISION_INT8_UNROUNDED:
            return "int8-unrounded";
        case SWINQ_PRECISION_FP16:
            return "fp16";
        default:
            return "fp32";
    }
}

std::string shape_text(const std::vector<int64_t>& shape) {
    std::string out = "[";
    for (size_t i = 0; i < shape.size(); ++i) {
        out += (i ? ", " : "") + std::to_string(shape[i]);
    }
    return out + "]";
}

std::vector<Layer> layers(const swinq_architecture& architecture) {
    std::vector<Layer> found;
    for (const Stage& s : stages(architecture)) {
        for (int block = 0; block < s.depth; ++block) {
            const std::string name = block_name(s.index, block);
            auto add = [&](const char* suffix, LayerKind kind, int in, int out) {
                found.push_back({name + suffix, kind, s.index, in, out, s.heads, s.window});
            };
            add(".attn", LayerKind::kAttention, s.dim, s.dim);
            add(".attn.qkv", LayerKind::kQkv, s.dim, 3 * s.dim);
            add(".attn.proj", LayerKind::kProj, s.dim, s.dim);
            add(".mlp.fc1", LayerKind::kFc1, s.dim, s.hidden);
            add(".mlp.fc2", LayerKind::kFc2, s.hidden, s.dim);
        }
        if (s.merges) {
            found.push_back({merge_name(s.index) + ".reduction", LayerKind::kReduction, s.index,
                             4 * s.dim, 2 * s.dim, 0, 0});
        }
    }
    return found;
}

swinq_type element_type(swinq_precision precision) {
    return precision == SWINQ_PRECISION_FP32   ? SWINQ_FLOAT
           : precision == SWINQ_PRECISION_FP16 ? SWINQ_HALF
                                               : SWINQ_INT8;
}

bool is_rounded(LayerKind kind, swinq_precision precision) {
    return precision == SWINQ_PRECISION_INT8 && writes_stream(kind);
}

void validate_precisions(const swinq_architecture& architecture, const PrecisionTable& precisions) {
    const std::vector<Layer> wanted = layers(architecture);
    size_t in_fp32 = 0;
    for (const Layer& layer : wanted) {
        const auto found = precisions.find(layer.name);
        if (found == precisions.end()) {
            refuse(text("precision: ", layer.name, ": no precision given"),
                   "give every layer of the model a precision");
        }
        const swinq_precision precision = found->second;
        if (precision == SWINQ_PRECISION_INT8_UNROUNDED && !writes_stream(layer.kind)) {
            refuse(text("precision: ", layer.name, ": 'int8-unrounded', wanted int8 or fp16"),
                   "only proj, fc2 and reduction have an output that could be rounded");
        }
        in_fp32 += precision == SWINQ_PRECISION_FP32;
    }
    if (precisions.size() > wanted.size()) {
        std::map<std::string, bool> known;
        for (const Layer& layer : wanted) {
            known[layer.name] = true;
        }
        for (const auto& entry : precisions) {
            if (known.count(entry.first) == 0) {
                refuse(text("precision: ", entry.first, ": not a layer of this model"),
                       "leave it out");
            }
        }
    }
    if (in_fp32 != 0 && in_fp32 != wanted.size()) {
        refuse(text("precision: ", in_fp32, " of ", wanted.size(), " layers are fp32"),
               "run all layers in fp32 or none");
    }
}

Specs expected_tensors(const swinq_architecture& a, const PrecisionTable& precisions) {
    const bool in_fp32 = precisions.begin()->second == SWINQ_PRECISION_FP32;
    const swinq_type stream = in_fp32 ? SWINQ_FLOAT : SWINQ_HALF;
    Specs specs;
    specs["patch_embed.proj.weight"] = {
        stream, {{a.embed_dim, a.in_chans, a.patch_size, a.patch_size}}, false};
    specs["patch_embed.proj.bias"] = fp32({a.embed_dim});
    add_norm(specs, "patch_embed.norm", a.embed_dim);
    int last = 0;
    for (const Stage& s : stages(a)) {
        for (int block = 0; block < s.depth; ++block) {
            add_norm(specs, block_name(s.index, block) + ".norm1", s.dim);
            add_norm(specs, block_name(s.index, block) + ".norm2", s.dim);
        }
        if (s.merges) {
            add_norm(specs, merge_name(s.index) + ".norm", (a.version == 1 ? 4 : 2) * s.dim);
        }
        last = s.dim;
    }
    for (const Layer& layer : layers(a)) {
        const swinq_precision precision = precisions.at(layer.name);
        if (layer.kind == LayerKind::kAttention) {
            add_attention(specs, layer, precision);
        } else {
            add_linear(specs, layer, precision);
        }
    }
    add_norm(specs, "norm", last);
    specs["head.weight"] = {stream, {{a.num_classes, last}}, false};
    specs["head.bias"] = fp32({a.num_classes});
    return specs;
}

}  // namespace swinq

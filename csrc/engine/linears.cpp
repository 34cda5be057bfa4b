// The linear layers on the device: see linears.h.
#include "engine/linears.h"

#include "engine/weights.h"
#include "kernels/mlp.h"

namespace swinq {
namespace {

std::vector<float> values(const Model& model, const std::string& name) {
    const float* data = model.floats(name);
    return std::vector<float>(data, data + element_count(model.tensor(name)));
}

const void* add_weight(const Model& model, const Layer& layer, const Linear& linear, Arena& arena) {
    const void* data = model.tensor(layer.name + ".weight").data;
    const int64_t size = size_of(linear.type);
    const int64_t row_bytes = linear.k * size;
    return arena.add<uint8_t>(padded_rows(linear.n) * row_bytes, [&](uint8_t* out) {
        std::vector<uint8_t> padded;
        if (layer.kind == LayerKind::kQkv) {
            padded = pad_heads(data, 1, 3 * layer.heads, layer.in / layer.heads, row_bytes);
        } else if (layer.kind == LayerKind::kProj) {
            padded = pad_heads(data, linear.n, layer.heads, layer.in / layer.heads, size);
        }
        gemm_layout(linear.type, padded.empty() ? data : padded.data(), linear.n, linear.k, out);
    });
}

const int8_t* add_mlp_weight(const Model& model, const Layer& layer, Arena& arena) {
    const auto* data = static_cast<const int8_t*>(model.tensor(layer.name + ".weight").data);
    return arena.add<int8_t>(static_cast<int64_t>(layer.in) * layer.out, [&](int8_t* out) {
        if (layer.kind == LayerKind::kFc1) {
            mlp_layout_fc1(data, layer.in, layer.out, out);
        } else {
            mlp_layout_fc2(data, layer.out, layer.in, out);
        }
    });
}

Linear add_linear(const Model& model, const Layer& layer, bool separate, bool fused, Arena& arena) {
    const std::string& name = layer.name;
    const bool is_qkv = layer.kind == LayerKind::kQkv;
    const bool is_proj = layer.kind == LayerKind::kProj;
    Linear linear = {};
    linear.type = model.type(name);
    linear.n = is_qkv ? 3 * layer.heads * kHeadDim : layer.out;
    linear.k = is_proj ? layer.heads * kHeadDim : layer.in;
    if (fused) {
        linear.mlp_weight = add_mlp_weight(model, layer, arena);
    }
    if (separate) {
        linear.weight = add_weight(model, layer, linear, arena);
    }
    auto add_rows = [&](const std::vector<float>& vector) {
        return arena.add(is_qkv ? pad_heads(vector, 3 * layer.heads) : vector);
    };
    linear.bias = add_rows(values(model, name + ".bias"));
    if (linear.type != Type::kInt8) {
        return linear;
    }
    const float* in_scale = model.floats(name + ".input_scale");
    const bool is_vector = model.tensor(name + ".input_scale").rank == 1;
    const float* weight_scale = model.floats(name + ".weight_scale");
    linear.factor = add_rows(gemm_factor(in_scale, is_vector, weight_scale, layer.out));
    const std::vector<float> inverse = inverses(scale_vector(in_scale, is_vector, layer.in));
    linear.in_inverse = arena.add(is_proj ? pad_heads(inverse, layer.heads) : inverse);
    if (is_rounded(layer.kind, model.precision(name))) {
        const std::vector<float> scale = values(model, name + ".output_scale");
        linear.out_inverse = arena.add(inverses(scale));
        linear.out_scale = arena.add(scale);
    }
    return linear;
}

}  // namespace

int most_for_separate_mlp(const Model& model, const Stage& stage, const std::string& block,
                          bool fuse) {
    const bool has_kernel =
        model.stream() == Type::kHalf && model.type(block + ".mlp.fc1") == Type::kInt8 &&
        model.type(block + ".mlp.fc2") == Type::kInt8 && mlp_supported(stage.dim, stage.hidden);
    if (!fuse || !has_kernel) {
        return kAnyBatch;
    }
    const int64_t few = model.architecture().version == 1 ? 0 : mlp_few_rows_v2();
    return static_cast<int>(few / stage.tokens());
}

Linears add_linears(const Model& model, bool fuse_mlp, Arena& arena) {
    Linears linears;
    for (const Layer& layer : layers(model.architecture())) {
        if (layer.kind == LayerKind::kAttention) {
            continue;
        }
        const bool is_mlp = layer.kind == LayerKind::kFc1 || layer.kind == LayerKind::kFc2;
        int separate = kAnyBatch;
        if (is_mlp) {
            const std::string block = layer.name.substr(0, layer.name.find(".mlp."));
            separate = most_for_separate_mlp(
                model, model.stages()[static_cast<size_t>(layer.stage)], block, fuse_mlp);
        }
        linears[layer.name] = add_linear(model, layer, separate > 0, separate < kAnyBatch, arena);
    }
    return linears;
}

Linear add_head_linear(const Model& model, Arena& arena) {
    const swinq_tensor& weight = model.tensor("head.weight");
    const int64_t classes = weight.shape[0];
    Linear head = {};
    head.type = model.stream();
    head.n = static_cast<int>(ceil_div(classes, 8) * 8);
    head.k = static_cast<int>(weight.shape[1]);
    head.weight = arena.add<uint8_t>(
        padded_rows(classes) * head.k * size_of(head.type),
        [&](uint8_t* out) { gemm_layout(head.type, weight.data, classes, head.k, out); });
    head.bias = arena.add(values(model, "head.bias"));
    return head;
}

}  // namespace swinq

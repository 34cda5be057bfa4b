// Made-up weights: see made_up_model.h.
#include "made_up_model.h"

#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "device_memory.h"

namespace swinq::programs {

namespace {

constexpr float kCodeDeviation = 73.3f;  // of uniform codes in -127 ... 127

// xorshift64*: quick, as there are up to 200 million weights.
uint32_t next_bits(uint64_t& state) {
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return static_cast<uint32_t>(state * 0x2545f4914f6cdd1dull >> 32);
}

float next_unit(uint64_t& state) {
    return static_cast<float>(next_bits(state) >> 8) * 0x1p-24f;
}

std::vector<uint8_t> in_half(const std::vector<float>& values) {
    std::vector<uint8_t> bytes(values.size() * sizeof(__half));
    auto* halves = reinterpret_cast<__half*>(bytes.data());
    for (size_t i = 0; i < values.size(); ++i) halves[i] = __float2half_rn(values[i]);
    return bytes;
}

template <typename T>
std::vector<uint8_t> bytes_of(const std::vector<T>& values) {
    const auto* data = reinterpret_cast<const uint8_t*>(values.data());
    return std::vector<uint8_t>(data, data + values.size() * sizeof(T));
}

int64_t product(const std::vector<int64_t>& shape) {
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    return count;
}

}  // namespace

// What a linear layer's numbers are like: the gain makes outputs from inputs of deviation one, the
// ranges are the largest input and output that get codes of their own.
struct MadeUpModel::LinearScales {
    float gain, input_range, output_range;  // output_range 0: the output is not rounded
    bool unrounded_in_mode_2;
};

const char* name_of(Size size) {
    constexpr const char* kNames[] = {"tiny", "small", "base", "large"};
    return kNames[static_cast<int>(size)];
}

const char* name_of(Numbers numbers) {
    constexpr const char* kNames[] = {"INT8 mode 1", "INT8 mode 2", "FP16", "FP32"};
    return kNames[static_cast<int>(numbers)];
}

swinq_architecture architecture_of(int version, Size size, int window, int img_size) {
    constexpr int kEmbedDims[] = {96, 96, 128, 192};
    swinq_architecture a = {};
    a.version = version;
    a.img_size = img_size, a.patch_size = 4, a.in_chans = 3, a.num_classes = 1000;
    a.embed_dim = kEmbedDims[static_cast<int>(size)];
    a.stages = 4;
    for (int stage = 0; stage < 4; ++stage) {
        a.depths[stage] = stage == 2 ? (size == Size::kTiny ? 6 : 18) : 2;
        a.num_heads[stage] = a.embed_dim / 32 << stage;
    }
    a.window_size = window;
    a.mlp_ratio = 4;
    a.norm_eps = 1e-5f;
    return a;
}

MadeUpModel::MadeUpModel(const swinq_architecture& architecture, Numbers numbers)
    : architecture_(architecture), numbers_(numbers) {
    check(swinq_check_architecture(&architecture));
    const swinq_architecture& a = architecture_;
    const int pixels = a.in_chans * a.patch_size * a.patch_size;
    add_matrix("patch_embed.proj.weight", {a.embed_dim, a.in_chans, a.patch_size, a.patch_size},
               1 / std::sqrt(static_cast<float>(pixels)));
    add_vector("patch_embed.proj.bias", {a.embed_dim}, {-0.1f, 0.1f});
    add_norm("patch_embed.norm", a.embed_dim, 1);
    int dim = a.embed_dim;
    for (int stage = 0; stage < a.stages; ++stage) {
        const int resolution = a.img_size / a.patch_size >> stage;
        const int window = std::min(resolution, a.window_size);
        for (int block = 0; block < a.depths[stage]; ++block) {
            add_block("layers." + std::to_string(stage) + ".blocks." + std::to_string(block), dim,
                      a.num_heads[stage], window);
        }
        if (stage + 1 == a.stages) break;
        const std::string merge = "layers." + std::to_string(stage) + ".downsample";
        add_norm(merge + ".norm", a.version == 1 ? 4 * dim : 2 * dim, 1);
        add_linear(merge + ".reduction", 2 * dim, 4 * dim,
                   a.version == 1 ? LinearScales{1, 5, 5, true} : LinearScales{1, 8, 8, true});
        dim *= 2;
    }
    add_norm("norm", dim, 1);
    add_matrix("head.weight", {a.num_classes, dim}, 1 / std::sqrt(static_cast<float>(dim)));
    add_vector("head.bias", {a.num_classes}, {-0.1f, 0.1f});
}

// v1: the layers read a LayerNorm of deviation one and add about a third to the stream. v2: they
// read the stream, which starts at one, and of which each norm adds a fifth.
void MadeUpModel::add_block(const std::string& name, int dim, int heads, int window) {
    const bool v1 = architecture_.version == 1;
    const int hidden = static_cast<int>(dim * architecture_.mlp_ratio);
    const int64_t side = 2 * window - 1;
    const float read = v1 ? 5 : 8;  // the largest number that qkv and fc1 read
    add_norm(name + ".norm1", dim, v1 ? 1 : 0.2f);
    add_norm(name + ".norm2", dim, v1 ? 1 : 0.2f);
    add_linear(name + ".attn.qkv", 3 * dim, dim, {1, read, 0, false});
    add_linear(name + ".attn.proj", dim, dim, {1, 4, 4, false});
    add_linear(name + ".mlp.fc1", hidden, dim, {1, read, 0, false});
    add_linear(name + ".mlp.fc2", dim, hidden, {0.5f, read, v1 ? 2.0f : 4.0f, true});

    const std::string attention = name + ".attn";
    set_precision(attention, is_int8()                    ? SWINQ_PRECISION_INT8
                             : numbers_ == Numbers::kHalf ? SWINQ_PRECISION_FP16
                                                          : SWINQ_PRECISION_FP32);
    add_vector(attention + ".relative_position_bias_table", {side * side, heads},
               v1 ? Range{-1, 1} : Range{4, 12});
    const float head_dim = static_cast<float>(dim) / static_cast<float>(heads);
    const float scale = v1 ? 1 / std::sqrt(head_dim) : 10;
    add_vector(attention + ".softmax_scale", {heads}, {scale, scale});
    if (!is_int8()) return;
    const float qk = (v1 ? 4 : 0.75f) / 127, v = (v1 ? 4.0f : 8.0f) / 127;
    add_vector(attention + ".q_scale", {heads}, {qk, qk});
    add_vector(attention + ".k_scale", {heads}, {qk, qk});
    add_vector(attention + ".v_scale", {}, {v, v});
}

void MadeUpModel::add_linear(const std::string& name, int out, int in, const LinearScales& scales) {
    const float scale = scales.gain / (kCodeDeviation * std::sqrt(static_cast<float>(in)));
    std::vector<float> row_scales(out);
    for (float& value : row_scales) value = next({0.8f * scale, 1.2f * scale});
    const int64_t count = static_cast<int64_t>(out) * in;
    std::vector<int8_t> codes(count);
    for (int8_t& code : codes) {
        code = static_cast<int8_t>(static_cast<int>(next_bits(random_) >> 16) * 255 / 65536 - 127);
    }
    if (is_int8()) {
        add(name + ".weight", SWINQ_INT8, {out, in}, codes.data());
    } else {
        std::vector<float> values(count);
        for (int64_t i = 0; i < count; ++i) values[i] = row_scales[i / in] * codes[i];
        const bool half = numbers_ == Numbers::kHalf;
        const std::vector<uint8_t> bytes = half ? in_half(values) : bytes_of(values);
        add(name + ".weight", half ? SWINQ_HALF : SWINQ_FLOAT, {out, in}, bytes.data());
    }
    add_vector(name + ".bias", {out}, {-0.1f, 0.1f});
    if (!is_int8()) {
        set_precision(name,
                      numbers_ == Numbers::kHalf ? SWINQ_PRECISION_FP16 : SWINQ_PRECISION_FP32);
        return;
    }
    const bool unrounded = numbers_ == Numbers::kInt8Mode2 && scales.unrounded_in_mode_2;
    set_precision(name, unrounded ? SWINQ_PRECISION_INT8_UNROUNDED : SWINQ_PRECISION_INT8);
    add(name + ".weight_scale", SWINQ_FLOAT, {out}, row_scales.data());
    const float input = scales.input_range / 127;
    add(name + ".input_scale", SWINQ_FLOAT, {}, &input);
    if (scales.output_range > 0 && !unrounded) {
        const std::vector<float> output(out, scales.output_range / 127);
        add(name + ".output_scale", SWINQ_FLOAT, {out}, output.data());
    }
}

// In the stream's type, FP32 models excepted fp16; the fp32 ones hold the same fp16 numbers.
void MadeUpModel::add_matrix(const std::string& name, const std::vector<int64_t>& shape,
                             float deviation) {
    const float reach = deviation * std::sqrt(3.0f);
    std::vector<float> values(product(shape));
    for (float& value : values) value = __half2float(__float2half_rn(next({-reach, reach})));
    if (numbers_ == Numbers::kFloat) {
        add(name, SWINQ_FLOAT, shape, values.data());
    } else {
        add(name, SWINQ_HALF, shape, in_half(values).data());
    }
}

void MadeUpModel::add_norm(const std::string& name, int width, float gain) {
    add_vector(name + ".weight", {width}, {0.8f * gain, 1.2f * gain});
    add_vector(name + ".bias", {width}, {-0.1f * gain, 0.1f * gain});
}

void MadeUpModel::add_vector(const std::string& name, const std::vector<int64_t>& shape,
                             Range range) {
    std::vector<float> values(product(shape));
    // a constant takes nothing from the generator: only INT8 models have scales
    for (float& value : values) value = range.low == range.high ? range.low : next(range);
    add(name, SWINQ_FLOAT, shape, values.data());
}

void MadeUpModel::add(const std::string& name, swinq_type type, const std::vector<int64_t>& shape,
                      const void* data) {
    const size_t width = type == SWINQ_INT8 ? 1 : type == SWINQ_HALF ? 2 : 4;
    const auto* bytes = static_cast<const uint8_t*>(data);
    names_.push_back(name);
    data_.emplace_back(bytes, bytes + width * static_cast<size_t>(product(shape)));
    swinq_tensor tensor = {};
    tensor.name = names_.back().c_str();
    tensor.type = type;
    tensor.rank = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), tensor.shape);
    tensor.data = data_.back().data();
    tensors_.push_back(tensor);
}

void MadeUpModel::set_precision(const std::string& layer, swinq_precision precision) {
    names_.push_back(layer);
    layers_.push_back({names_.back().c_str(), precision});
}

float MadeUpModel::next(Range range) {
    return range.low + next_unit(random_) * (range.high - range.low);
}

swinq_model MadeUpModel::model() const {
    return {architecture_, tensors_.data(), tensors_.size(), layers_.data(), layers_.size()};
}

std::vector<float> made_up_images(int64_t count) {
    uint64_t state = 2;
    std::vector<float> values(count);
    for (float& value : values) value = 4 * next_unit(state) - 2;
    return values;
}

}  // namespace swinq::programs

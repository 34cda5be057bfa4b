// How weights and scales lie in the plan: see weights.h.
#include "engine/weights.h"

#include <cstring>

namespace swinq {

void gemm_layout(Type type, const void* weight, int64_t n, int64_t k, void* laid_out) {
    const size_t row_bytes = static_cast<size_t>(k) * static_cast<size_t>(size_of(type));
    const auto* from = static_cast<const uint8_t*>(weight);
    auto* to = static_cast<uint8_t*>(laid_out);
    for (int64_t row = 0; row < padded_rows(n); ++row, to += row_bytes) {
        const int64_t channel = channel_of_row(row);
        if (channel < n) {
            std::memcpy(to, from + static_cast<size_t>(channel) * row_bytes, row_bytes);
        } else {
            std::memset(to, 0, row_bytes);
        }
    }
}

std::vector<uint8_t> pad_heads(const void* data, int64_t rows, int64_t heads, int64_t head_dim,
                               int64_t bytes) {
    const auto head = static_cast<size_t>(head_dim * bytes);
    const auto padded_head = static_cast<size_t>(kHeadDim * bytes);
    const auto count = static_cast<size_t>(rows * heads);
    const auto* from = static_cast<const uint8_t*>(data);
    std::vector<uint8_t> padded(count * padded_head);
    for (size_t i = 0; i < count; ++i) {
        std::memcpy(padded.data() + i * padded_head, from + i * head, head);
    }
    return padded;
}

std::vector<float> pad_heads(const std::vector<float>& vector, int64_t heads) {
    const int64_t head_dim = static_cast<int64_t>(vector.size()) / heads;
    const std::vector<uint8_t> bytes = pad_heads(vector.data(), 1, heads, head_dim, sizeof(float));
    std::vector<float> padded(bytes.size() / sizeof(float));
    std::memcpy(padded.data(), bytes.data(), bytes.size());
    return padded;
}

float inverse_of(float scale) {
    return scale == 0.0f ? 0.0f : 1.0f / scale;
}

std::vector<float> inverses(const std::vector<float>& scales) {
    std::vector<float> found;
    for (float scale : scales) {
        found.push_back(inverse_of(scale));
    }
    return found;
}

std::vector<float> scale_vector(const float* scale, bool is_vector, int64_t count) {
    return is_vector ? std::vector<float>(scale, scale + count)
                     : std::vector<float>(static_cast<size_t>(count), *scale);
}

std::vector<float> gemm_factor(const float* input_scale, bool is_vector, const float* weight_scale,
                               int64_t n) {
    std::vector<float> factor(weight_scale, weight_scale + n);
    if (!is_vector) {
        for (float& f : factor) {
            f = *input_scale * f;
        }
    }
    return factor;
}

std::vector<float> qkv_scales(const float* q, const float* k, float v, int64_t heads) {
    std::vector<float> scales;
    for (int64_t part = 0; part < 3; ++part) {
        for (int64_t head = 0; head < heads; ++head) {
            const float scale = part == 0 ? q[head] : part == 1 ? k[head] : v;
            scales.insert(scales.end(), kHeadDim, scale);
        }
    }
    return scales;
}

std::vector<float> attention_factor(const float* q, const float* k, const float* softmax_scale,
                                    int64_t heads) {
    std::vector<float> factor;
    for (int64_t head = 0; head < heads; ++head) {
        const float product = q[head] * k[head];
        factor.push_back(product * softmax_scale[head]);
    }
    return factor;
}

std::vector<float> transposed(const float* table, int64_t rows, int64_t columns) {
    std::vector<float> out(static_cast<size_t>(rows * columns));
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t column = 0; column < columns; ++column) {
            out[static_cast<size_t>(column * rows + row)] = table[row * columns + column];
        }
    }
    return out;
}

}  // namespace swinq

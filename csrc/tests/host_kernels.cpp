// The kernels as plain loops over host memory. With host_runtime.cpp and the engine they make
// libswinq_host.so, which runs forwards on machines without a GPU: a test of plans, buffers and
// weight layouts, not of kernels. docs/numerics.md has the equations.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/attention.h"
#include "kernels/gemm.h"
#include "kernels/layernorm.h"
#include "kernels/mlp.h"
#include "kernels/patch_embed.h"
#include "tests/host_runtime.h"

namespace swinq {
namespace {

using Row = std::vector<float>;

float load(Type type, const void* data, int64_t at) {
    switch (type) {
        case Type::kInt8:
            return static_cast<const int8_t*>(data)[at];
        case Type::kHalf:
            return __half2float(static_cast<const __half*>(data)[at]);
        default:
            return static_cast<const float*>(data)[at];
    }
}

// Codes by `inverse`, or the value rounded to the type.
void store(Type type, void* data, int64_t at, float value, float inverse) {
    switch (type) {
        case Type::kInt8: {
            const float code = std::nearbyint(value * inverse);
            static_cast<int8_t*>(data)[at] =
                static_cast<int8_t>(std::isnan(code) ? 0 : std::clamp(code, -128.0f, 127.0f));
            break;
        }
        case Type::kHalf:
            static_cast<__half*>(data)[at] = __float2half(value);
            break;
        default:
            static_cast<float*>(data)[at] = value;
    }
}

float rounded(float y, float inverse, float scale) {
    return std::clamp(std::nearbyint(y * inverse), -128.0f, 127.0f) * scale;
}

void normalize(Row& row, const float* gamma, const float* beta, float eps) {
    double mean = 0, variance = 0;
    for (float x : row) mean += x;
    mean /= static_cast<double>(row.size());
    for (float x : row) variance += (x - mean) * (x - mean);
    variance /= static_cast<double>(row.size());
    const auto rstd = static_cast<float>(1 / std::sqrt(variance + eps));
    for (size_t i = 0; i < row.size(); ++i) {
        row[i] = (row[i] - static_cast<float>(mean)) * rstd * gamma[i] + beta[i];
    }
}

float gelu(float y) {
    return 0.5f * y * (1.0f + std::erf(y * 0.70710678f));
}

// The row of a laid out weight that holds channel c: gemm.h's order, written from its other end.
int64_t row_of_channel(int64_t c) {
    const int64_t q = c % 32;
    return c - q + q % 8 / 2 * 8 + q / 8 * 2 + q % 2;
}

// y = a w^T, scaled, with bias and activation, of one row.
Row product(const GemmArguments& g, int64_t m) {
    Row y(static_cast<size_t>(g.n));
    for (int64_t c = 0; c < g.n; ++c) {
        const int64_t w = row_of_channel(c) * g.k;
        double sum = 0;  // of integers exact; of floats better than any order of fp32
        for (int64_t k = 0; k < g.k; ++k) {
            sum += double{load(g.operand, g.a, m * g.k + k)} * load(g.operand, g.w, w + k);
        }
        const auto acc = static_cast<float>(sum);
        y[size_t(c)] =
            g.operand == Type::kInt8 ? std::fma(acc, g.factor[c], g.bias[c]) : acc + g.bias[c];
    }
    if (g.activation == Activation::kGelu) {
        std::transform(y.begin(), y.end(), y.begin(), gelu);
    }
    for (int head = 0; g.activation == Activation::kNormalize && head < g.n / 96 * 2; ++head) {
        float* part = y.data() + head * kHeadDim;
        double squares = 0;
        for (int i = 0; i < kHeadDim; ++i) squares += double{part[i]} * part[i];
        const float norm = std::max(static_cast<float>(std::sqrt(squares)), 1e-12f);
        for (int i = 0; i < kHeadDim; ++i) part[i] /= norm;
    }
    return y;
}

}  // namespace

static void run_gemm(const GemmArguments& g) {
    const bool to_stream = g.output == Output::kResidual || g.output == Output::kStream;
    const Type type = to_stream                    ? g.stream
                      : g.output == Output::kCodes ? Type::kInt8
                      : g.output == Output::kHalf  ? Type::kHalf
                                                   : Type::kFloat;
    for (int64_t m = 0; m < g.m; ++m) {
        Row y = product(g, m);
        for (int c = 0; to_stream && g.out_scale && c < g.n; ++c) {
            y[size_t(c)] = rounded(y[size_t(c)], g.out_inverse[c], g.out_scale[c]);
        }
        if (g.has_norm) normalize(y, g.norm_gamma, g.norm_beta, g.norm_eps);
        for (int64_t c = 0; c < g.n; ++c) {
            const int64_t at = m * g.n + c;
            if (g.output == Output::kResidual) y[size_t(c)] += load(g.stream, g.out, at);
            store(type, g.out, at, y[size_t(c)], type == Type::kInt8 ? g.out_inverse[c] : 0);
            if (to_stream) y[size_t(c)] = load(type, g.out, at);
        }
        for (int64_t c = 0; g.norm_operand && c < g.n; ++c) {
            store(Type::kInt8, g.norm_operand, m * g.n + c, y[size_t(c)], g.norm_inverse[c]);
        }
    }
}

bool can_normalize(Type operand, int) {
    return operand == Type::kHalf;
}
GemmTile default_tile(const GemmArguments&) {
    return {0, 64, 64};
}
int list_tiles(const GemmArguments& g, GemmTile* tiles, int capacity) {
    if (capacity > 0) tiles[0] = default_tile(g);
    return 1;
}

int64_t expanded_bias_size(int window, int heads) {
    const int64_t side = 2 * window - 1;
    return window <= 8 ? heads * side * side : 0;
}

void expand_bias(const float* table, int window, int heads, float* expanded) {
    std::copy_n(table, expanded_bias_size(window, heads), expanded);
}

// As much as the kernel on a GPU wants for its table of the window's tokens.
int64_t attention_shared_bytes(const AttentionArguments& a) {
    return int64_t{12} * a.window * a.window;
}

static void run_attention(const AttentionArguments& a) {
    const int side = a.resolution, tokens = a.window * a.window, width = 2 * a.window - 1;
    const float* table = a.bias ? a.bias : a.bias_table;
    auto token = [&](int image, int wy, int wx, int i) {  // of a window of the rolled map
        const int y = (wy * a.window + i / a.window + a.shift) % side;
        const int x = (wx * a.window + i % a.window + a.shift) % side;
        return (int64_t{image} * side + y) * side + x;
    };
    auto line = [&](int at) { return (at >= side - a.window) + (at >= side - a.shift); };
    auto region = [&](int wy, int wx, int i) {
        return 3 * line(wy * a.window + i / a.window) + line(wx * a.window + i % a.window);
    };
    auto qkv = [&](int64_t t, int part, int head, int d) {
        return load(a.type, a.qkv, ((t * 3 + part) * a.heads + head) * kHeadDim + d);
    };
    const int64_t values = int64_t{side} * side * 3 * a.heads * kHeadDim;  // of an image
    for (int64_t i = 0; a.status && i < a.batch * values; ++i) {
        if (!std::isfinite(load(a.type, a.qkv, i))) a.status[i / values] = 1;
    }
    std::vector<float> s(static_cast<size_t>(tokens));
    const int across = side / a.window;
    for (int64_t job = 0; job < int64_t{a.batch} * across * across * a.heads * tokens; ++job) {
        const int i = static_cast<int>(job % tokens),
                  head = static_cast<int>(job / tokens % a.heads);
        const int64_t window = job / tokens / a.heads;
        const int wx = static_cast<int>(window % across),
                  wy = static_cast<int>(window / across % across);
        const int image = static_cast<int>(window / across / across);
        const int64_t query = token(image, wy, wx, i);
        float most = -INFINITY;
        for (int j = 0; j < tokens; ++j) {
            double sum = 0;
            for (int d = 0; d < kHeadDim; ++d) {
                sum += double{qkv(query, 0, head, d)} * qkv(token(image, wy, wx, j), 1, head, d);
            }
            const int dy = i / a.window - j / a.window, dx = i % a.window - j % a.window;
            float b =
                table[(int64_t{head} * width + dy + a.window - 1) * width + dx + a.window - 1];
            if (a.shift != 0 && region(wy, wx, i) != region(wy, wx, j)) b += -100.0f;
            const float scaled = static_cast<float>(sum) * a.factor[head];
            s[size_t(j)] = scaled + b;
            most = std::max(most, s[size_t(j)]);
        }
        double total = 0, o[kHeadDim] = {};
        for (int j = 0; j < tokens; ++j) {
            float p = std::exp(s[size_t(j)] - most);
            if (a.type == Type::kInt8) p = std::nearbyint(255.0f * p);
            if (a.type == Type::kHalf) p = __half2float(__float2half(p));
            total += p;
            for (int d = 0; d < kHeadDim; ++d)
                o[d] += double{p} * qkv(token(image, wy, wx, j), 2, head, d);
        }
        for (int d = 0; d < kHeadDim; ++d) {
            const int64_t column = int64_t{head} * kHeadDim + d;
            const float value = a.type == Type::kInt8 ? static_cast<float>(o[d]) *
                                                            (a.v_scale / static_cast<float>(total))
                                                      : static_cast<float>(o[d] / total);
            store(a.out_type, a.out, query * a.heads * kHeadDim + column, value,
                  a.out_type == Type::kInt8 ? a.out_inverse[column] : 0);
        }
    }
}

static void run_prenorm(const PrenormArguments& a) {
    const int side = a.merge ? a.resolution / 2 : a.resolution, parts = a.merge ? 4 : 1;
    for (int64_t row = 0; row < int64_t{a.batch} * side * side; ++row) {
        const int64_t image = row / side / side, y = row / side % side, x = row % side;
        Row values;
        for (int part = 0; part < parts; ++part) {  // the left column's two first
            const int64_t ty = a.merge ? 2 * y + part % 2 : y, tx = a.merge ? 2 * x + part / 2 : x;
            const int64_t token = (image * a.resolution + ty) * a.resolution + tx;
            for (int c = 0; c < a.channels; ++c) {
                values.push_back(load(a.stream, a.x, token * a.channels + c));
                if (!std::isfinite(values.back()) && a.status) a.status[image] = 1;
            }
        }
        if (a.gamma) normalize(values, a.gamma, a.beta, a.eps);
        for (size_t c = 0; c < values.size(); ++c) {
            store(a.operand, a.out,
                  row * static_cast<int64_t>(values.size()) + static_cast<int64_t>(c), values[c],
                  a.operand == Type::kInt8 ? a.inverse[c] : 0);
        }
    }
}

static void run_postnorm(const PostnormArguments& a) {
    for (int64_t row = 0; row < a.rows; ++row) {
        Row y;
        for (int c = 0; c < a.channels; ++c) {
            const float value = load(a.y_type, a.y, row * a.channels + c);
            y.push_back(a.y_type == Type::kInt8 ? value * a.y_scale[c] : value);
        }
        normalize(y, a.gamma, a.beta, a.eps);
        for (int c = 0; c < a.channels; ++c) {
            const int64_t at = row * a.channels + c;
            const float before = a.residual ? load(a.stream, a.x, at) : 0.0f;
            store(a.stream, a.x, at, before + y[size_t(c)], 0);
            if (a.operand) store(Type::kInt8, a.operand, at, load(a.stream, a.x, at), a.inverse[c]);
        }
    }
}

static void run_pool(const PoolArguments& a) {
    for (int64_t image = 0; image < a.batch; ++image) {
        std::vector<double> sums(static_cast<size_t>(a.channels));
        bool finite = a.status == nullptr || a.status[image] == 0;
        for (int64_t token = image * a.tokens; token < (image + 1) * a.tokens; ++token) {
            Row x;
            for (int c = 0; c < a.channels; ++c)
                x.push_back(load(a.stream, a.x, token * a.channels + c));
            for (float value : x) finite = finite && std::isfinite(value);
            normalize(x, a.gamma, a.beta, a.eps);
            for (size_t c = 0; c < x.size(); ++c) sums[c] += x[c];
        }
        for (int64_t c = 0; c < a.channels; ++c) {
            const auto mean = static_cast<float>(sums[size_t(c)] / a.tokens);
            store(a.stream, a.pooled, image * a.channels + c, finite ? mean : NAN, 0);
        }
    }
}

// As much as the kernel on a GPU wants for its weights.
int64_t patch_embed_shared_bytes(const PatchEmbedArguments& a) {
    return int64_t{2} * a.channels * a.in_chans * a.patch_size * a.patch_size;
}

static void run_patch_embed(const PatchEmbedArguments& a) {
    const int side = a.img_size / a.patch_size, depth = a.in_chans * a.patch_size * a.patch_size;
    for (int image = 0; a.status && image < a.batch; ++image) a.status[image] = 0;
    for (int64_t row = 0; row < int64_t{a.batch} * side * side; ++row) {
        const int64_t image = row / side / side, ty = row / side % side, tx = row % side;
        Row pixels;
        for (int i = 0; i < depth; ++i) {
            const int64_t channel = i / a.patch_size / a.patch_size;
            const int64_t y = ty * a.patch_size + i / a.patch_size % a.patch_size;
            const int64_t x = tx * a.patch_size + i % a.patch_size;
            float pixel = load(a.image_type, a.images,
                               ((image * a.in_chans + channel) * a.img_size + y) * a.img_size + x);
            if (a.stream == Type::kHalf) pixel = __half2float(__float2half(pixel));
            if (!std::isfinite(pixel) && a.status) a.status[image] = 1;
            pixels.push_back(pixel);
        }
        Row values;
        for (int64_t c = 0; c < a.channels; ++c) {
            double sum = 0;
            for (int64_t i = 0; i < depth; ++i) {
                sum += double{pixels[size_t(i)]} * load(a.stream, a.weight, c * depth + i);
            }
            values.push_back(static_cast<float>(sum) + a.bias[c]);
        }
        normalize(values, a.gamma, a.beta, a.eps);
        for (int64_t c = 0; c < a.channels; ++c) {
            const int64_t at = row * a.channels + c;
            store(a.stream, a.x, at, values[size_t(c)], 0);
            if (a.operand) store(Type::kInt8, a.operand, at, load(a.stream, a.x, at), a.inverse[c]);
        }
    }
}

bool mlp_supported(int, int) {
    return true;
}

int mlp_few_rows_v2() {
    return 300;  // one image of 16 x 16 tokens, not two: batches of both sorts are easy to make
}

void mlp_layout_fc1(const int8_t* weight, int channels, int hidden, int8_t* laid_out) {
    std::copy_n(weight, int64_t{channels} * hidden, laid_out);
}
void mlp_layout_fc2(const int8_t* weight, int channels, int hidden, int8_t* laid_out) {
    std::copy_n(weight, int64_t{channels} * hidden, laid_out);
}

static void run_mlp(const MlpArguments& a) {
    auto linear = [](const std::vector<int8_t>& codes, const int8_t* weight, int n,
                     const float* factor, const float* bias) {
        Row y;
        for (int64_t c = 0; c < n; ++c) {
            int sum = 0;
            for (size_t k = 0; k < codes.size(); ++k) {
                sum += codes[k] *
                       weight[c * static_cast<int64_t>(codes.size()) + static_cast<int64_t>(k)];
            }
            y.push_back(std::fma(static_cast<float>(sum), factor[c], bias[c]));
        }
        return y;
    };
    auto quantized = [](const Row& row, const float* inverse) {
        std::vector<int8_t> codes(row.size());
        for (size_t i = 0; i < row.size(); ++i) {
            store(Type::kInt8, codes.data(), static_cast<int64_t>(i), row[i], inverse[i]);
        }
        return codes;
    };
    for (int64_t m = 0; m < a.m; ++m) {
        Row x;
        for (int c = 0; c < a.channels; ++c)
            x.push_back(load(Type::kHalf, a.x, m * a.channels + c));
        std::vector<int8_t> input;
        if (a.operand) {
            input.assign(a.operand + m * a.channels, a.operand + (m + 1) * a.channels);
        } else {
            Row row = x;
            normalize(row, a.gamma, a.beta, a.eps);
            input = quantized(row, a.in_inverse);
        }
        Row hidden = linear(input, a.fc1_weight, a.hidden, a.fc1_factor, a.fc1_bias);
        std::transform(hidden.begin(), hidden.end(), hidden.begin(), gelu);
        Row y = linear(quantized(hidden, a.hidden_inverse), a.fc2_weight, a.channels, a.fc2_factor,
                       a.fc2_bias);
        for (int c = 0; c < a.channels && a.out_scale; ++c) {
            y[size_t(c)] = rounded(y[size_t(c)], a.out_inverse[c], a.out_scale[c]);
        }
        if (a.operand) normalize(y, a.gamma, a.beta, a.eps);
        for (int c = 0; c < a.channels; ++c) {
            const int64_t at = m * a.channels + c;
            store(Type::kHalf, a.x, at, x[size_t(c)] + y[size_t(c)], 0);
            if (a.next_inverse) {
                store(Type::kInt8, a.operand, at, load(Type::kHalf, a.x, at), a.next_inverse[c]);
            }
        }
    }
}

// ---- what the engine calls: into the graph that is being captured, or at once ----

void gemm(const GemmArguments& a, const GemmTile*, cudaStream_t) {
    testing::enqueue([a] { run_gemm(a); });
}
void attention(const AttentionArguments& a, cudaStream_t) {
    testing::enqueue([a] { run_attention(a); });
}
void prenorm(const PrenormArguments& a, cudaStream_t) {
    testing::enqueue([a] { run_prenorm(a); });
}
void postnorm(const PostnormArguments& a, cudaStream_t) {
    testing::enqueue([a] { run_postnorm(a); });
}
void pool(const PoolArguments& a, cudaStream_t) {
    testing::enqueue([a] { run_pool(a); });
}
void patch_embed(const PatchEmbedArguments& a, cudaStream_t) {
    testing::enqueue([a] { run_patch_embed(a); });
}
void mlp(const MlpArguments& a, cudaStream_t) {
    testing::enqueue([a] { run_mlp(a); });
}

}  // namespace swinq

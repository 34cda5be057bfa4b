// LayerNorm and what surrounds it, on the host: docs/numerics.md, "LayerNorm", "Merging", "Head".
//
// Tensors are row-major and given as the floats that their halves or codes hold. Results are not
// yet rounded to the output's type. Real is what is computed in: double for the truth, float for
// what a plain implementation gets.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace swinq::testing {

inline float reference_half(float x) {
    return __half2float(__float2half_rn(x));
}

// clamp(rint(x * inverse)) by column, one fp32 multiply; (rows, width). NaN becomes 0.
inline std::vector<int8_t> reference_quantize(const std::vector<float>& x,
                                              const std::vector<float>& inverse) {
    std::vector<int8_t> codes(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
        const float product = x[i] * inverse[i % inverse.size()];
        const float code = std::nearbyint(std::min(std::max(product, -128.0f), 127.0f));
        codes[i] = std::isnan(product) ? int8_t{0} : static_cast<int8_t>(code);
    }
    return codes;
}

// code * scale by column; (rows, width).
inline std::vector<float> reference_dequantize(const std::vector<int8_t>& codes,
                                               const std::vector<float>& scale) {
    std::vector<float> x(codes.size());
    for (size_t i = 0; i < x.size(); ++i) {
        x[i] = static_cast<float>(codes[i]) * scale[i % scale.size()];
    }
    return x;
}

// (batch, resolution^2, channels) -> (batch, resolution^2 / 4, 4 * channels): the neighbours
// (0, 0), (1, 0), (0, 1), (1, 1) of (row, column) side by side.
inline std::vector<float> reference_merge(const std::vector<float>& x, int batch, int resolution,
                                          int channels) {
    std::vector<float> merged;
    merged.reserve(x.size());
    for (int image = 0; image < batch; ++image) {
        for (int row = 0; row < resolution; row += 2) {
            for (int column = 0; column < resolution; column += 2) {
                for (int neighbour = 0; neighbour < 4; ++neighbour) {
                    const int r = row + neighbour % 2, c = column + neighbour / 2;
                    const int64_t top = static_cast<int64_t>(image) * resolution + r;
                    const auto from = x.begin() + (top * resolution + c) * channels;
                    merged.insert(merged.end(), from, from + channels);
                }
            }
        }
    }
    return merged;
}

// (rows, width) with width = gamma.size().
template <typename Real, typename Value>
std::vector<Real> reference_layernorm(const std::vector<Value>& x, const std::vector<float>& gamma,
                                      const std::vector<float>& beta, float eps) {
    const size_t width = gamma.size();
    std::vector<Real> normal(x.size());
    for (size_t start = 0; start < x.size(); start += width) {
        Real mean = 0, variance = 0;
        for (size_t c = 0; c < width; ++c) mean += x[start + c];
        mean /= static_cast<Real>(width);
        for (size_t c = 0; c < width; ++c) {
            const Real deviation = x[start + c] - mean;
            variance += deviation * deviation;
        }
        variance /= static_cast<Real>(width);
        const Real rstd = 1 / std::sqrt(variance + static_cast<Real>(eps));
        for (size_t c = 0; c < width; ++c) {
            normal[start + c] = (x[start + c] - mean) * rstd * gamma[c] + beta[c];
        }
    }
    return normal;
}

// x + LayerNorm(y), or LayerNorm(y) where x is empty; (rows, channels).
template <typename Real>
std::vector<Real> reference_postnorm(const std::vector<float>& x, const std::vector<float>& y,
                                     const std::vector<float>& gamma,
                                     const std::vector<float>& beta, float eps) {
    std::vector<Real> sum = reference_layernorm<Real>(y, gamma, beta, eps);
    for (size_t i = 0; i < x.size(); ++i) sum[i] += x[i];
    return sum;
}

// Mean of LayerNorm(x) over the tokens: (batch, tokens, channels) -> (batch, channels).
template <typename Real>
std::vector<Real> reference_pool(const std::vector<float>& x, int tokens,
                                 const std::vector<float>& gamma, const std::vector<float>& beta,
                                 float eps) {
    const size_t channels = gamma.size(), image = static_cast<size_t>(tokens) * channels;
    const std::vector<Real> normal = reference_layernorm<Real>(x, gamma, beta, eps);
    std::vector<Real> pooled(x.size() / static_cast<size_t>(tokens));
    for (size_t i = 0; i < x.size(); ++i) pooled[i / image * channels + i % channels] += normal[i];
    for (Real& mean : pooled) mean /= static_cast<Real>(tokens);
    return pooled;
}

// Of each of the images in x: 1 if it holds a number that is not finite, else 0.
inline std::vector<int> reference_status(const std::vector<float>& x, int batch) {
    std::vector<int> status(static_cast<size_t>(batch));
    for (size_t i = 0; i < x.size(); ++i) {
        if (!std::isfinite(x[i])) status[i / (x.size() / status.size())] = 1;
    }
    return status;
}

}  // namespace swinq::testing

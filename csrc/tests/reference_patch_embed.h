// Patch embedding on the host: docs/numerics.md, "Patch embedding". See reference_norm.h for Real.
#pragma once

#include "reference_norm.h"

namespace swinq::testing {

// (batch, in_chans, img_size, img_size) -> (batch * tokens, in_chans * patch_size^2).
inline std::vector<float> reference_patches(const std::vector<float>& images, int batch,
                                            int in_chans, int img_size, int patch_size) {
    std::vector<float> patches;
    patches.reserve(images.size());
    for (int image = 0; image < batch; ++image) {
        for (int top = 0; top < img_size; top += patch_size) {
            for (int left = 0; left < img_size; left += patch_size) {
                for (int channel = 0; channel < in_chans; ++channel) {
                    const int64_t plane = static_cast<int64_t>(image) * in_chans + channel;
                    for (int row = top; row < top + patch_size; ++row) {
                        const int64_t start = (plane * img_size + row) * img_size + left;
                        const auto from = images.begin() + start;
                        patches.insert(patches.end(), from, from + patch_size);
                    }
                }
            }
        }
    }
    return patches;
}

// LayerNorm(patches * weight^T + bias): patches (rows, depth), weight (channels, depth). Both hold
// fp16 values for an fp16 stream: round the images with reference_half() before.
template <typename Real>
std::vector<Real> reference_patch_embed(const std::vector<float>& patches,
                                        const std::vector<float>& weight,
                                        const std::vector<float>& bias,
                                        const std::vector<float>& gamma,
                                        const std::vector<float>& beta, float eps) {
    const size_t channels = bias.size(), depth = weight.size() / channels;
    std::vector<Real> x;
    x.reserve(patches.size() / depth * channels);
    std::vector<Real> y(channels);
    for (size_t row = 0; row < patches.size() / depth; ++row) {
        for (size_t c = 0; c < channels; ++c) {
            y[c] = 0;
            for (size_t k = 0; k < depth; ++k) {
                y[c] += static_cast<Real>(patches[row * depth + k]) * weight[c * depth + k];
            }
            y[c] += bias[c];
        }
        const std::vector<Real> normal = reference_layernorm<Real>(y, gamma, beta, eps);
        x.insert(x.end(), normal.begin(), normal.end());
    }
    return x;
}

}  // namespace swinq::testing

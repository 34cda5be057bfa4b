// LayerNorm of made-up rows, and what it should give, in fp64.
#pragma once

#include "compare.h"
#include "kernels/layernorm.h"
#include "kernels/patch_embed.h"

namespace swinq::testing {

// Rows to be normalised: `type` numbers, or codes times `scale`; with `merge` each row is the 2 x 2
// neighbours of a token of a map of `resolution`, ordered dx, dy, channel.
struct Rows {
    Type type;
    const void* data;
    const float* scale;  // (channels) of codes, or null
    int64_t count;       // of rows, after merging
    int channels;
    bool merge;
    int resolution;  // before merging

    int width() const { return merge ? 4 * channels : channels; }
};

// LayerNorm's outputs (rows, width); gamma null: the rows themselves.
void plain_layernorm(const Rows& rows, const float* gamma, const float* beta, float eps,
                     double* exact, float* plain);

// Mean over each image's `tokens` rows of (rows, channels) into (rows / tokens, channels).
void plain_mean(const double* exact, int64_t images, int tokens, int channels, double* mean,
                float* plain);

// Patch embedding before its LayerNorm, (batch * tokens, channels), pixels rounded to fp16 if
// the stream is.
void plain_patches(const PatchEmbedArguments& arguments, double* exact);

// LayerNorm of fp64 rows.
void plain_layernorm(const double* rows, int64_t count, int channels, const float* gamma,
                     const float* beta, float eps, double* exact, float* plain);

// Writes NaN or an infinity into one element of `type` numbers.
void plant(Type type, void* data, int64_t index, float value);

// A residual stream: rows with means and outlying channels of their own.
DeviceArray<uint8_t> random_stream(Type type, int64_t rows, int channels, uint32_t seed);

}  // namespace swinq::testing

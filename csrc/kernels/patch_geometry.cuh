// Where the pixels of a token's patch lie in NCHW images.
#pragma once

#include "device.cuh"
#include "patch_embed.h"

namespace swinq {

struct PatchGeometry {
    int rows, side, tokens;  // tokens = side^2 of an image, rows = batch * tokens
    int depth;               // in_chans * patch_size^2: pixels of a patch
    int patch_size, img_size;
    int64_t image_pixels;

    explicit PatchGeometry(const PatchEmbedArguments& a)
        : side(a.img_size / a.patch_size),
          depth(a.in_chans * a.patch_size * a.patch_size),
          patch_size(a.patch_size),
          img_size(a.img_size),
          image_pixels(static_cast<int64_t>(a.in_chans) * a.img_size * a.img_size) {
        tokens = side * side;
        rows = a.batch * tokens;
    }

    // The first pixel of a row's patch.
    __device__ __forceinline__ int64_t start(int row) const {
        const int image = row / tokens, token = row - image * tokens;
        const int top = token / side, left = token - top * side;
        return image * image_pixels + (top * img_size + left) * patch_size;
    }

    // Pixel k of a patch, k = (channel, row, column), from the first.
    __device__ __forceinline__ int offset(int k) const {
        const int area = patch_size * patch_size;
        const int channel = k / area, within = k - channel * area;
        const int row = within / patch_size, column = within - row * patch_size;
        return (channel * img_size + row) * img_size + column;
    }
};

}  // namespace swinq

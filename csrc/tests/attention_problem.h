// One attention with made-up operands, and what it should give: a thread a query, loops only.
#pragma once

#include "compare.h"
#include "kernels/attention.h"

namespace swinq::testing {

enum class Logits {
    kOrdinary,  // of a size of about one, biases between -3 and 3
    kSharp,     // v2 at its largest logit scale, 100
    kEqual,     // every key of every query the same
    kBiased,    // biases between -100 and 100
};

struct AttentionSize {
    int batch, resolution, window, shift, heads;
};

class AttentionProblem {
  public:
    AttentionProblem(Type type, const AttentionSize& size, Logits logits);

    AttentionArguments arguments(Type out_type, void* out) const;
    Expected expected() const { return {exact_.get(), plain_.get(), tokens(), columns()}; }
    int64_t tokens() const {
        return static_cast<int64_t>(size_.batch) * size_.resolution * size_.resolution;
    }
    int columns() const { return size_.heads * kHeadDim; }

  private:
    Type type_;
    AttentionSize size_;
    float v_scale_ = 0;
    DeviceArray<uint8_t> qkv_;             // (tokens, 3, heads, 32)
    DeviceArray<float> table_, expanded_;  // (heads, (2 * window - 1)^2); the kernel's order
    DeviceArray<float> factor_, inverse_;  // (heads), (heads * 32)
    DeviceArray<double> exact_;            // (tokens, heads * 32)
    DeviceArray<float> plain_;             // (tokens, heads * 32)
};

std::string describe(const AttentionSize& size);

}  // namespace swinq::testing

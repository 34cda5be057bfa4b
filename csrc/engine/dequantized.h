// A model with its int8 layers taken back to floats: the same function but for the rounding of
// activations, which other kernels compute. What a file's integers are judged by.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "engine/model.h"

namespace swinq {

class Dequantized {
  public:
    // Copies the tensors; the model's memory may go.
    explicit Dequantized(const Model& model);

    // All layers in fp32. Points into this object.
    swinq_model model() const;

  private:
    using Values = std::vector<float>;

    void dequantize(const Model& model, const Layer& layer);
    void kill_dead_channels(const Model& model, const Layer& layer);
    void kill(const std::string& layer, int64_t channel);

    swinq_architecture architecture_;
    std::vector<Layer> layers_;
    std::map<std::string, Values> values_;  // of every tensor of the fp32 model
    std::vector<swinq_tensor> tensors_;
    std::vector<swinq_layer> precisions_;
};

}  // namespace swinq

// A model as the caller hands it over, checked: architecture, precisions, tensors by name.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "engine/format.h"
#include "kernels/types.h"

namespace swinq {

class Model {
  public:
    // Checks everything: sizes, precisions, names, types, shapes, and that no number is unsound
    // (NaN, infinity, a negative scale, the weight code -128). The tensors' memory stays the
    // caller's.
    explicit Model(const swinq_model& model);

    const swinq_architecture& architecture() const { return architecture_; }
    const std::vector<Stage>& stages() const { return stages_; }
    Type stream() const { return stream_; }  // of the residual stream, patch embedding and head

    swinq_precision precision(const std::string& layer) const { return precisions_.at(layer); }
    Type type(const std::string& layer) const;  // of a layer's operands
    const swinq_tensor& tensor(const std::string& name) const { return *tensors_.at(name); }
    const float* floats(const std::string& name) const;

  private:
    swinq_architecture architecture_;
    std::vector<Stage> stages_;
    PrecisionTable precisions_;
    std::map<std::string, const swinq_tensor*> tensors_;
    Type stream_;
};

int64_t element_count(const swinq_tensor& tensor);

}  // namespace swinq

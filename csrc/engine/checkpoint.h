// An INT8 checkpoint (docs/checkpoint-format.md), read from its file and refused if anything is
// amiss: the counterpart of swinq/export/reader.py.
#pragma once

#include <string>
#include <vector>

#include "engine/safetensors.h"
#include "include/swinq.h"

namespace swinq {

class Checkpoint {
  public:
    // Judges the file's format, metadata and digests; `asked_mode` 1 or 2 refuses the other mode, 0
    // takes either. Whether the tensors are those of the architecture is for the plan to say.
    Checkpoint(const std::string& path, int asked_mode);

    // Points into this object.
    swinq_model model() const;
    int int8_mode() const { return int8_mode_; }

  private:
    void read(int asked_mode);

    Safetensors file_;
    int int8_mode_;
    swinq_architecture architecture_;
    std::vector<std::string> layer_names_;
    std::vector<swinq_layer> layers_;
    std::vector<swinq_tensor> tensors_;
};

}  // namespace swinq

// What a Swin Transformer is, as data: the counterpart of swinq/models/architecture.py.
#pragma once

#include <cstdint>
#include <vector>

#include "include/swinq.h"

namespace swinq {

// One resolution level with the windows that it really uses. A stage no larger than the window is
// one window: then the window is the resolution and nothing is shifted.
struct Stage {
    int index;
    int dim;
    int depth;
    int heads;
    int resolution;  // tokens along one side
    int window;      // tokens along one side of the effective window
    int shift;       // of the odd blocks
    int hidden;      // channels between fc1 and fc2
    bool merges;     // ends with patch merging

    int64_t tokens() const { return static_cast<int64_t>(resolution) * resolution; }
    int head_dim() const { return dim / heads; }
    int padded_dim() const;  // channels of all heads, each padded to kHeadDim
};

// The stages of a validated architecture, finest first.
std::vector<Stage> stages(const swinq_architecture& architecture);

// Throws an Error that names the field, its value and what would be accepted: a model that cannot
// be, or that no kernel exists for.
void validate(const swinq_architecture& architecture);

}  // namespace swinq

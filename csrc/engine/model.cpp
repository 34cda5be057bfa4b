// A model as the caller hands it over, checked: see model.h.
#include "engine/model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/error.h"

namespace swinq {
namespace {

constexpr float kSmallestScale = 1.17549435e-38f;  // 2^-126: fp32 holds 1/scale down to here
// Up to here no product of scales, no sum and no square of an output leaves fp32: codes have no
// infinity, so an overflow would not be seen.
constexpr float kLargestScale = 16384.0f;             // 2^14
constexpr float kLargestNumber = 1125899906842624.f;  // 2^50
constexpr const char* kExportAgain = "export the model again; these tensors cannot be repaired";

template <typename Entry>
void require_array(const Entry* entries, size_t count, const char* name) {
    if (entries == nullptr && count != 0) {
        refuse(text(name, " is null, its count ", count), text("give ", name, " or a count of 0"));
    }
    for (size_t i = 0; i < count; ++i) {
        if (entries[i].name == nullptr) {
            refuse(text(name, "[", i, "] has no name"),
                   "name it as docs/checkpoint-format.md does");
        }
    }
}

PrecisionTable precision_table(const swinq_model& model) {
    require_array(model.layers, model.layer_count, "layers");
    PrecisionTable table;
    for (size_t i = 0; i < model.layer_count; ++i) {
        const swinq_layer& layer = model.layers[i];
        if (layer.precision < SWINQ_PRECISION_INT8 || layer.precision > SWINQ_PRECISION_FP32) {
            refuse(text("precision: ", layer.name, " is ", static_cast<int>(layer.precision)),
                   "give one of the values of swinq_precision");
        }
        if (!table.emplace(layer.name, layer.precision).second) {
            refuse(text("precision: ", layer.name, " is given twice"), "give it once");
        }
    }
    return table;
}

std::map<std::string, const swinq_tensor*> tensor_table(const swinq_model& model) {
    require_array(model.tensors, model.tensor_count, "tensors");
    std::map<std::string, const swinq_tensor*> table;
    for (size_t i = 0; i < model.tensor_count; ++i) {
        const swinq_tensor& tensor = model.tensors[i];
        if (tensor.type < SWINQ_INT8 || tensor.type > SWINQ_FLOAT) {
            refuse(text(tensor.name, " has type ", static_cast<int>(tensor.type)),
                   "give one of the values of swinq_type");
        }
        if (tensor.rank < 0 || tensor.rank > 4) {
            refuse(text(tensor.name, " has rank ", tensor.rank, ", wanted 0 to 4"),
                   "give the shape that docs/checkpoint-format.md says");
        }
        const int size = size_of(static_cast<Type>(tensor.type));
        if (tensor.data == nullptr || reinterpret_cast<uintptr_t>(tensor.data) % size != 0) {
            refuse(text(tensor.name, " has its data at ", tensor.data),
                   text("give host memory that is aligned to ", size, " bytes"));
        }
        if (!table.emplace(tensor.name, &tensor).second) {
            refuse(text("tensor ", tensor.name, " is given twice"), "give it once");
        }
    }
    return table;
}

std::string wanted_text(const TensorSpec& spec) {
    std::string out = type_name(spec.type);
    for (size_t i = 0; i < spec.shapes.size(); ++i) {
        out += (i ? " or " : " ") + shape_text(spec.shapes[i]);
    }
    return out;
}

void require_form(const std::string& name, const swinq_tensor& tensor, const TensorSpec& spec) {
    const std::vector<int64_t> shape(tensor.shape, tensor.shape + tensor.rank);
    const bool fits = std::find(spec.shapes.begin(), spec.shapes.end(), shape) != spec.shapes.end();
    if (tensor.type != spec.type || !fits) {
        refuse(text(name, " is ", type_name(tensor.type), " ", shape_text(shape), ", wanted ",
                    wanted_text(spec)),
               "give the tensors of a model of this architecture and these precisions");
    }
}

// Of fp16 bits: all exponent bits set.
bool is_finite(uint16_t half) {
    return (half & 0x7c00u) != 0x7c00u;
}

int64_t count_non_finite(const swinq_tensor& tensor) {
    const int64_t count = element_count(tensor);
    if (tensor.type == SWINQ_HALF) {
        const auto* p = static_cast<const uint16_t*>(tensor.data);
        return std::count_if(p, p + count, [](uint16_t x) { return !is_finite(x); });
    }
    const auto* p = static_cast<const float*>(tensor.data);
    return std::count_if(p, p + count, [](float x) { return !std::isfinite(x); });
}

// Refuses numbers that no export writes: they would run, and be wrong.
void require_sound(const std::string& name, const swinq_tensor& tensor, bool is_scale) {
    const int64_t count = element_count(tensor);
    if (tensor.type == SWINQ_INT8) {
        if (std::memchr(tensor.data, 0x80, static_cast<size_t>(count)) != nullptr) {
            refuse(text(name, " holds the code -128, wanted -127 to 127"), kExportAgain);
        }
        return;
    }
    if (const int64_t bad = count_non_finite(tensor)) {
        refuse(text(name, ": ", bad, " of ", count, " values are NaN or infinite"), kExportAgain);
    }
    if (tensor.type == SWINQ_HALF) {
        return;
    }
    const auto* p = static_cast<const float*>(tensor.data);
    const float largest = is_scale ? kLargestScale : kLargestNumber;
    for (int64_t i = 0; i < count; ++i) {
        if (std::fabs(p[i]) > largest) {
            refuse(text(name, " holds ", p[i], ", wanted at most ", largest,
                        " for it to stay within fp32"),
                   kExportAgain);
        }
        if (!is_scale) {
            continue;
        }
        if (p[i] < 0 || (p[i] != 0 && p[i] < kSmallestScale)) {
            refuse(text(name, " holds the scale ", p[i], ", wanted 0 or at least 2^-126"),
                   kExportAgain);
        }
    }
}

}  // namespace

int64_t element_count(const swinq_tensor& tensor) {
    int64_t count = 1;
    for (int i = 0; i < tensor.rank; ++i) {
        count *= tensor.shape[i];
    }
    return count;
}

Model::Model(const swinq_model& model) : architecture_(model.architecture) {
    validate(architecture_);
    stages_ = swinq::stages(architecture_);
    precisions_ = precision_table(model);
    tensors_ = tensor_table(model);
    int64_t depth = 0;
    for (const Stage& stage : stages_) {
        depth += stage.depth;
    }
    if (depth > static_cast<int64_t>(tensors_.size())) {  // before blocks are listed one by one
        refuse(text("depths ask for ", depth, " blocks, far more than ", tensors_.size(),
                    " tensors fill"),
               "give the architecture that the tensors belong to");
    }
    validate_precisions(architecture_, precisions_);
    stream_ = precisions_.begin()->second == SWINQ_PRECISION_FP32 ? Type::kFloat : Type::kHalf;
    const std::map<std::string, TensorSpec> wanted = expected_tensors(architecture_, precisions_);
    for (const auto& [name, spec] : wanted) {
        const auto found = tensors_.find(name);
        if (found == tensors_.end()) {
            refuse(text("missing tensor: ", name), text("give it as ", wanted_text(spec)));
        }
        require_form(name, *found->second, spec);
    }
    for (const auto& entry : tensors_) {
        if (wanted.count(entry.first) == 0) {
            refuse(text("tensor that such a model does not have: ", entry.first), "leave it out");
        }
    }
    for (const auto& [name, spec] : wanted) {
        require_sound(name, *tensors_.at(name), spec.is_scale);
    }
}

Type Model::type(const std::string& layer) const {
    return static_cast<Type>(element_type(precision(layer)));
}

const float* Model::floats(const std::string& name) const {
    return static_cast<const float*>(tensor(name).data);
}

}  // namespace swinq

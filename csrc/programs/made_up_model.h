// Models with made-up weights, of the sizes of the official ones: for timing, and for comparing
// precisions.
//
// The weights are codes times a scale in every precision, so an INT8, an FP16 and an FP32 model of
// one architecture compute the same function but for rounding. Scales follow from the sizes of what
// random weights give (comments in made_up_model.cpp), so that activations fill their codes and few
// saturate.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "swinq.h"

namespace swinq::programs {

enum class Numbers { kInt8Mode1, kInt8Mode2, kHalf, kFloat };

enum class Size : int { kTiny = 0, kSmall = 1, kBase = 2, kLarge = 3 };

const char* name_of(Size size);
const char* name_of(Numbers numbers);

// An official size with another window or image; MadeUpModel refuses what cannot be.
swinq_architecture architecture_of(int version, Size size, int window, int img_size);

class MadeUpModel {
  public:
    // Throws before any weight is made, they may take gigabytes, if no kernels exist for the model.
    MadeUpModel(const swinq_architecture& architecture, Numbers numbers);
    MadeUpModel(const MadeUpModel&) = delete;
    MadeUpModel& operator=(const MadeUpModel&) = delete;

    // Points into this object.
    swinq_model model() const;

  private:
    struct Range {
        float low, high;
    };
    struct LinearScales;

    void add_block(const std::string& name, int dim, int heads, int window);
    void add_linear(const std::string& name, int out, int in, const LinearScales& scales);
    void add_matrix(const std::string& name, const std::vector<int64_t>& shape, float deviation);
    void add_norm(const std::string& name, int width, float gain);
    void add_vector(const std::string& name, const std::vector<int64_t>& shape, Range range);
    void add(const std::string& name, swinq_type type, const std::vector<int64_t>& shape,
             const void* data);
    void set_precision(const std::string& layer, swinq_precision precision);
    float next(Range range);

    bool is_int8() const {
        return numbers_ == Numbers::kInt8Mode1 || numbers_ == Numbers::kInt8Mode2;
    }

    const swinq_architecture architecture_;
    const Numbers numbers_;
    uint64_t random_ = 1;  // state of the generator
    // deques: what was added stays where it is
    std::deque<std::string> names_;
    std::deque<std::vector<uint8_t>> data_;
    std::vector<swinq_tensor> tensors_;
    std::vector<swinq_layer> layers_;
};

// (count) numbers between -2 and 2, such as normalised images hold.
std::vector<float> made_up_images(int64_t count);

}  // namespace swinq::programs

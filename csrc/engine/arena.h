// One block of device memory that is laid out twice: once to measure it, once to fill its image in
// host memory, which is then copied in one piece.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/types.h"

namespace swinq {

class Arena {
  public:
    static constexpr int64_t kAlignment = 256;

    Arena() =
        default;  // measures: fills nothing; its pointers say only that there will be something
    Arena(uint8_t* host, const void* device)  // host: zeros, copied to `device` afterwards
        : host_(host), device_(reinterpret_cast<uintptr_t>(device)) {}

    int64_t size() const { return size_; }

    // Room for `count` values that `fill(T*)` writes; where they will lie on the device.
    template <typename T, typename Fill>
    const T* add(int64_t count, Fill&& fill) {
        const int64_t at = size_;
        size_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment;
        if (host_ != nullptr) {
            std::forward<Fill>(fill)(reinterpret_cast<T*>(host_ + at));
        }
        return reinterpret_cast<const T*>(device_ + static_cast<uintptr_t>(at));
    }

    // A vector, with zeros behind it up to a multiple of 32 values.
    const float* add(const std::vector<float>& values) {
        const auto count = static_cast<int64_t>(values.size());
        return add<float>(ceil_div(count, 32) * 32, [&](float* out) {
            for (float value : values) {
                *out++ = value;
            }
        });
    }

  private:
    uint8_t* host_ = nullptr;
    uintptr_t device_ = kAlignment;
    int64_t size_ = 0;
};

}  // namespace swinq

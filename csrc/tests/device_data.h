// Device memory of the tests: arrays filled with made-up numbers, outputs between guard bands.
#pragma once

#include <cuda_fp16.h>

#include <vector>

#include "testing.h"

namespace swinq::testing {

// Exactly `count` elements, so that compute-sanitizer sees a read beyond them.
template <typename T>
class DeviceArray {
  public:
    DeviceArray() = default;
    explicit DeviceArray(int64_t count) : count_(count) {
        must(cudaMalloc(&data_, static_cast<size_t>(count > 0 ? count : 1) * sizeof(T)),
             "cudaMalloc of a test's input");
    }
    explicit DeviceArray(const std::vector<T>& values)
        : DeviceArray(static_cast<int64_t>(values.size())) {
        must(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
             "copy to the device");
    }
    DeviceArray(DeviceArray&& other) noexcept { *this = std::move(other); }
    DeviceArray& operator=(DeviceArray&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(count_, other.count_);
        return *this;
    }
    ~DeviceArray() { cudaFree(data_); }

    T* get() const { return data_; }
    int64_t size() const { return count_; }
    std::vector<T> read() const {
        std::vector<T> values(static_cast<size_t>(count_));
        must(cudaMemcpy(values.data(), data_, values.size() * sizeof(T), cudaMemcpyDeviceToHost),
             "copy from the device");
        return values;
    }

  private:
    T* data_ = nullptr;
    int64_t count_ = 0;
};

// Uniform numbers in [low, high], integers for int8; a function of seed and index alone.
template <typename T>
void fill(T* data, int64_t count, uint32_t seed, float low, float high);

template <typename T>
DeviceArray<T> random_array(int64_t count, uint32_t seed, float low, float high) {
    DeviceArray<T> array(count);
    fill(array.get(), count, seed, low, high);
    return array;
}

// Sets about one element in `every`: inverses and scales to 0, which dead channels have, or to a
// power of two, with which some products lie halfway between two codes.
void set_some(float* data, int64_t count, uint32_t seed, int every, float value);

// Untyped numbers of a Type that is only known at run time.
DeviceArray<uint8_t> random_bytes(Type type, int64_t count, uint32_t seed, float low, float high);

// An output between two guard bands. `poison` makes all of it NaN (or -1), so that what a kernel
// leaves out shows; `check_guards` counts changed guard bytes into a tally.
class GuardedBuffer {
  public:
    static constexpr int kGuard = 1024;  // bytes on either side, keeps the alignment
    explicit GuardedBuffer(int64_t capacity_bytes) : buffer_(capacity_bytes + 2 * kGuard) {}
    void* get() const { return buffer_.get() + kGuard; }
    template <typename T>
    T* as() const {
        return static_cast<T*>(get());
    }
    void poison(int64_t bytes);
    void check_guards(Tally* tally) const;

  private:
    DeviceArray<uint8_t> buffer_;
    int64_t bytes_ = 0;  // in use since the last poison()
};

inline uint32_t next_seed() {
    static uint32_t seed = 0;
    return ++seed * 2654435761u;
}

}  // namespace swinq::testing

// Device memory and calls of the library and the CUDA runtime that throw.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "swinq.h"

namespace swinq::programs {

inline void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    const char* fix = status == cudaErrorMemoryAllocation
                          ? "free device memory, or use a smaller batch"
                          : "run with CUDA_LAUNCH_BLOCKING=1 to find the call that failed first";
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) +
                             "\n  fix: " + fix);
}

inline void check(swinq_status status) {
    if (status != SWINQ_OK) throw std::runtime_error(swinq_last_error());
}

// Refuses what the GPU has no room for, before anything is made that large; the host's memory might
// not hold it either.
inline void require_memory(const std::string& what, size_t wanted) {
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    if (wanted <= free) return;
    throw std::runtime_error(what + " wants " + std::to_string(wanted >> 20) +
                             " MiB of GPU memory, " + std::to_string(free >> 20) +
                             " MiB are free\n  fix: use a smaller batch");
}

class DeviceMemory {
  public:
    explicit DeviceMemory(size_t bytes) {
        check(cudaMalloc(&data_, bytes ? bytes : 1),
              ("cudaMalloc of " + std::to_string(bytes) + " bytes").c_str());
    }
    template <typename T>
    explicit DeviceMemory(const std::vector<T>& values) : DeviceMemory(values.size() * sizeof(T)) {
        check(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
              "cudaMemcpy");
    }
    ~DeviceMemory() { cudaFree(data_); }
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;

    void* get() const { return data_; }
    template <typename T>
    T* as() const {
        return static_cast<T*>(data_);
    }

  private:
    void* data_ = nullptr;
};

}  // namespace swinq::programs

// The CUDA device as the engine sees it: which one is current, what it is, whether kernels exist.
#pragma once

#include <string>

#include "kernels/types.h"

namespace swinq {

constexpr int kOldestCapability = 75;

// Makes a device current and, at the end, the one that was before.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_;
    bool changed_;
};

// Throws unless the device exists and kernels exist for it.
void require_device(int device);

// Throws unless kernels of the device can read what lies at the pointer: its own memory, or
// managed.
void require_memory(const char* name, const void* pointer, int device);

// Such as "NVIDIA H100 80GB HBM3".
std::string device_name(int device);

}  // namespace swinq

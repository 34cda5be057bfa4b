// The CUDA device: see device.h, and the declarations in kernels/types.h that all kernels share.
#include "engine/device.h"

#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <utility>

#include "engine/error.h"

namespace swinq {
namespace {

constexpr int kMostDevices = 64;

thread_local Launching launching_here = Launching::kEarly;

int current_device() {
    int device = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    return device;
}

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
    return value;
}

int capability_of(int device) {
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
           attribute(cudaDevAttrComputeCapabilityMinor, device);
}

// `read(device)` of the current device, read at the first call for each.
template <typename Read>
int read_once(std::array<std::atomic<int>, kMostDevices>& known, Read read) {
    const int device = current_device();
    if (device >= kMostDevices) {
        return read(device);
    }
    std::atomic<int>& value = known[static_cast<size_t>(device)];
    if (value.load(std::memory_order_relaxed) == 0) {
        value.store(read(device), std::memory_order_relaxed);
    }
    return value.load(std::memory_order_relaxed);
}

}  // namespace

void check_cuda(cudaError_t status, const char* what) {
    if (status == cudaSuccess) {
        return;
    }
    cudaGetLastError();  // so that it does not surface again at the next launch
    const std::string problem = text(what, ": ", cudaGetErrorString(status));
    switch (status) {
        case cudaErrorMemoryAllocation:
            fail(Error::kOutOfMemory, problem, "free device memory, or use a smaller batch");
        case cudaErrorNoDevice:
        case cudaErrorInsufficientDriver:
            fail(Error::kUnsupported, problem,
                 "run on a machine with an NVIDIA GPU and its driver (nvidia-smi shows both)");
        case cudaErrorNoKernelImageForDevice:
            fail(Error::kUnsupported, problem,
                 "build libswinq for this GPU: SWINQ_ARCHITECTURES names what it was built for");
        default:
            fail(
                Error::kCuda, problem,
                "if it came from an earlier kernel, run with CUDA_LAUNCH_BLOCKING=1 to find which");
    }
}

int compute_capability() {
    static std::array<std::atomic<int>, kMostDevices> known;
    return read_once(known, capability_of);
}

int multiprocessors() {
    static std::array<std::atomic<int>, kMostDevices> known;
    return read_once(known,
                     [](int device) { return attribute(cudaDevAttrMultiProcessorCount, device); });
}

int shared_memory_limit() {
    static std::array<std::atomic<int>, kMostDevices> known;
    return read_once(known, [](int device) {
        return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    });
}

Launching launching() {
    return launching_here;
}

LaunchingScope::LaunchingScope(Launching launching) : previous_(launching_here) {
    launching_here = launching;
}

LaunchingScope::~LaunchingScope() {
    launching_here = previous_;
}

void load_kernel(const void* kernel) {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
}

void allow_shared_memory(const void* kernel, int bytes) {
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, int> allowed;
    const int device = current_device();
    std::lock_guard<std::mutex> lock(mutex);
    int& most = allowed[{kernel, device}];
    if (bytes <= most) {
        return;
    }
    const int limit = shared_memory_limit();
    if (bytes > limit) {
        fail(Error::kUnsupported,
             text("a kernel wants ", bytes, " bytes of shared memory a block, the GPU has ", limit),
             "use a GPU with more, or a smaller tile");
    }
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
               "cudaFuncSetAttribute");
    most = bytes;
}

DeviceGuard::DeviceGuard(int device) : previous_(current_device()), changed_(previous_ != device) {
    if (changed_) {
        check_cuda(cudaSetDevice(device), "cudaSetDevice");
    }
}

DeviceGuard::~DeviceGuard() {
    if (changed_) {
        cudaSetDevice(previous_);
    }
}

void require_device(int device) {
    int count = 0;
    check_cuda(cudaGetDeviceCount(&count), "looking for CUDA devices");
    if (device < 0 || device >= count) {
        refuse(text("device is ", device, "; there are ", count, " CUDA devices"),
               text("give a number from 0 to ", count - 1));
    }
    const int capability = capability_of(device);
    if (capability < kOldestCapability) {
        fail(Error::kUnsupported,
             text("device ", device, " (", device_name(device), ") has compute capability ",
                  capability / 10, ".", capability % 10, ", wanted 7.5 or later"),
             "use a GPU of the Turing generation or a later one");
    }
}

void require_memory(const char* name, const void* pointer, int device) {
    cudaPointerAttributes found = {};
    check_cuda(cudaPointerGetAttributes(&found, pointer), "cudaPointerGetAttributes");
    const bool on_host =
        found.type == cudaMemoryTypeUnregistered || found.type == cudaMemoryTypeHost;
    if (on_host || (found.type == cudaMemoryTypeDevice && found.device != device)) {
        refuse(text(name, " is at ", pointer, " in the memory of ",
                    on_host ? std::string("the host") : text("device ", found.device),
                    ", the plan is on device ", device),
               text("copy ", name, " to device ", device));
    }
}

std::string device_name(int device) {
    cudaDeviceProp properties;
    check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    return properties.name;
}

}  // namespace swinq

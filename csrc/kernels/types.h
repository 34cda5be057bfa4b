// What every kernel's host interface shares: number types, errors, launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace swinq {

// Width of an attention head as the kernels see it. The plan pads narrower heads with zero weights.
constexpr int kHeadDim = 32;

enum class Type : int { kInt8 = 0, kHalf = 1, kFloat = 2 };

constexpr int size_of(Type type) {
    return type == Type::kInt8 ? 1 : type == Type::kHalf ? 2 : 4;
}

// What went wrong and what to do about it; the C ABI turns it into a code and a text.
class Error : public std::runtime_error {
  public:
    enum Code : int { kInvalidArgument = 1, kUnsupported = 2, kOutOfMemory = 3, kCuda = 4 };
    Error(Code code, const std::string& text) : std::runtime_error(text), code(code) {}
    const Code code;
};

// Throws Error::kCuda if `status` is not success; `what` names the call.
void check_cuda(cudaError_t status, const char* what);

// major * 10 + minor of the current device, such as 90; read once a device.
int compute_capability();

// Multiprocessors of the current device; read once a device.
int multiprocessors();

// Bytes of shared memory that a block of the current device may have; read once a device.
int shared_memory_limit();

// Raises a kernel's dynamic shared memory limit to `bytes`; throws if the device has less.
void allow_shared_memory(const void* kernel, int bytes);

// What launches on this thread do.
enum class Launching {
    // Programmatic dependent launch where the device has it (sm_90): the kernel may start while its
    // predecessor in the stream ends. It must call wait_for_predecessor() (device.cuh), in every
    // thread of every block, before it touches anything that a kernel of the same forward does;
    // weights it may read before.
    kEarly,
    kInOrder,  // after its predecessor, which may have written the weights
    kLoad      // nothing but load the kernel's code, for CUDA does so at the first launch
};
Launching launching();

// How a scope's launches go; without one they are early.
class LaunchingScope {
  public:
    explicit LaunchingScope(Launching launching);
    ~LaunchingScope();
    LaunchingScope(const LaunchingScope&) = delete;
    LaunchingScope& operator=(const LaunchingScope&) = delete;

  private:
    const Launching previous_;
};

// Loads a kernel's code on the current device.
void load_kernel(const void* kernel);

// Launches a kernel as `launching()` says. `cluster` neighbouring blocks of x form a cluster (sm_90
// where it is not 1).
template <typename... Parameters, typename... Arguments>
void launch_clusters(int cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                     int shared_bytes, cudaStream_t stream, Arguments... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    cudaLaunchAttribute attributes[2] = {};
    config.attrs = attributes;
    if (launching() == Launching::kEarly && compute_capability() >= 90) {
        cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    if (shared_bytes > 48 * 1024) {
        allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
    }
    if (launching() == Launching::kLoad) {
        return load_kernel(reinterpret_cast<const void*>(kernel));
    }
    check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...),
               "cudaLaunchKernelEx");
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
            cudaStream_t stream, Arguments... arguments) {
    launch_clusters(1, kernel, grid, block, shared_bytes, stream, arguments...);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

}  // namespace swinq

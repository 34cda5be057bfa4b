// As much of the CUDA runtime as the engine and the programs call, of one device whose memory is
// the host's: see host_kernels.cpp.
//
// SWINQ_HOST_FREE=BYTES     what cudaMemGetInfo says is free
// SWINQ_HOST_LARGEST=BYTES  a larger allocation fails, as where another process was quicker
#include "tests/host_runtime.h"

#include <cuda_runtime.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/types.h"

namespace {

using Work = std::vector<std::function<void()>>;
using Clock = std::chrono::steady_clock;

thread_local Work* captured = nullptr;

size_t limit(const char* variable) {
    const char* bytes = std::getenv(variable);
    return bytes ? std::strtoull(bytes, nullptr, 10) : size_t{1} << 40;
}

// Handles of the runtime are pointers to what it never shows.
template <typename Handle, typename T>
Handle handle_of(T* object) {
    return reinterpret_cast<Handle>(object);
}
template <typename T, typename Handle>
T* object_of(Handle handle) {
    return reinterpret_cast<T*>(handle);
}

}  // namespace

void swinq::testing::enqueue(std::function<void()> work) {
    if (swinq::launching() == swinq::Launching::kLoad) return;
    if (captured) {
        captured->push_back(std::move(work));
    } else {
        work();
    }
}

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
    return *count = 1, cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    return *device = 0, cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) {
    return "an error of the host runtime";
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
    return cudaSuccess;
}
// All memory is the device's, but for a page that no program has.
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
    *attributes = {};
    attributes->type = pointer == reinterpret_cast<void*>(0x1000) ? cudaMemoryTypeUnregistered
                                                                  : cudaMemoryTypeDevice;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
    *value = name == cudaDevAttrComputeCapabilityMajor         ? 9
             : name == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 232448
                                                               : 0;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    std::memset(properties, 0, sizeof *properties);
    std::strcpy(properties->name, "host");
    return cudaSuccess;
}

// ---- memory ----

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    return *free = *total = limit("SWINQ_HOST_FREE"), cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
    *memory = bytes > limit("SWINQ_HOST_LARGEST")
                  ? nullptr
                  : std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* memory) {
    return std::free(memory), cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    return std::memcpy(to, from, bytes), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
    return swinq::testing::enqueue([=] { std::memcpy(to, from, bytes); }), cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t) {
    swinq::testing::enqueue([=] {
        for (size_t row = 0; row < height; ++row) {
            std::memcpy(static_cast<char*>(to) + row * to_pitch,
                        static_cast<const char*>(from) + row * from_pitch, width);
        }
    });
    return cudaSuccess;
}
cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
    return std::memset(memory, value, bytes), cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
    return swinq::testing::enqueue([=] { std::memset(memory, value, bytes); }), cudaSuccess;
}

// ---- streams, which do everything at once, and graphs ----

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    return *stream = nullptr, cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) {
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    return captured = new Work, cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
    return *graph = handle_of<cudaGraph_t>(std::exchange(captured, nullptr)), cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete object_of<Work>(graph);
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long) {
    *executable = handle_of<cudaGraphExec_t>(new Work(*object_of<Work>(graph)));
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    delete object_of<Work>(executable);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
    for (const auto& work : *object_of<Work>(executable)) {
        work();
    }
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
    return *event = handle_of<cudaEvent_t>(new Clock::time_point), cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete object_of<Clock::time_point>(event);
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
    return *object_of<Clock::time_point>(event) = Clock::now(), cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
    const std::chrono::duration<float, std::milli> taken =
        *object_of<Clock::time_point>(end) - *object_of<Clock::time_point>(start);
    return *ms = taken.count(), cudaSuccess;
}

}  // extern "C"

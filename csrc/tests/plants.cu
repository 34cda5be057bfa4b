// Four kernels with one fault each.
#include "plants.h"

#include <cuda_runtime.h>

#include <cstdio>

namespace swinq::testing {

namespace {

constexpr int kCount = 64;  // elements of the buffer, threads of the block

__global__ void write_out_of_bounds(int* data) {
    data[threadIdx.x + 1] = 1;
}

// The second warp reads what the first wrote, without a barrier between them.
__global__ void race(int* data) {
    __shared__ int shared[kCount];
    shared[threadIdx.x] = data[threadIdx.x];
    data[threadIdx.x] = shared[kCount - 1 - threadIdx.x];
}

// Half a warp waits for a barrier that the other half never reaches.
__global__ void miss_barrier(int* data) {
    if (threadIdx.x % 32 < 16) {
        data[threadIdx.x] = 1;
        __syncthreads();
    }
    data[threadIdx.x] += 1;
}

__global__ void read_uninitialised(const int* data, int* copy) {
    copy[threadIdx.x] = data[threadIdx.x];
}

}  // namespace

bool run_plant(const std::string& fault) {
    int *data = nullptr, *blank = nullptr;
    cudaMalloc(&data, kCount * sizeof(int));
    cudaMalloc(&blank, kCount * sizeof(int));
    cudaMemset(data, 0, kCount * sizeof(int));
    bool known = true;
    if (fault == "out-of-bounds") {
        write_out_of_bounds<<<1, kCount>>>(data);
    } else if (fault == "race") {
        race<<<1, kCount>>>(data);
    } else if (fault == "sync") {
        miss_barrier<<<1, kCount>>>(data);
    } else if (fault == "uninitialised") {
        read_uninitialised<<<1, kCount>>>(blank, data);
    } else {
        known = false;
    }
    std::printf("%s: %s\n", fault.c_str(), cudaGetErrorString(cudaDeviceSynchronize()));
    cudaFree(data);
    cudaFree(blank);
    return known;
}

}  // namespace swinq::testing

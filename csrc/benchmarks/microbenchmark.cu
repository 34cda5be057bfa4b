// The rates of this GPU that decide how the kernels are built: tensor cores by instruction and
// width, the arithmetic of the epilogues, L2 and DRAM reads, and what a kernel in a graph costs.
//
//     nvcc -std=c++17 -O3 -Icsrc/kernels -gencode arch=compute_90a,code=sm_90a \
//         -o microbenchmark csrc/benchmarks/microbenchmark.cu && ./microbenchmark
//
// One markdown table, a few seconds. Operands are random, clocks are as found, times are medians of
// CUDA-event times; "per clock" figures divide by the cycles that the blocks themselves counted.

#include "arithmetic.cuh"
#include "launches.cuh"
#include "memory.cuh"
#include "tensor_cores.cuh"

using namespace swinq::benchmark;

int main() {
    cudaDeviceProp device;
    check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
    if (device.major != 9 || device.minor != 0) {
        std::fprintf(stderr, "%s has compute capability %d.%d, and wgmma exists on 9.0 alone\n",
                     device.name, device.major, device.minor);
        return 1;
    }
    g_multiprocessors = device.multiProcessorCount;
    check(cudaMalloc(&g_out, 64), "cudaMalloc");
    check(cudaMalloc(&g_cycles, 8 * g_multiprocessors * sizeof(long long)), "cudaMalloc");
    uint4* buffer;
    constexpr int64_t kBufferBytes = int64_t{1} << 30;
    check(cudaMalloc(&buffer, kBufferBytes), "cudaMalloc");
    fill_kernel<<<g_multiprocessors, 1024>>>(reinterpret_cast<uint32_t*>(buffer), kBufferBytes / 4);
    check(cudaDeviceSynchronize(), "fill");

    std::printf("%s, %d SMs, L2 %.0f MB\n\n", device.name, g_multiprocessors,
                device.l2CacheSize / 1e6);
    std::printf("| what | how | measured | per clock |\n|---|---|---|---|\n");
    operation_rate<kFfma>("FFMA", "fp32", 1);
    operation_rate<kHfma2>("HFMA2", "two fp16", 2);
    operation_rate<kI2f>("I2FP", "s32 to fp32", 1);
    operation_rate<kF2i>("F2I", "fp32 to s32", 1);
    operation_rate<kPack>("pack_s8", "four fp32 to four s8 codes", 4);
    operation_rate<kTanh2>("tanh.approx.f16x2", "two fp16", 2);
    operation_rate<kTanh>("tanh.approx.f32", "fp32", 1);
    operation_rate<kExp2>("ex2.approx.f32", "fp32", 1);
    operation_rate<kExp2Half>("ex2.approx.f16x2", "two fp16", 2);
    operation_rate<kRsqrt>("rsqrt.approx.f32", "fp32", 1);
    mma_rate<true>();
    mma_rate<false>();
    wgmma_rates<64>();
    wgmma_rates<96>();
    wgmma_rates<128>();
    wgmma_rates<192>();
    wgmma_rates<256>();
    overlap();
    for (double size : {2.0, 8.0, 16.0, 24.0, 32.0, 40.0, 1000.0}) {
        read_rate(buffer, size, g_multiprocessors);
    }
    read_rate(buffer, 2.0, 1);
    read_rate(buffer, 2.0, g_multiprocessors / 2);
    launch_cost<false>(1, 32);
    launch_cost<false>(g_multiprocessors, 256);
    launch_cost<true>(1, 32);
    launch_cost<true>(g_multiprocessors, 256);
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    return 0;
}

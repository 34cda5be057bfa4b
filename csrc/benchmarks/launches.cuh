// What an empty kernel costs in a stream and in a graph, with and without programmatic dependent
// launch.
#pragma once

#include "device.cuh"
#include "timing.cuh"

namespace swinq::benchmark {

template <bool kDependent>
__global__ void empty_kernel() {
    if constexpr (kDependent) {
        swinq::wait_for_predecessor();
        swinq::let_successor_start();
    }
}

template <bool kDependent>
void enqueue_empty(cudaStream_t stream, int blocks, int threads) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.stream = stream;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = kDependent ? 1 : 0;
    check(cudaLaunchKernelEx(&config, empty_kernel<kDependent>), "cudaLaunchKernelEx");
}

template <bool kDependent>
void launch_cost(int blocks, int threads) {
    constexpr int kLaunches = 200;
    cudaStream_t stream;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    auto enqueue = [&] {
        for (int i = 0; i < kLaunches; ++i) enqueue_empty<kDependent>(stream, blocks, threads);
    };
    const double in_stream = milliseconds(stream, enqueue);
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin capture");
    enqueue();
    check(cudaStreamEndCapture(stream, &graph), "end capture");
    check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    const double in_graph = milliseconds(
        stream, [&] { check(cudaGraphLaunch(executable, stream), "cudaGraphLaunch"); });
    char how[96];
    const char* chained = kDependent ? "programmatic dependent launch" : "plain";
    std::snprintf(how, sizeof how, "%s, %d x %d threads, stream", chained, blocks, threads);
    row("empty kernel", how, 1e3 * in_stream / kLaunches, "us", 0, "");
    std::snprintf(how, sizeof how, "%s, %d x %d threads, graph", chained, blocks, threads);
    row("empty kernel", how, 1e3 * in_graph / kLaunches, "us", 0, "");
    check(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
    check(cudaGraphDestroy(graph), "cudaGraphDestroy");
    check(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

}  // namespace swinq::benchmark

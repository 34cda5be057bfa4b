// How long work on a stream takes: with CUDA events, as a median.
#pragma once

#include <algorithm>

#include "device_memory.h"

namespace swinq::programs {

class Stream {
  public:
    Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"); }
    ~Stream() { cudaStreamDestroy(stream_); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    cudaStream_t get() const { return stream_; }
    void synchronize() const { check(cudaStreamSynchronize(stream_), "the stream"); }

  private:
    cudaStream_t stream_ = nullptr;
};

// What `enqueue(stream)` enqueues, as a CUDA graph.
class Graph {
  public:
    template <typename Enqueue>
    Graph(const Stream& stream, Enqueue enqueue) {
        check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal), "a capture");
        try {
            enqueue(stream.get());
        } catch (...) {
            cudaGraph_t broken = nullptr;
            cudaStreamEndCapture(stream.get(), &broken);
            if (broken) cudaGraphDestroy(broken);
            throw;
        }
        cudaGraph_t graph = nullptr;
        check(cudaStreamEndCapture(stream.get(), &graph), "the end of a capture");
        const cudaError_t status = cudaGraphInstantiate(&graph_, graph, 0);
        cudaGraphDestroy(graph);
        check(status, "cudaGraphInstantiate");
    }
    ~Graph() { cudaGraphExecDestroy(graph_); }
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;
    void launch(cudaStream_t stream) const { check(cudaGraphLaunch(graph_, stream), "a graph"); }

  private:
    cudaGraphExec_t graph_ = nullptr;
};

class Event {
  public:
    Event() { check(cudaEventCreate(&event_), "an event"); }
    ~Event() { cudaEventDestroy(event_); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    cudaEvent_t get() const { return event_; }

  private:
    cudaEvent_t event_ = nullptr;
};

// Median milliseconds of `runs` runs of `enqueue(stream)`, each between two events, after warming
// up.
template <typename Enqueue>
float median_ms(const Stream& stream, int warm_ups, int runs, Enqueue enqueue) {
    for (int i = 0; i < warm_ups; ++i) enqueue(stream.get());
    const std::vector<Event> starts(runs), ends(runs);
    for (int i = 0; i < runs; ++i) {
        check(cudaEventRecord(starts[i].get(), stream.get()), "an event");
        enqueue(stream.get());
        check(cudaEventRecord(ends[i].get(), stream.get()), "an event");
    }
    stream.synchronize();
    std::vector<float> times(runs);
    for (int i = 0; i < runs; ++i) {
        check(cudaEventElapsedTime(&times[i], starts[i].get(), ends[i].get()), "elapsed time");
    }
    std::nth_element(times.begin(), times.begin() + runs / 2, times.end());
    return times[runs / 2];
}

}  // namespace swinq::programs

/* The fused MLP alone: against a reference that follows docs/numerics.md literally, and its time. A
 * program of its own, built by one line in the repository's root and run on an sm_90 GPU:
 *     nvcc -O3 -DSWINQ_MLP_TEST -Icsrc/kernels -gencode arch=compute_90a,code=sm_90a \
 *         csrc/tests/mlp_test.cu csrc/kernels/mlp.cu -o mlp_test && ./mlp_test
 * It exits with 1 if a case fails. Two references: with the kernels' own gelu(), where all bits of
 * x must agree (but for LayerNorm codes on an edge), and with erf, where codes may differ as
 * docs/numerics.md allows for an approximated GELU. */
#ifdef SWINQ_MLP_TEST  // kernel_test, built of all files here, has its own main()

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "gelu.cuh"
#include "mlp.h"

namespace swinq {

// What the engine's device.cpp does, for this program.
void check_cuda(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    throw Error(Error::kCuda, std::string(what) + ": " + cudaGetErrorString(status));
}
static int attribute(cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, 0), "cudaDeviceGetAttribute");
    return value;
}
int compute_capability() {
    static const int value = attribute(cudaDevAttrComputeCapabilityMajor) * 10 +
                             attribute(cudaDevAttrComputeCapabilityMinor);
    return value;
}
int multiprocessors() {
    static const int value = attribute(cudaDevAttrMultiProcessorCount);
    return value;
}
void allow_shared_memory(const void* kernel, int bytes) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
               "cudaFuncSetAttribute");
}

namespace {

constexpr int kGuardRows = 64;  // behind x, must stay as they are

// Device memory that a host vector was copied to.
template <typename T>
class Array {
  public:
    explicit Array(const std::vector<T>& values) : size_(values.size()) {
        check_cuda(cudaMalloc(&data_, size_ * sizeof(T)), "cudaMalloc");
        write(values);
    }
    explicit Array(size_t size) : Array(std::vector<T>(size)) {}
    Array(const Array&) = delete;
    ~Array() { cudaFree(data_); }
    T* get() const { return data_; }
    void write(const std::vector<T>& values) {
        check_cuda(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice),
                   "copy to the device");
    }
    std::vector<T> read() const {
        std::vector<T> values(size_);
        check_cuda(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost),
                   "copy from the device");
        return values;
    }

  private:
    size_t size_;
    T* data_ = nullptr;
};

std::mt19937 generator(1);

std::vector<float> uniform(int n, float low, float high) {
    std::uniform_real_distribution<float> draw(low, high);
    std::vector<float> values(n);
    for (float& value : values) value = draw(generator);
    return values;
}

// With a dead channel among every 31.
std::vector<float> inverses(int n, float low, float high) {
    std::vector<float> values = uniform(n, low, high);
    for (int i = 7; i < n; i += 31) values[i] = 0;
    return values;
}

std::vector<int8_t> codes(int n) {
    std::uniform_int_distribution<int> draw(-127, 127);
    std::vector<int8_t> values(n);
    for (int8_t& value : values) value = static_cast<int8_t>(draw(generator));
    return values;
}

// ---- reference ----

// A row a thread. Sums in the order of the kernel: four parts of 8 channels of every 32.
__global__ void layernorm_reference(const __half* x, const MlpArguments p, int8_t* out) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= p.m) return;
    const __half* from = x + static_cast<int64_t>(row) * p.channels;
    const float inverse_width = 1.0f / static_cast<float>(p.channels);
    auto sum_of = [&](auto term) {
        float parts[4];
        for (int t = 0; t < 4; ++t) {
            parts[t] = 0;
            for (int block = 0; block < p.channels; block += 32) {
                float part = 0;
                for (int i = 0; i < 8; ++i) {
                    part = term(part, __half2float(from[block + 8 * t + i]));
                }
                parts[t] += part;
            }
        }
        return (parts[0] + parts[1]) + (parts[2] + parts[3]);
    };
    const float mean = sum_of([](float sum, float v) { return sum + v; }) * inverse_width;
    const float squares = sum_of([=](float sum, float v) {
        const float deviation = __fsub_rn(v, mean);
        return __fmaf_rn(deviation, deviation, sum);
    });
    const float rstd = rsqrtf(squares * inverse_width + p.eps);
    for (int c = 0; c < p.channels; ++c) {
        const float deviation = __fsub_rn(__half2float(from[c]), mean);
        const float y = __fmaf_rn(__fmul_rn(deviation, rstd), p.gamma[c], p.beta[c]);
        out[static_cast<int64_t>(row) * p.channels + c] =
            static_cast<int8_t>(quantize(y, p.in_inverse[c]));
    }
}

__device__ int dot(const int8_t* a, const int8_t* b, int k) {
    int sum = 0;
    for (int i = 0; i < k; i += 4) {
        sum =
            __dp4a(*reinterpret_cast<const int*>(a + i), *reinterpret_cast<const int*>(b + i), sum);
    }
    return sum;
}

__global__ void fc1_reference(const int8_t* a, const int8_t* weight, const MlpArguments p,
                              bool exact, int8_t* out) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= static_cast<int64_t>(p.m) * p.hidden) return;
    const int64_t row = at / p.hidden;
    const int c = static_cast<int>(at % p.hidden);
    const int acc =
        dot(a + row * p.channels, weight + static_cast<int64_t>(c) * p.channels, p.channels);
    const float y = __fmaf_rn(__int2float_rn(acc), p.fc1_factor[c], p.fc1_bias[c]);
    const float cdf = __fadd_rn(erff(__fmul_rn(y, 0.70710678f)), 1.0f);
    const float h = exact ? __fmul_rn(__fmul_rn(y, 0.5f), cdf) : gelu(y);
    out[at] = static_cast<int8_t>(quantize(h, p.hidden_inverse[c]));
}

__global__ void fc2_reference(const int8_t* a, const int8_t* weight, const MlpArguments p,
                              __half* x) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= static_cast<int64_t>(p.m) * p.channels) return;
    const int64_t row = at / p.channels;
    const int c = static_cast<int>(at % p.channels);
    const int acc = dot(a + row * p.hidden, weight + static_cast<int64_t>(c) * p.hidden, p.hidden);
    float y = __fmaf_rn(__int2float_rn(acc), p.fc2_factor[c], p.fc2_bias[c]);
    if (p.out_scale != nullptr) {
        y = __fmul_rn(static_cast<float>(quantize(y, p.out_inverse[c])), p.out_scale[c]);
    }
    x[at] = __float2half_rn(__fadd_rn(__half2float(x[at]), y));
}

// ---- a problem ----

struct Problem {
    Problem(int channels, int most_rows)
        : channels(channels),
          hidden(4 * channels),
          w1(codes(channels * hidden)),
          w2(codes(channels * hidden)),
          fc1(w1),
          fc2(w2),
          fc1_laid_out(laid_out(w1, mlp_layout_fc1)),
          fc2_laid_out(laid_out(w2, mlp_layout_fc2)),
          gamma(uniform(channels, 0.5f, 1.5f)),
          beta(uniform(channels, -0.5f, 0.5f)),
          in_inverse(inverses(channels, 30, 60)),
          fc1_factor(uniform(hidden, 0.5f / spread(channels), 1.5f / spread(channels))),
          fc1_bias(uniform(hidden, -0.5f, 0.5f)),
          hidden_inverse(inverses(hidden, 30, 90)),
          fc2_factor(uniform(channels, 0.5f / spread(hidden), 1.5f / spread(hidden))),
          fc2_bias(uniform(channels, -0.5f, 0.5f)),
          out_inverse(inverses(channels, 30, 60)),
          out_scale(uniform(channels, 1 / 60.0f, 1 / 30.0f)) {
        std::normal_distribution<float> draw(0.2f, 1.5f);
        start.resize(static_cast<size_t>(most_rows + kGuardRows) * channels);
        for (__half& value : start) value = __float2half(draw(generator));
    }

    static float spread(int k) { return std::sqrt(static_cast<float>(k)) * 40 * 73; }

    std::vector<int8_t> laid_out(const std::vector<int8_t>& weight,
                                 void (*layout)(const int8_t*, int, int, int8_t*)) const {
        std::vector<int8_t> out(weight.size());
        layout(weight.data(), channels, hidden, out.data());
        return out;
    }

    MlpArguments arguments(__half* x, int m, bool rounded) const {
        MlpArguments p = {};
        p.x = x;
        p.gamma = gamma.get(), p.beta = beta.get(), p.in_inverse = in_inverse.get();
        p.fc1_weight = fc1_laid_out.get(), p.fc2_weight = fc2_laid_out.get();
        p.fc1_factor = fc1_factor.get(), p.fc1_bias = fc1_bias.get();
        p.hidden_inverse = hidden_inverse.get();
        p.fc2_factor = fc2_factor.get(), p.fc2_bias = fc2_bias.get();
        p.out_inverse = rounded ? out_inverse.get() : nullptr;
        p.out_scale = rounded ? out_scale.get() : nullptr;
        p.eps = 1e-5f, p.m = m, p.channels = channels, p.hidden = hidden;
        return p;
    }

    int channels, hidden;
    std::vector<int8_t> w1, w2;
    Array<int8_t> fc1, fc2, fc1_laid_out, fc2_laid_out;
    Array<float> gamma, beta, in_inverse, fc1_factor, fc1_bias, hidden_inverse;
    Array<float> fc2_factor, fc2_bias, out_inverse, out_scale;
    std::vector<__half> start;  // x, with guard rows
};

unsigned blocks_for(int64_t threads) {
    return static_cast<unsigned>(ceil_div(threads, 256));
}

bool check_case(const Problem& problem, int m, bool rounded) {
    const int channels = problem.channels, hidden = problem.hidden;
    const size_t count = static_cast<size_t>(m) * channels;
    const std::vector<__half> start(problem.start.begin(),
                                    problem.start.begin() + count + kGuardRows * channels);
    Array<__half> x(start), wanted(start);
    Array<int8_t> a(count), h(count * 4), h_exact(count * 4);
    const MlpArguments p = problem.arguments(x.get(), m, rounded);
    layernorm_reference<<<blocks_for(m), 256>>>(wanted.get(), p, a.get());
    for (bool exact : {false, true}) {
        fc1_reference<<<blocks_for(static_cast<int64_t>(m) * hidden), 256>>>(
            a.get(), problem.fc1.get(), p, exact, (exact ? h_exact : h).get());
    }
    fc2_reference<<<blocks_for(count), 256>>>(h.get(), problem.fc2.get(), p, wanted.get());
    mlp(p, nullptr);
    check_cuda(cudaDeviceSynchronize(), "mlp");

    const std::vector<__half> got = x.read(), want = wanted.read();
    size_t different = 0, touched = 0, unchanged = 0;
    double largest = 0;
    for (size_t i = 0; i < got.size(); ++i) {
        const double difference = std::fabs(__half2float(got[i]) - __half2float(want[i]));
        const bool same = std::memcmp(&got[i], &want[i], sizeof(__half)) == 0;
        if (i >= count) {
            touched += !same;
        } else {
            different += !same;
            unchanged += std::memcmp(&got[i], &start[i], sizeof(__half)) == 0;
            largest = std::isfinite(difference) ? std::max(largest, difference) : INFINITY;
        }
    }
    const std::vector<int8_t> codes_kernel = h.read(), codes_exact = h_exact.read();
    size_t off = 0, off_by_more = 0;
    double bias = 0;
    for (size_t i = 0; i < codes_kernel.size(); ++i) {
        const int d = codes_kernel[i] - codes_exact[i];
        off += d != 0;
        off_by_more += d < -1 || d > 1;
        bias += d;
    }
    const double n = static_cast<double>(codes_kernel.size());
    const bool pass = different <= 1e-4 * static_cast<double>(count) && touched == 0 &&
                      unchanged < count / 2 + 8 && off <= 2e-3 * n && off_by_more == 0 &&
                      std::fabs(bias) <= 1e-3 * n + 2;
    std::printf(
        "C %3d m %6d %s: %zu of %zu differ, by %.3g at most; %zu behind the end; gelu codes off: "
        "%.4f %%, mean %+.1e  %s\n",
        channels, m, rounded ? "rounded  " : "unrounded", different, count, largest, touched,
        100 * static_cast<double>(off) / n, bias / n, pass ? "ok" : "FAILED");
    return pass;
}

// The same bits for a row alone and among others.
bool check_invariance(const Problem& problem, int m) {
    const size_t row_size = problem.channels;
    const std::vector<__half> all(problem.start.begin(), problem.start.begin() + m * row_size);
    Array<__half> x(all);
    mlp(problem.arguments(x.get(), m, true), nullptr);
    const std::vector<__half> together = x.read();
    bool same = true;
    for (int row : {0, 1, m / 2, m - 1}) {
        Array<__half> one(
            std::vector<__half>(all.begin() + row * row_size, all.begin() + (row + 1) * row_size));
        mlp(problem.arguments(one.get(), 1, true), nullptr);
        same &= std::memcmp(one.read().data(), together.data() + row * row_size, 2 * row_size) == 0;
    }
    std::printf("C %3d rows alone and among %d others: %s\n", problem.channels, m,
                same ? "same bits" : "FAILED");
    return same;
}

void time_case(const Problem& problem, int m, bool rounded) {
    constexpr int kRuns = 20;
    Array<__half> x(problem.start);
    const MlpArguments p = problem.arguments(x.get(), m, rounded);
    cudaEvent_t events[2];
    for (cudaEvent_t& event : events) check_cuda(cudaEventCreate(&event), "cudaEventCreate");
    auto microseconds = [&](int launches) {
        check_cuda(cudaEventRecord(events[0]), "cudaEventRecord");
        for (int i = 0; i < launches; ++i) mlp(p, nullptr);
        check_cuda(cudaEventRecord(events[1]), "cudaEventRecord");
        check_cuda(cudaEventSynchronize(events[1]), "cudaEventSynchronize");
        float milliseconds = 0;
        check_cuda(cudaEventElapsedTime(&milliseconds, events[0], events[1]), "elapsed time");
        return 1e3f * milliseconds / launches;
    };
    for (int i = 0; i < 5; ++i) microseconds(1);
    std::vector<float> single(kRuns), chained(kRuns);
    for (float& time : single) time = microseconds(1);
    for (float& time : chained) time = microseconds(kRuns);
    std::nth_element(single.begin(), single.begin() + kRuns / 2, single.end());
    std::nth_element(chained.begin(), chained.begin() + kRuns / 2, chained.end());
    const double operations = 16.0 * m * problem.channels * problem.channels;
    std::printf("C %3d m %6d %s: one launch %.1f us, each of %d in a row %.1f us (%.0f TOPS)\n",
                problem.channels, m, rounded ? "rounded  " : "unrounded", single[kRuns / 2], kRuns,
                chained[kRuns / 2], operations / chained[kRuns / 2] * 1e-6);
    for (cudaEvent_t event : events) cudaEventDestroy(event);
}

int run() {
    if (!mlp_supported(96, 384)) {
        std::printf("no fused MLP on compute capability %d\n", compute_capability());
        return 1;
    }
    constexpr int kMostRows = 100352;
    bool pass = true;
    for (int channels : {96, 128, 192}) {
        const Problem problem(channels, kMostRows);
        for (int m : {1, 49, 64, 127, 128, 1000, 20001, kMostRows}) {
            for (bool rounded : {false, true}) pass &= check_case(problem, m, rounded);
        }
        pass &= check_invariance(problem, 30000);
        for (bool rounded : {false, true}) {
            for (int m : {784, 3136, channels == 192 ? 25088 : kMostRows}) {
                time_case(problem, m, rounded);
            }
        }
    }
    std::printf("%s\n", pass ? "passed" : "FAILED");
    return pass ? 0 : 1;
}

}  // namespace
}  // namespace swinq

int main() {
    try {
        return swinq::run();
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}

#endif  // SWINQ_MLP_TEST

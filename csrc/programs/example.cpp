// A model's plan, checked and timed: see example.h.
#include "example.h"

#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <utility>

#include "timing.h"

namespace swinq::programs {

namespace {

#ifndef SWINQ_RUNS  // fewer where a test runs the program on loops over host memory
#define SWINQ_RUNS 100
#endif
constexpr int kRuns = SWINQ_RUNS, kWarmUps = kRuns / 5;
constexpr int kDevice = 0;
constexpr int kComparedImages = 2;  // with another precision: the first ones
// Of the deviation of the logits. On the CPU, codes cost these weights 0.01 to 0.02, and 0.05 on
// images of 32 pixels, where the mean over the tokens hides less; fp16 costs 0.001.
constexpr double kInt8Error = 0.1, kHalfError = 0.01;
// Of a checkpoint's codes, against the same file in fp32. On the CPU, trained tiny models of both
// versions were 0.01 to 0.03 off on these images, one of 32 pixels up to 0.14: noise is not what
// ranges were found on. So it finds layers that saturate (one fc1 whose input scale was a quarter
// of what it should be: 0.36; all of them: 1.3), not a small error, one branch left out (fc2: 0.24)
// or what noise hides (all position tables 0: 0.01), for which made-up weights are, nor weights
// that are wrong in the file.
constexpr double kCheckpointError = 0.3;

constexpr const char* kTestKernels =
    "build with -DSWINQ_TESTS=ON and run kernel_test, which finds the kernel";
constexpr const char* kJudgeFile =
    "run it on made-up weights: where they pass, calibrate and export the file again";

struct PlanDelete {
    void operator()(swinq_plan* plan) const { swinq_plan_destroy(plan); }
};
using Plan = std::unique_ptr<swinq_plan, PlanDelete>;

Plan made_up_plan(const Example& example, Numbers numbers) {
    const MadeUpModel model(
        architecture_of(example.version, example.size, example.window, example.img_size), numbers);
    const swinq_model view = model.model();
    swinq_plan* plan = nullptr;
    check(swinq_plan_create(&view, kDevice, &plan));
    return Plan(plan);
}

bool is_int8(Numbers numbers) {
    return numbers == Numbers::kInt8Mode1 || numbers == Numbers::kInt8Mode2;
}

// A file of other numbers than asked for would be timed under a wrong name.
void require_numbers(const Example& example, const swinq_plan* plan) {
    int layers = 0;
    check(swinq_int8_layer_count(plan, &layers));
    auto refuse = [&example](const std::string& problem, const char* fix) {
        throw std::runtime_error(example.checkpoint + ": " + problem + ", wanted " +
                                 name_of(example.numbers) + "\n  fix: " + fix);
    };
    if (layers > 0 && !is_int8(example.numbers)) {
        refuse(std::to_string(layers) + " of its layers are INT8", "run swin_int8_example on it");
    }
    if (layers == 0 && is_int8(example.numbers)) {
        refuse("all of its layers are FP16", "run swin_example on it, with data_type 1");
    }
    if (example.numbers == Numbers::kFloat) {
        refuse("all of its layers are FP16", "give data_type 1");
    }
}

Plan plan_from_file(const Example& example) {
    const int mode = example.numbers == Numbers::kInt8Mode1   ? 1
                     : example.numbers == Numbers::kInt8Mode2 ? 2
                                                              : 0;
    swinq_plan* created = nullptr;
    check(swinq_plan_create_from_file(example.checkpoint.c_str(), mode, kDevice, &created));
    Plan plan(created);
    swinq_architecture found = {};
    check(swinq_plan_architecture(plan.get(), &found));
    const swinq_architecture asked =
        architecture_of(example.version, example.size, example.window, example.img_size);
    auto require = [&example](const char* what, int in_file, int wanted) {
        if (in_file == wanted) return;
        throw std::runtime_error(example.checkpoint + ": " + what + " is " +
                                 std::to_string(in_file) + ", wanted " + std::to_string(wanted) +
                                 "\n  fix: give the arguments of the model in the file");
    };
    require("version", found.version, asked.version);
    require("img_size", found.img_size, asked.img_size);
    require("window_size", found.window_size, asked.window_size);
    require("in_chans", found.in_chans, asked.in_chans);
    require("patch_size", found.patch_size, asked.patch_size);
    require("embed_dim", found.embed_dim, asked.embed_dim);
    require("stages", found.stages, asked.stages);
    for (int i = 0; i < asked.stages; ++i) {
        const std::string stage = " of stage " + std::to_string(i);
        require(("depth" + stage).c_str(), found.depths[i], asked.depths[i]);
        require(("num_heads" + stage).c_str(), found.num_heads[i], asked.num_heads[i]);
    }
    require_numbers(example, plan.get());
    return plan;
}

// The same function in another precision, which other kernels compute.
Plan other_plan(const Example& example, Numbers other) {
    if (example.checkpoint.empty()) return made_up_plan(example, other);
    swinq_plan* plan = nullptr;
    check(swinq_plan_create_dequantized(example.checkpoint.c_str(), kDevice, &plan));
    return Plan(plan);
}

swinq_architecture architecture_in(const Plan& plan) {
    swinq_architecture architecture = {};
    check(swinq_plan_architecture(plan.get(), &architecture));
    return architecture;
}

size_t workspace_for(const Plan& plan, int images) {
    size_t bytes = 0;
    check(swinq_workspace_size(plan.get(), images, &bytes));
    return bytes;
}

// Bytes of GPU memory that a Session of so many images takes.
size_t session_bytes(const Plan& plan, int images, bool in_fp32) {
    const swinq_architecture a = architecture_in(plan);
    const size_t pixels = static_cast<size_t>(a.in_chans) * a.img_size * a.img_size;
    const size_t width = in_fp32 ? sizeof(float) : sizeof(__half);
    return workspace_for(plan, images) +
           images * (pixels * width + static_cast<size_t>(a.num_classes) * sizeof(float));
}

// A plan with its images on the device, `count` of them, and room for their logits.
class Session {
  public:
    Session(Plan plan, const std::vector<float>& images, int count, bool in_fp32)
        : plan_(std::move(plan)),
          type_(in_fp32 ? SWINQ_FLOAT : SWINQ_HALF),
          images_(on_device(images, in_fp32)),
          logits_(sizeof(float) * classes() * count),
          workspace_bytes_(workspace_for(plan_, count)),
          workspace_(workspace_bytes_) {
        check(swinq_prepare(plan_.get(), count));
    }

    int classes() const { return architecture_in(plan_).num_classes; }

    void enqueue(int batch, cudaStream_t stream) const {
        check(swinq_forward(plan_.get(), images_.get(), type_, batch, logits_.as<float>(),
                            workspace_.get(), workspace_bytes_, stream));
    }

    // Logits of a run that `launch` starts; what was there before is spoilt.
    template <typename Launch>
    std::vector<float> logits(int batch, const Stream& stream, Launch launch) const {
        std::vector<float> values(static_cast<size_t>(classes()) * batch);
        const size_t bytes = values.size() * sizeof(float);
        check(cudaMemsetAsync(logits_.get(), 0xff, bytes, stream.get()), "cudaMemset");
        launch(stream.get());
        check(cudaMemcpyAsync(values.data(), logits_.get(), bytes, cudaMemcpyDeviceToHost,
                              stream.get()),
              "copy of the logits");
        stream.synchronize();
        return values;
    }

    const swinq_plan* plan() const { return plan_.get(); }

  private:
    static std::vector<__half> halves(const std::vector<float>& values) {
        std::vector<__half> result(values.size());
        for (size_t i = 0; i < values.size(); ++i) result[i] = __float2half_rn(values[i]);
        return result;
    }
    static std::vector<uint8_t> on_device(const std::vector<float>& images, bool in_fp32) {
        std::vector<uint8_t> bytes(images.size() * (in_fp32 ? sizeof(float) : sizeof(__half)));
        if (in_fp32) {
            std::memcpy(bytes.data(), images.data(), bytes.size());
        } else {
            std::memcpy(bytes.data(), halves(images).data(), bytes.size());
        }
        return bytes;
    }
    Plan plan_;
    swinq_type type_;
    DeviceMemory images_, logits_;  // (count, 3, S, S), (count, classes) fp32
    size_t workspace_bytes_;
    DeviceMemory workspace_;
};

void require_equal(const std::vector<float>& a, const std::vector<float>& b, const char* what) {
    for (size_t i = 0; i < a.size(); ++i) {
        if (std::memcmp(&a[i], &b[i], sizeof(float)) == 0) continue;
        throw std::runtime_error("logit " + std::to_string(i) + " is " + std::to_string(b[i]) +
                                 " " + what + ", wanted the same bits as before, " +
                                 std::to_string(a[i]) + "\n  fix: " + kTestKernels);
    }
}

// Root mean square of the difference, as a share of the deviation of `wanted`.
double relative_error(const std::vector<float>& found, const std::vector<float>& wanted) {
    double sum = 0, squares = 0, errors = 0;
    const double count = static_cast<double>(wanted.size());
    for (size_t i = 0; i < wanted.size(); ++i) {
        sum += wanted[i], squares += static_cast<double>(wanted[i]) * wanted[i];
        errors += std::pow(static_cast<double>(found[i]) - wanted[i], 2);
    }
    return std::sqrt(errors / (squares - sum * sum / count));
}

void check_output(const Session& session, int batch, const Stream& stream, const Graph& graph) {
    auto run = [&](int images) {
        return session.logits(images, stream, [&](cudaStream_t s) { session.enqueue(images, s); });
    };
    const std::vector<float> logits = run(batch);
    for (size_t i = 0; i < logits.size(); ++i) {
        if (std::isfinite(logits[i])) continue;
        throw std::runtime_error("logit " + std::to_string(i) +
                                 " is no number\n  fix: " + kTestKernels);
    }
    require_equal(logits, run(batch), "in a second run");
    require_equal(logits, session.logits(batch, stream, [&](cudaStream_t s) { graph.launch(s); }),
                  "from a CUDA graph");
    std::vector<float> more = run(batch + 1);
    require_equal(logits, std::vector<float>(more.begin(), more.begin() + logits.size()),
                  "in a larger batch");
    const int classes = session.classes();
    require_equal(std::vector<float>(logits.begin(), logits.begin() + classes),
                  std::vector<float>(more.end() - classes, more.end()),
                  "of the same image at the end of the batch");
    std::printf(
        "checked: finite; same bits again, from a CUDA graph, in a larger batch, elsewhere "
        "in it\n");
}

// With the same function in another precision.
void compare_precisions(const Example& example, const Session& session,
                        const std::vector<float>& images, const Stream& stream) {
    const Numbers other = example.numbers == Numbers::kFloat ? Numbers::kHalf : Numbers::kFloat;
    const bool made_up = example.checkpoint.empty(), in_fp32 = other == Numbers::kFloat;
    const double allowed = !is_int8(example.numbers) ? kHalfError
                           : made_up                 ? kInt8Error
                                                     : kCheckpointError;
    const int compared = std::min(example.batch, kComparedImages);
    const size_t pixels = 3ull * example.img_size * example.img_size;
    Plan plan = other_plan(example, other);
    require_memory("the comparison with " + std::string(name_of(other)),
                   session_bytes(plan, compared, in_fp32));
    const Session wanted(std::move(plan), {images.begin(), images.begin() + compared * pixels},
                         compared, in_fp32);
    auto logits = [&](const Session& s) {
        return s.logits(compared, stream, [&](cudaStream_t t) { s.enqueue(compared, t); });
    };
    const double error = relative_error(logits(session), logits(wanted));
    if (!(error <= allowed)) {
        throw std::runtime_error(
            std::string("the logits of ") + name_of(example.numbers) + " and " + name_of(other) +
            " are " + std::to_string(error) + " of their deviation apart, wanted at most " +
            std::to_string(allowed) + "\n  fix: " + (made_up ? kTestKernels : kJudgeFile));
    }
    std::printf("checked: %.4f of their deviation away from the %s logits, %.2f allowed\n", error,
                name_of(other), allowed);
}

}  // namespace

int run_example(const Example& example) {
    check(swinq_check_device(kDevice));
    check(cudaSetDevice(kDevice), "cudaSetDevice");
    cudaDeviceProp device = {};
    check(cudaGetDeviceProperties(&device, kDevice), "cudaGetDeviceProperties");
    const int batch = example.batch, side = example.img_size;
    const bool made_up = example.checkpoint.empty(), in_fp32 = example.numbers == Numbers::kFloat;

    Plan plan = made_up ? made_up_plan(example, example.numbers) : plan_from_file(example);
    require_memory("a batch of " + std::to_string(batch) + ", with one image to check it by,",
                   session_bytes(plan, batch + 1, in_fp32));
    const int64_t pixels = 3ll * side * side;
    std::vector<float> images = made_up_images(pixels * (batch + 1));
    std::copy(images.begin(), images.begin() + pixels, images.end() - pixels);
    // the last image is the first again
    const Session session(std::move(plan), images, batch + 1, in_fp32);
    int launches = 0;
    size_t weight_bytes = 0;
    check(swinq_launch_count(session.plan(), batch, &launches));
    check(swinq_weight_bytes(session.plan(), &weight_bytes));
    std::printf(
        "Swin v%d %s, window %d, image %d, batch %d, %s, %s on %s: %d kernels, %.1f MB of "
        "weights\n",
        example.version, name_of(example.size), example.window, side, batch,
        name_of(example.numbers), made_up ? "made-up weights" : example.checkpoint.c_str(),
        device.name, launches, static_cast<double>(weight_bytes) / 1e6);

    const Stream stream;
    auto forward = [&](cudaStream_t s) { session.enqueue(batch, s); };
    const Graph graph(stream, forward);
    check_output(session, batch, stream, graph);
    compare_precisions(example, session, images, stream);

    const float with_graph =
        median_ms(stream, kWarmUps, kRuns, [&](cudaStream_t s) { graph.launch(s); });
    const float without_graph = median_ms(stream, kWarmUps, kRuns, forward);
    std::printf("SWINQ-CPP-time %.4f ms\n", with_graph);
    std::printf(
        "[INFO] batch_size %d img_size %d window_size %d, median of %d: SWINQ-CPP-time %.2f "
        "ms with a CUDA graph, %.2f ms without, %.0f images/s\n",
        batch, side, example.window, kRuns, with_graph, without_graph, 1000.0 * batch / with_graph);
    return 0;
}

}  // namespace swinq::programs

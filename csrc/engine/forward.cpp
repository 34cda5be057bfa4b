// A forward: the workspace is cut into buffers and the plan's steps are enqueued.
#include <algorithm>

#include "engine/device.h"
#include "engine/error.h"
#include "engine/plan.h"

namespace swinq {
namespace {

constexpr int64_t kAlignment = 256;
constexpr int64_t kMostTokens = 1 << 30;  // kernels count rows and what is added to them in ints

int64_t buffer_bytes(const Plan& plan, Buffer buffer, int batch) {
    const int64_t bytes = plan.image_bytes[static_cast<size_t>(buffer)] * batch;
    return ceil_div(bytes, kAlignment) * kAlignment;
}

// Sets what a step's arguments leave open and calls its kernel.
class Enqueuer {
  public:
    Enqueuer(const Plan& plan, const Forward& forward) : plan_(plan), forward_(forward) {
        auto* at = static_cast<uint8_t*>(forward.workspace);
        for (size_t i = 0; i < buffers_.size(); ++i) {
            buffers_[i] = at;
            at += buffer_bytes(plan, static_cast<Buffer>(i), forward.batch);
        }
        if (plan.image_bytes[static_cast<size_t>(Buffer::kLogits)] == 0) {
            buffers_[static_cast<size_t>(Buffer::kLogits)] = forward.logits;
        }
    }

    void operator()(const PatchEmbedStep& step) const {
        PatchEmbedArguments a = step.arguments;
        a.image_type = forward_.image_type;
        a.images = forward_.images;
        a.x = at(Buffer::kStream);
        a.operand = a.inverse ? static_cast<int8_t*>(at(Buffer::kOperand)) : nullptr;
        a.status = status();
        a.batch = forward_.batch;
        patch_embed(a, forward_.stream);
    }

    void operator()(const PrenormStep& step) const {
        PrenormArguments a = step.arguments;
        a.x = at(Buffer::kStream);
        a.out = at(step.out);
        // a non-finite number stays in the stream but for merges, where codes may hide it
        a.status = a.merge ? status() : nullptr;
        a.batch = forward_.batch;
        prenorm(a, forward_.stream);
    }

    void operator()(const PostnormStep& step) const {
        PostnormArguments a = step.arguments;
        a.y = at(step.y);
        a.x = at(Buffer::kStream);
        a.operand = a.inverse ? static_cast<int8_t*>(at(Buffer::kOperand)) : nullptr;
        a.rows = step.rows * forward_.batch;
        postnorm(a, forward_.stream);
    }

    void operator()(const GemmStep& step) const {
        GemmArguments a = step.arguments;
        a.a = at(step.a);
        a.out = at(step.out);
        a.m = step.rows * forward_.batch;
        a.norm_operand = a.norm_inverse ? static_cast<int8_t*>(at(Buffer::kOperand)) : nullptr;
        const auto tile = plan_.tiles.find(tile_key(a));
        gemm(a, tile == plan_.tiles.end() ? nullptr : &tile->second, forward_.stream);
    }

    void operator()(const AttentionStep& step) const {
        AttentionArguments a = step.arguments;
        a.qkv = at(Buffer::kWide);
        a.out = at(Buffer::kNarrow);
        a.status = status();
        a.batch = forward_.batch;
        attention(a, forward_.stream);
    }

    void operator()(const MlpStep& step) const {
        MlpArguments a = step.arguments;
        a.x = at(Buffer::kStream);
        a.operand = a.in_inverse ? nullptr : static_cast<int8_t*>(at(Buffer::kOperand));
        a.m = step.rows * forward_.batch;
        mlp(a, forward_.stream);
    }

    void operator()(const PoolStep& step) const {
        PoolArguments a = step.arguments;
        a.x = at(Buffer::kStream);
        a.pooled = at(Buffer::kPooled);
        a.status = status();
        a.batch = forward_.batch;
        pool(a, forward_.stream);
    }

    // Copies the logits out of their padded rows, if they lie in such.
    void copy_logits() const {
        const auto padded = static_cast<size_t>(plan_.image_bytes[size_t(Buffer::kLogits)]);
        if (padded == 0 || launching() == Launching::kLoad) {
            return;
        }
        const size_t row = static_cast<size_t>(plan_.architecture.num_classes) * sizeof(float);
        check_cuda(cudaMemcpy2DAsync(forward_.logits, row, at(Buffer::kLogits), padded, row,
                                     static_cast<size_t>(forward_.batch), cudaMemcpyDeviceToDevice,
                                     forward_.stream),
                   "cudaMemcpy2DAsync");
    }

  private:
    void* at(Buffer buffer) const { return buffers_[static_cast<size_t>(buffer)]; }
    int* status() const { return static_cast<int*>(at(Buffer::kStatus)); }

    const Plan& plan_;
    const Forward& forward_;
    std::array<void*, static_cast<size_t>(Buffer::kCount)> buffers_;
};

}  // namespace

int64_t workspace_bytes(const Plan& plan, int batch) {
    const int side = plan.architecture.img_size / plan.architecture.patch_size;
    const int64_t tokens = static_cast<int64_t>(side) * side;
    if (tokens * batch > kMostTokens) {
        refuse(text("batch is ", batch, ", which makes ", tokens * batch,
                    " tokens; kernels count up to ", kMostTokens),
               text("use a batch of at most ", kMostTokens / tokens));
    }
    int64_t bytes = 0;
    for (size_t i = 0; i < plan.image_bytes.size(); ++i) {
        bytes += buffer_bytes(plan, static_cast<Buffer>(i), batch);
    }
    return bytes;
}

void enqueue(const Plan& plan, const Forward& forward) {
    DeviceGuard guard(plan.device);
    const Enqueuer enqueuer(plan, forward);
    for (const Step& step : plan.steps) {
        if (step.runs(forward.batch)) {
            std::visit(enqueuer, step.kernel);
        }
    }
    enqueuer.copy_logits();
}

void prepare(const Plan& plan, int batch) {
    const LaunchingScope loading(Launching::kLoad);
    void* unread = plan.weights.get();  // only its alignment matters
    for (Type images : {Type::kHalf, Type::kFloat}) {
        enqueue(plan, {unread, images, batch, static_cast<float*>(unread), unread, nullptr});
    }
}

int launch_count(const Plan& plan, int batch) {
    constexpr int kPatchEmbedLaunches = 2;  // the status is cleared before it is set
    const auto steps = std::count_if(plan.steps.begin(), plan.steps.end(),
                                     [&](const Step& step) { return step.runs(batch); });
    return static_cast<int>(steps) - 1 + kPatchEmbedLaunches;
}

}  // namespace swinq

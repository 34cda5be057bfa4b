// A plan: a model's weights on the device in one allocation, and the steps of a forward in order.
// It is read-only after it is made.
#pragma once

#include <array>
#include <memory>
#include <variant>
#include <vector>

#include "engine/arena.h"
#include "engine/model.h"
#include "engine/tile_cache.h"
#include "kernels/attention.h"
#include "kernels/gemm.h"
#include "kernels/layernorm.h"
#include "kernels/mlp.h"
#include "kernels/patch_embed.h"

namespace swinq {

// What steps read and write in the workspace, each as large as its image_bytes times the batch.
enum class Buffer : int {
    kStatus,   // int32 an image: see PrenormArguments
    kStream,   // the residual stream x
    kOperand,  // x, or its norm, as the next GEMM reads it
    kWide,     // q, k and v; the hidden channels of an MLP; the four neighbours of a merge
    kNarrow,   // what attention gives; v2: what fc2 and a reduction give, and in kWide what proj
               // gives
    kPooled,
    kLogits,  // where rows of the head are longer than its classes
    kCount
};

// A step holds a kernel's arguments but for the batch and whatever lies in buffers, which are set
// when it is enqueued. `rows`: of an image.
struct PatchEmbedStep {
    PatchEmbedArguments arguments;  // images to kStream and, where there is an inverse, kOperand
};
struct PrenormStep {
    PrenormArguments arguments;  // kStream to `out`
    Buffer out;
};
struct PostnormStep {
    PostnormArguments arguments;  // `y` to kStream and, where there is an inverse, kOperand
    Buffer y;
    int rows;
};
struct GemmStep {
    GemmArguments arguments;  // and, with a norm, kOperand
    Buffer a, out;
    int rows;
};
struct AttentionStep {
    AttentionArguments arguments;  // kWide to kNarrow
};
struct MlpStep {
    MlpArguments arguments;  // kStream, in v2 and kOperand, in place
    int rows;
};
struct PoolStep {
    PoolArguments arguments;  // kStream to kPooled
};
using Kernel = std::variant<PatchEmbedStep, PrenormStep, PostnormStep, GemmStep, AttentionStep,
                            MlpStep, PoolStep>;

// Some steps have others in their place, with the same results, where a batch is small.
struct Step {
    Kernel kernel;
    int least_batch, most_batch;

    bool runs(int batch) const { return least_batch <= batch && batch <= most_batch; }
};

struct DeviceFree {
    int device;
    void operator()(void* memory) const;
};

struct Plan {
    swinq_architecture architecture;
    int device;
    std::vector<Step> steps;
    std::array<int64_t, static_cast<size_t>(Buffer::kCount)> image_bytes;
    std::unique_ptr<void, DeviceFree> weights;
    int64_t weight_bytes;
    Tiles tiles;  // measured choices; other GEMMs take the default
};

// Checks everything, then lays out the weights and copies them to the device.
std::unique_ptr<Plan> make_plan(const swinq_model& model, const swinq_plan_options& options,
                                int device);

// Fills in what the plan does, its weights laid out in the arena (steps.cpp).
void build_steps(const Model& model, const swinq_plan_options& options, Arena& arena, Plan& plan);

// Bytes that a forward wants; throws where a batch has more tokens than kernels can count.
int64_t workspace_bytes(const Plan& plan, int batch);

struct Forward {
    const void* images;
    Type image_type;
    int batch;
    float* logits;
    void* workspace;  // workspace_bytes() of it
    cudaStream_t stream;
};

void enqueue(const Plan& plan, const Forward& forward);

// Loads the code of all kernels that a forward of so many images launches.
void prepare(const Plan& plan, int batch);

// Kernels that a forward of so many images enqueues.
int launch_count(const Plan& plan, int batch);

}  // namespace swinq

// The C ABI of plans, forwards and the tile cache. Each function checks what it is given, calls the
// engine and turns what is thrown into a code and a text.
#include "include/swinq.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "engine/c_arguments.h"
#include "engine/checkpoint.h"
#include "engine/dequantized.h"
#include "engine/device.h"
#include "engine/error.h"
#include "engine/plan.h"

struct swinq_plan {
    std::unique_ptr<swinq::Plan> plan;
    int int8_layers;
};

namespace {

using namespace swinq;

constexpr swinq_plan_options kDefaults = {/*fuse_mlp=*/1, /*fuse_norm=*/1, /*use_tile_cache=*/1};

swinq_plan* plan_of(const swinq_model& model, const swinq_plan_options& options, int device) {
    std::unique_ptr<Plan> plan = make_plan(model, options, device);  // which checks the model
    const auto int8_layers = std::count_if(
        model.layers, model.layers + model.layer_count,
        [](const swinq_layer& layer) { return element_type(layer.precision) == SWINQ_INT8; });
    return new swinq_plan{std::move(plan), static_cast<int>(int8_layers)};
}

const Plan& plan_in(const swinq_plan* plan) {
    require_pointer("plan", plan);
    return *plan->plan;
}

void require_batch(int batch) {
    if (batch < 0) {
        refuse(text("batch is ", batch), "give the number of images, 0 or more");
    }
}

swinq_gemm_arguments in_c(const GemmArguments& g) {
    swinq_gemm_arguments c = {};
    c.operand = static_cast<int32_t>(g.operand);
    c.stream = static_cast<int32_t>(g.stream);
    c.activation = static_cast<int32_t>(g.activation);
    c.output = static_cast<int32_t>(g.output);
    c.w = g.w;
    c.factor = g.factor;
    c.bias = g.bias;
    c.out_inverse = g.out_inverse;
    c.out_scale = g.out_scale;
    c.m = g.m;
    c.n = g.n;
    c.k = g.k;
    return c;
}

Tiles tiles_of(const swinq_tuned_gemm* gemms, size_t count) {
    Tiles tiles;
    for (size_t i = 0; i < count; ++i) {
        const swinq_tuned_gemm& g = gemms[i];
        GemmArguments arguments = {};
        arguments.operand = enum_of("operand", g.operand, Type::kFloat);
        arguments.activation = enum_of("activation", g.activation, Activation::kNormalize);
        arguments.output = enum_of("output", g.output, Output::kStream);
        arguments.m = g.m;
        arguments.n = g.n;
        arguments.k = g.k;
        for (int size : {g.m, g.n, g.k}) {
            require_range("a size of a GEMM", size, 1, 1 << 30);
        }
        const GemmTile tile = {g.tile[0], g.tile[1], g.tile[2]};
        if (!exists(tile, arguments)) {
            refuse(text("tile ", tile.instruction, ": ", tile.rows, " x ", tile.columns,
                        " does not exist for this GEMM on this device"),
                   "take one that swinq_gemm_tiles gives");
        }
        tiles[tile_key(arguments)] = tile;
    }
    return tiles;
}

}  // namespace

int swinq_abi_version(void) {
    return SWINQ_ABI_VERSION;
}

const char* swinq_version(void) {
    return SWINQ_VERSION;
}

const char* swinq_last_error(void) {
    return last_error();
}

swinq_status swinq_check_device(int device) {
    return guarded([&] { require_device(device); });
}

swinq_status swinq_check_architecture(const swinq_architecture* architecture) {
    return guarded([&] {
        require_pointer("architecture", architecture);
        validate(*architecture);
    });
}

swinq_status swinq_plan_create(const swinq_model* model, int device, swinq_plan** plan) {
    return swinq_plan_create_with_options(model, &kDefaults, device, plan);
}

swinq_status swinq_plan_create_with_options(const swinq_model* model,
                                            const swinq_plan_options* options, int device,
                                            swinq_plan** plan) {
    return guarded([&] {
        require_pointer("plan", plan);
        *plan = nullptr;
        require_pointer("model", model);
        require_pointer("options", options);
        *plan = plan_of(*model, *options, device);
    });
}

swinq_status swinq_plan_create_from_file(const char* path, int int8_mode, int device,
                                         swinq_plan** plan) {
    return guarded([&] {
        require_pointer("plan", plan);
        *plan = nullptr;
        require_pointer("path", path);
        require_range("int8_mode", int8_mode, 0, 2);
        const Checkpoint checkpoint(path, int8_mode);
        *plan = plan_of(checkpoint.model(), kDefaults, device);
    });
}

swinq_status swinq_plan_create_dequantized(const char* path, int device, swinq_plan** plan) {
    return guarded([&] {
        require_pointer("plan", plan);
        *plan = nullptr;
        require_pointer("path", path);
        const Checkpoint checkpoint(path, 0);
        const Dequantized dequantized{Model(checkpoint.model())};
        *plan = plan_of(dequantized.model(), kDefaults, device);
    });
}

void swinq_plan_destroy(swinq_plan* plan) {
    delete plan;
}

swinq_status swinq_plan_architecture(const swinq_plan* plan, swinq_architecture* architecture) {
    return guarded([&] {
        require_pointer("architecture", architecture);
        *architecture = plan_in(plan).architecture;
    });
}

swinq_status swinq_workspace_size(const swinq_plan* plan, int batch, size_t* bytes) {
    return guarded([&] {
        require_pointer("bytes", bytes);
        require_batch(batch);
        *bytes = static_cast<size_t>(workspace_bytes(plan_in(plan), batch));
    });
}

swinq_status swinq_prepare(const swinq_plan* plan, int batch) {
    return guarded([&] {
        const Plan& checked = plan_in(plan);
        require_batch(batch);
        workspace_bytes(checked, batch);  // refuses a batch whose rows cannot be counted
        if (batch > 0) {
            prepare(checked, batch);
        }
    });
}

swinq_status swinq_weight_bytes(const swinq_plan* plan, size_t* bytes) {
    return guarded([&] {
        require_pointer("bytes", bytes);
        *bytes = static_cast<size_t>(plan_in(plan).weight_bytes);
    });
}

swinq_status swinq_launch_count(const swinq_plan* plan, int batch, int* launches) {
    return guarded([&] {
        require_pointer("launches", launches);
        const Plan& checked = plan_in(plan);
        require_batch(batch);
        *launches = batch == 0 ? 0 : launch_count(checked, batch);
    });
}

swinq_status swinq_int8_layer_count(const swinq_plan* plan, int* layers) {
    return guarded([&] {
        require_pointer("layers", layers);
        plan_in(plan);
        *layers = plan->int8_layers;
    });
}

swinq_status swinq_forward(const swinq_plan* plan, const void* images, swinq_type image_type,
                           int batch, float* logits, void* workspace, size_t workspace_bytes,
                           void* stream) {
    return guarded([&] {
        const Plan& checked = plan_in(plan);
        require_batch(batch);
        if (image_type != SWINQ_HALF && image_type != SWINQ_FLOAT) {
            refuse(text("image_type is ", static_cast<int>(image_type)),
                   "pass images as SWINQ_HALF or SWINQ_FLOAT");
        }
        if (batch == 0) {
            return;
        }
        const auto needed = static_cast<size_t>(swinq::workspace_bytes(checked, batch));
        require_pointer("images", images, 16);
        require_pointer("logits", logits, 16);
        require_pointer("workspace", workspace, 256);
        DeviceGuard guard(checked.device);  // to ask of another would make a context there
        require_memory("images", images, checked.device);
        require_memory("logits", logits, checked.device);
        require_memory("workspace", workspace, checked.device);
        if (workspace_bytes < needed) {
            refuse(text("the workspace has ", workspace_bytes, " bytes, a batch of ", batch,
                        " wants ", needed),
                   "allocate what swinq_workspace_size says");
        }
        enqueue(checked, {images, static_cast<Type>(image_type), batch, logits, workspace,
                          static_cast<cudaStream_t>(stream)});
    });
}

swinq_status swinq_plan_gemms(const swinq_plan* plan, int batch, swinq_gemm_arguments* gemms,
                              int* count) {
    return guarded([&] {
        require_pointer("count", count);
        require_batch(batch);
        workspace_bytes(plan_in(plan), batch);  // refuses a batch whose rows cannot be counted
        const int capacity = gemms == nullptr ? 0 : *count;
        *count = 0;
        for (const Step& step : plan_in(plan).steps) {
            const auto* gemm = std::get_if<GemmStep>(&step.kernel);
            if (gemm == nullptr || gemm->arguments.has_norm || !step.runs(batch)) {
                continue;
            }
            if (*count < capacity) {
                gemms[*count] = in_c(gemm->arguments);
                gemms[*count].m = gemm->rows * batch;
            }
            ++*count;
        }
    });
}

swinq_status swinq_tile_cache_path(int device, char* path, size_t capacity) {
    return guarded([&] {
        require_pointer("path", path);
        require_device(device);
        const std::string found = tile_cache_path(device_name(device));
        if (found.size() >= capacity) {
            refuse(text("capacity is ", capacity, ", the path has ", found.size(), " characters"),
                   "give room for one more than those");
        }
        std::memcpy(path, found.c_str(), found.size() + 1);
    });
}

swinq_status swinq_tile_cache_add(int device, const swinq_tuned_gemm* gemms, size_t count) {
    return guarded([&] {
        require_pointer("gemms", gemms);
        require_device(device);
        DeviceGuard guard(device);
        const std::string gpu = device_name(device);
        add_tiles(tile_cache_path(gpu), gpu, tiles_of(gemms, count));
    });
}

// How a plan is made: see plan.h.
#include "engine/plan.h"

#include "engine/device.h"
#include "engine/error.h"

namespace swinq {
namespace {

// The cached tiles that belong to the plan's GEMMs and that exist for them on this device.
Tiles usable_tiles(const Plan& plan, const Tiles& cached) {
    Tiles usable;
    for (const Step& step : plan.steps) {
        const auto* gemm = std::get_if<GemmStep>(&step.kernel);
        if (gemm == nullptr || gemm->arguments.has_norm) {
            continue;
        }
        for (const auto& [key, tile] : cached) {
            GemmArguments arguments = gemm->arguments;
            arguments.m = key.m;
            if (key == tile_key(arguments) && key.m % gemm->rows == 0 && exists(tile, arguments)) {
                usable[key] = tile;
            }
        }
    }
    return usable;
}

}  // namespace

void DeviceFree::operator()(void* memory) const {
    try {
        DeviceGuard guard(device);
        cudaFree(memory);
    } catch (const Error&) {
        // the process is ending and the driver has gone, its memory with it
    }
}

std::unique_ptr<Plan> make_plan(const swinq_model& source, const swinq_plan_options& options,
                                int device) {
    const Model model(source);
    require_device(device);
    DeviceGuard guard(device);
    auto plan = std::make_unique<Plan>();
    plan->architecture = model.architecture();
    plan->device = device;

    Arena measured;
    build_steps(model, options, measured, *plan);
    plan->weight_bytes = measured.size();
    const auto bytes = static_cast<size_t>(measured.size());
    void* memory = nullptr;
    check_cuda(cudaMalloc(&memory, bytes), text("allocating ", bytes, " bytes of weights").c_str());
    plan->weights = std::unique_ptr<void, DeviceFree>(memory, DeviceFree{device});
    std::vector<uint8_t> host(bytes);
    Arena arena(host.data(), memory);
    build_steps(model, options, arena, *plan);
    check_cuda(cudaMemcpy(memory, host.data(), bytes, cudaMemcpyHostToDevice),
               "copying the weights");
    // the copy may return before its last bytes are there, and other streams would not wait for it
    check_cuda(cudaStreamSynchronize(nullptr), "copying the weights");
    if (options.use_tile_cache != 0) {
        plan->tiles = usable_tiles(
            *plan, read_tiles(tile_cache_path(device_name(device)), device_name(device)));
    }
    return plan;
}

}  // namespace swinq

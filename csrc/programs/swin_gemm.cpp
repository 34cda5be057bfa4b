// swin_gemm: finds the fastest tile for every GEMM of a model on this GPU and keeps them in the
// tile cache, which plans read.
#include <algorithm>
#include <deque>
#include <map>
#include <tuple>

#include "command_line.h"
#include "made_up_model.h"
#include "timing.h"

namespace swinq::programs {
namespace {

constexpr char kUsage[] =
    "usage: swin_gemm <batch> <img> <window> <heads> <size_per_head> <dtype> <is_int8>\n"
    "  batch          number of images; a choice holds for this number alone\n"
    "  img            side of an image in pixels\n"
    "  window         side of a window in tokens\n"
    "  heads          of the first stage: 3 (tiny, small), 4 (base), 6 (large)\n"
    "  size_per_head  channels of a head, 32 in the official models\n"
    "  dtype          0 FP32, 1 FP16; of the layers, unless they are INT8\n"
    "  is_int8        1: INT8, both modes\n"
    "Tunes what both versions need, whose tiles lie in one file for each kind of GPU.\n";

constexpr int kDevice = 0;
constexpr int kTiles = 64;     // more than there are
constexpr int kLaunches = 20;  // of one timing
constexpr int kTimings = 7;

using Key = std::tuple<int, int, int, int, int, int>;  // operand, activation, output, m, n, k
using Gemms = std::map<Key, swinq_gemm_arguments>;

size_t width_of(int type) {
    return type == SWINQ_INT8 ? 1 : type == SWINQ_HALF ? 2 : 4;
}

// Codes or numbers of the operand's type in all of its bits: the power that a product takes, and so
// its clock, depends on them.
std::vector<uint8_t> made_up_operand(const swinq_gemm_arguments& gemm) {
    const int64_t count = static_cast<int64_t>(gemm.m) * gemm.k;
    const size_t width = width_of(gemm.operand);
    std::vector<uint8_t> bytes(static_cast<size_t>(count) * width);
    uint32_t state = 1;
    for (size_t i = 0; i < bytes.size(); ++i) {
        state = state * 1664525u + 1013904223u;
        bytes[i] = static_cast<uint8_t>(state >> 24);
        // exponents of numbers below two: 0x3f.. at the most
        if (width > 1 && i % width == width - 1) bytes[i] &= 0xbf;
    }
    return bytes;
}

size_t output_bytes(const swinq_gemm_arguments& gemm) {  // of fp32, the widest type
    return static_cast<size_t>(gemm.m) * gemm.n * sizeof(float);
}

// Before the first GEMM is tuned: the largest one might come after minutes.
void require_memory_of_each(const Gemms& gemms, int batch) {
    size_t most = 0;
    for (const auto& entry : gemms) {
        const swinq_gemm_arguments& gemm = entry.second;
        const size_t operand = static_cast<size_t>(gemm.m) * gemm.k * width_of(gemm.operand);
        most = std::max(most, operand + output_bytes(gemm));
    }
    require_memory("the largest GEMM of a batch of " + std::to_string(batch), most);
}

float time_tile(const Stream& stream, swinq_gemm_arguments gemm, const int32_t (&tile)[3]) {
    std::copy(tile, tile + 3, gemm.tile);
    const Graph graph(stream, [&](cudaStream_t s) {
        for (int i = 0; i < kLaunches; ++i) check(swinq_gemm(&gemm, s));
    });
    return median_ms(stream, 1, kTimings, [&](cudaStream_t s) { graph.launch(s); }) / kLaunches;
}

swinq_tuned_gemm tune(const Stream& stream, swinq_gemm_arguments gemm) {
    const DeviceMemory a(made_up_operand(gemm));
    const DeviceMemory out(output_bytes(gemm));
    check(cudaMemset(out.get(), 0, output_bytes(gemm)), "memset");
    gemm.a = a.get(), gemm.out = out.get();
    int32_t tiles[kTiles][3];
    int count = kTiles;
    check(swinq_gemm_tiles(&gemm, &tiles[0][0], &count));
    const int32_t standard[3] = {0, 0, 0};
    const float standard_ms = time_tile(stream, gemm, standard);
    float best_ms = 0;
    const int32_t* best = nullptr;
    for (int i = 0; i < count; ++i) {
        const float ms = time_tile(stream, gemm, tiles[i]);
        if (!best || ms < best_ms) best_ms = ms, best = tiles[i];
    }
    if (!best) throw std::runtime_error("a GEMM without tiles; the library is broken");
    std::printf("%7d %6d %6d  %7d %10d %6d   %9.2f  %9.2f   %s %d x %d\n", gemm.m, gemm.n, gemm.k,
                gemm.operand, gemm.activation, gemm.output, 1000 * standard_ms, 1000 * best_ms,
                best[0] ? "wgmma" : "mma", best[1], best[2]);
    std::fflush(stdout);
    return {gemm.operand,
            gemm.activation,
            gemm.output,
            gemm.m,
            gemm.n,
            gemm.k,
            {best[0], best[1], best[2]}};
}

struct PlanOwner {
    PlanOwner() = default;
    PlanOwner(const PlanOwner&) = delete;
    PlanOwner& operator=(const PlanOwner&) = delete;
    ~PlanOwner() { swinq_plan_destroy(plan); }
    swinq_plan* plan = nullptr;
};

// Every GEMM of a model of this precision, and the plan that holds their weights.
void add_gemms(const swinq_architecture& architecture, Numbers numbers, int batch,
               std::deque<PlanOwner>& owners, Gemms& gemms) {
    const MadeUpModel model(architecture, numbers);
    const swinq_model view = model.model();
    // unfused: what a plan fuses, another user of the file may not
    const swinq_plan_options options = {/*fuse_mlp=*/0, /*fuse_norm=*/0, /*use_tile_cache=*/0};
    owners.emplace_back();
    check(swinq_plan_create_with_options(&view, &options, kDevice, &owners.back().plan));
    int count = 0;
    check(swinq_plan_gemms(owners.back().plan, batch, nullptr, &count));
    std::vector<swinq_gemm_arguments> list(count);
    check(swinq_plan_gemms(owners.back().plan, batch, list.data(), &count));
    for (const swinq_gemm_arguments& g : list) {
        gemms.emplace(Key(g.operand, g.activation, g.output, g.m, g.n, g.k), g);
    }
}

int run(const std::vector<int>& n) {
    const int batch = n[0], img_size = n[1], window = n[2], heads = n[3], head_size = n[4];
    check(swinq_check_device(kDevice));
    check(cudaSetDevice(kDevice), "cudaSetDevice");
    const swinq_tuned_gemm none = {};
    check(swinq_tile_cache_add(kDevice, &none, 0));  // a folder that cannot be written says so now
    std::vector<Numbers> kinds = {n[5] == 0 ? Numbers::kFloat : Numbers::kHalf};
    if (n[6]) kinds = {Numbers::kInt8Mode1, Numbers::kInt8Mode2};

    Gemms gemms;
    std::deque<PlanOwner> owners;
    for (int version : {1, 2}) {
        for (Numbers numbers : kinds) {
            swinq_architecture a = architecture_of(version, Size::kTiny, window, img_size);
            a.embed_dim = heads * head_size;
            for (int stage = 0; stage < a.stages; ++stage) {
                a.num_heads[stage] = heads << stage;
                a.depths[stage] = 2;  // the GEMMs of a stage's other blocks are the same
            }
            add_gemms(a, numbers, batch, owners, gemms);
        }
    }
    require_memory_of_each(gemms, batch);
    std::printf("      m      n      k  operand activation output  default us    best us   tile\n");
    const Stream stream;
    std::vector<swinq_tuned_gemm> tuned;
    for (const auto& [key, gemm] : gemms) tuned.push_back(tune(stream, gemm));
    check(swinq_tile_cache_add(kDevice, tuned.data(), tuned.size()));
    char path[4096];
    check(swinq_tile_cache_path(kDevice, path, sizeof path));
    std::printf("%zu tiles written to %s\n", tuned.size(), path);
    return 0;
}

}  // namespace
}  // namespace swinq::programs

int main(int argc, char** argv) {
    using namespace swinq::programs;
    return run_main(kUsage, [&] {
        return run(parse(argc, argv,
                         {{"batch", 1, 1 << 16},
                          {"img", 1, 1 << 14},
                          {"window", 1, 1024},
                          {"heads", 1, 1024},
                          {"size_per_head", 1, 32},
                          {"dtype", 0, 1},
                          {"is_int8", 0, 1}},
                         nullptr));
    });
}

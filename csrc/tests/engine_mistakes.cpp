// What the C ABI says to mistakes: a code and words, before a GPU is looked for.
#include <cstdio>
#include <cstring>
#include <thread>

#include "engine/error.h"
#include "include/swinq.h"
#include "tests/engine_test.h"

namespace swinq::testing {
namespace {

void check_status(swinq_status status, swinq_status wanted, const std::string& words) {
    const std::string said = swinq_last_error();
    check(status == wanted && said.find(words) != std::string::npos,
          text("wanted ", wanted, " and '", words, "', got ", status, " and '", said, "'"));
}

}  // namespace

void test_mistakes() {
    check(swinq_abi_version() == SWINQ_ABI_VERSION && std::strlen(swinq_version()) > 0, "versions");
    std::thread([] { check(*swinq_last_error() == '\0', "no error yet on a new thread"); }).join();
    size_t bytes = 0;
    int count = 0;
    check_status(swinq_workspace_size(nullptr, 1, &bytes), SWINQ_INVALID_ARGUMENT, "plan is null");
    check_status(swinq_prepare(nullptr, 1), SWINQ_INVALID_ARGUMENT, "plan is null");
    check_status(swinq_plan_create(nullptr, 0, nullptr), SWINQ_INVALID_ARGUMENT, "plan is null");
    swinq_plan* plan = nullptr;
    check_status(swinq_plan_create(nullptr, 0, &plan), SWINQ_INVALID_ARGUMENT, "model is null");
    check_status(swinq_plan_create_from_file("x", 3, 0, &plan), SWINQ_INVALID_ARGUMENT,
                 "int8_mode is 3");
    check_status(swinq_plan_create_dequantized(nullptr, 0, &plan), SWINQ_INVALID_ARGUMENT,
                 "path is null");
    check_status(swinq_plan_create_dequantized("/no/such", 0, &plan), SWINQ_INVALID_ARGUMENT,
                 "cannot be read");
    check_status(swinq_check_architecture(nullptr), SWINQ_INVALID_ARGUMENT, "architecture is null");
    swinq_architecture wide = {};
    wide.version = wide.window_size = wide.num_classes = 1;
    wide.in_chans = 3;
    wide.img_size = wide.patch_size = 4;
    wide.stages = wide.depths[0] = 1;
    wide.num_heads[0] = 64;
    wide.embed_dim = 2048;
    wide.mlp_ratio = 4;
    wide.norm_eps = 1e-5f;
    check_status(swinq_check_architecture(&wide), SWINQ_UNSUPPORTED, "up to 256 channels");
    wide.embed_dim = 64;
    wide.num_heads[0] = 2;
    check(swinq_check_architecture(&wide) == SWINQ_OK, "a narrow model can be");
    check_status(swinq_int8_layer_count(nullptr, &count), SWINQ_INVALID_ARGUMENT, "plan is null");
    swinq_plan_destroy(nullptr);

    float vector[64] = {};
    alignas(256) static char memory[1024];
    swinq_gemm_arguments g = {};
    g.stream = SWINQ_HALF;
    g.output = 2;
    g.a = g.w = g.out = memory;
    g.bias = g.factor = reinterpret_cast<float*>(memory);
    g.m = 1;
    g.n = 8;
    g.k = 16;
    auto gemm_with = [&g](const char* words,
                          const std::function<void(swinq_gemm_arguments&)>& change) {
        swinq_gemm_arguments changed = g;
        change(changed);
        check_status(swinq_gemm(&changed, nullptr), SWINQ_INVALID_ARGUMENT, words);
    };
    gemm_with("operand is 3", [](auto& c) { c.operand = 3; });
    gemm_with("operand is -1", [](auto& c) { c.operand = -1; });
    gemm_with("stream is 0", [](auto& c) { c.stream = 0; });
    gemm_with("activation is 9", [](auto& c) { c.activation = 9; });
    gemm_with("output is 5", [](auto& c) { c.output = 5; });
    gemm_with("m is -1", [](auto& c) { c.m = -1; });
    gemm_with("n is 12", [](auto& c) { c.n = 12; });
    gemm_with("k is 24", [](auto& c) { c.k = 24; });
    gemm_with("a is null", [](auto& c) { c.a = nullptr; });
    gemm_with("out is at", [](auto& c) { c.out = memory + 8; });
    gemm_with("factor is null", [](auto& c) { c.factor = nullptr; });
    gemm_with("out_inverse is null", [](auto& c) { c.output = 0; });
    check_status(swinq_gemm(nullptr, nullptr), SWINQ_INVALID_ARGUMENT, "arguments is null");
    check_status(swinq_gemm_layout(SWINQ_INT8, nullptr, 1, 1, memory), SWINQ_INVALID_ARGUMENT,
                 "weight is null");
    check_status(swinq_gemm_layout(SWINQ_INT8, memory, 0, 1, memory), SWINQ_INVALID_ARGUMENT,
                 "n is 0");
    check_status(swinq_gemm_tiles(&g, nullptr, nullptr), SWINQ_INVALID_ARGUMENT, "count is null");

    swinq_attention_arguments a = {};
    a.type = a.out_type = SWINQ_HALF;
    a.qkv = a.out = memory;
    a.bias_table = a.bias = a.factor = reinterpret_cast<float*>(memory);
    a.batch = a.heads = 1;
    a.resolution = 8;
    a.window = 4;
    auto attention_with = [&a](const char* words,
                               const std::function<void(swinq_attention_arguments&)>& change) {
        swinq_attention_arguments changed = a;
        change(changed);
        check_status(swinq_attention(&changed, nullptr), SWINQ_INVALID_ARGUMENT, words);
    };
    attention_with("window 3 does not divide", [](auto& c) { c.window = 3; });
    attention_with("shift is 4", [](auto& c) { c.shift = 4; });
    attention_with("heads is 0", [](auto& c) { c.heads = 0; });
    attention_with("batch * resolution^2", [](auto& c) { c.batch = 1 << 30; });
    attention_with("qkv is null", [](auto& c) { c.qkv = nullptr; });
    attention_with("out_inverse is null", [](auto& c) { c.out_type = SWINQ_INT8; });
    check_status(swinq_attention_bias(nullptr, 7, 1, vector), SWINQ_INVALID_ARGUMENT,
                 "table is null");
    check_status(swinq_attention_bias_size(0, 1, nullptr), SWINQ_INVALID_ARGUMENT,
                 "floats is null");

    const swinq_prenorm_arguments prenorm = {};
    const swinq_postnorm_arguments postnorm = {};
    const swinq_pool_arguments pool = {};
    const swinq_patch_embed_arguments patch_embed = {};
    check_status(swinq_prenorm(&prenorm, nullptr), SWINQ_INVALID_ARGUMENT, "resolution is 0");
    check_status(swinq_postnorm(&postnorm, nullptr), SWINQ_INVALID_ARGUMENT, "channels is 0");
    check_status(swinq_pool(&pool, nullptr), SWINQ_INVALID_ARGUMENT, "tokens is 0");
    check_status(swinq_patch_embed(&patch_embed, nullptr), SWINQ_INVALID_ARGUMENT,
                 "image_type is 0");
    check_status(swinq_plan_gemms(nullptr, 1, nullptr, &count), SWINQ_INVALID_ARGUMENT,
                 "plan is null");
    check_status(swinq_check_device(-1),
                 swinq_check_device(0) == SWINQ_OK ? SWINQ_INVALID_ARGUMENT : SWINQ_UNSUPPORTED,
                 "fix: ");

    g.m = 0;
    a.batch = 0;
    check(swinq_gemm(&g, nullptr) == SWINQ_OK, "a product of no rows is done");
    check(swinq_attention(&a, nullptr) == SWINQ_OK, "attention over no images is done");
}

// Everything that needs a GPU says that there is none.
void test_without_gpu() {
    if (swinq_check_device(0) == SWINQ_OK) {
        std::printf("a GPU is there: what is said without one was not tested\n");
        return;
    }
    check_status(swinq_check_device(0), SWINQ_UNSUPPORTED, "run on a machine with an NVIDIA GPU");
    char path[64];
    check_status(swinq_tile_cache_path(0, path, sizeof path), SWINQ_UNSUPPORTED, "NVIDIA GPU");
}

}  // namespace swinq::testing

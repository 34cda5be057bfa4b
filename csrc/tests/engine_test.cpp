// What of the engine needs no GPU: weight layouts, dequantized models, the tile cache, JSON,
// safetensors, and what the C ABI says to mistakes. Prints what failed; the exit code is 1 if
// anything did.
#include <sys/wait.h>
#include <unistd.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "engine/error.h"
#include "engine/json.h"
#include "engine/safetensors.h"
#include "engine/sha256.h"
#include "engine/tile_cache.h"
#include "engine/weights.h"
#include "include/swinq.h"
#include "kernels/attention.h"
#include "kernels/patch_embed.h"
#include "tests/engine_test.h"

namespace swinq::testing {

int checked = 0, failed = 0;

void check(bool holds, const std::string& what) {
    ++checked;
    if (!holds) {
        ++failed;
        std::printf("FAILED: %s\n", what.c_str());
    }
}

std::string refusal(const std::function<void()>& work) {
    try {
        work();
    } catch (const Error& error) {
        return error.what();
    }
    return "";
}

void check_refused(const std::string& what, const std::string& words,
                   const std::function<void()>& work) {
    const std::string said = refusal(work);
    check(said.find(words) != std::string::npos && said.find("\n  fix: ") != std::string::npos,
          text(what, ": wanted '", words, "' and a fix, got '", said, "'"));
}

}  // namespace swinq::testing

namespace {

using namespace swinq;
using namespace swinq::testing;
namespace fs = std::filesystem;

void write_file(const fs::path& path, const std::string& content) {
    std::ofstream(path, std::ios::binary) << content;
}

// ---- layouts ----

void test_layouts() {
    for (int t = 0; t < 4; ++t) {
        for (int j = 0; j < 4; ++j) {
            for (int e = 0; e < 2; ++e) {
                check(channel_of_row(64 + j * 8 + 2 * t + e) == 64 + t * 8 + j * 2 + e,
                      text("row of thread ", t, ", eight ", j, ", element ", e));
            }
        }
    }
    constexpr int n = 40, k = 3;
    std::vector<float> weight(n * k), laid_out(64 * k, -1.0f);
    for (size_t i = 0; i < weight.size(); ++i) {
        weight[i] = static_cast<float>(i + 1);
    }
    gemm_layout(Type::kFloat, weight.data(), n, k, laid_out.data());
    check(padded_rows(n) == 64 && padded_rows(32) == 32 && padded_rows(1) == 32, "padded rows");
    for (int row = 0; row < 64; ++row) {
        const auto channel = static_cast<int>(channel_of_row(row));
        for (int c = 0; c < k; ++c) {
            const float wanted = channel < n ? weight[static_cast<size_t>(channel * k + c)] : 0.0f;
            check(laid_out[static_cast<size_t>(row * k + c)] == wanted, text("laid out row ", row));
        }
    }
    const std::vector<float> padded = pad_heads(std::vector<float>(48, 2.0f), 2);
    check(padded.size() == 64, "two heads of 24 become two of 32");
    for (size_t i = 0; i < padded.size(); ++i) {
        check(padded[i] == (i % 32 < 24 ? 2.0f : 0.0f), text("padded channel ", i));
    }
}

void test_scales() {
    check(inverse_of(0.0f) == 0.0f && inverse_of(4.0f) == 0.25f, "inverses, of 0 too");
    const float in_scale = 0.1f, weight_scale[2] = {0.3f, 0.7f};
    check(gemm_factor(&in_scale, false, weight_scale, 2)[1] == 0.1f * 0.7f, "factor of a scalar");
    check(gemm_factor(&in_scale, true, weight_scale, 2)[1] == 0.7f, "factor of a vector");
    const float q[1] = {0.1f}, key[1] = {0.3f}, softmax[1] = {0.7f};
    check(attention_factor(q, key, softmax, 1)[0] == (0.1f * 0.3f) * 0.7f, "attention factor");
    const std::vector<float> scales = qkv_scales(q, key, 5.0f, 1);
    check(scales.size() == 96 && scales[31] == 0.1f && scales[32] == 0.3f && scales[64] == 5.0f,
          "scales of q, k and v");
    const float table[6] = {0, 1, 2, 3, 4, 5};
    check(transposed(table, 3, 2) == std::vector<float>({0, 2, 4, 1, 3, 5}), "transposed table");
}

// What plans refuse by: Swin fits every GPU, patches of 16 with 192 channels none.
void test_shared_memory() {
    PatchEmbedArguments p = {};
    p.stream = Type::kHalf;
    p.in_chans = 3;
    for (const int channels : {96, 128, 192}) {
        p.patch_size = 4;
        p.channels = channels;
        check(patch_embed_shared_bytes(p) <= 48 * 1024, text("a patch of 4, ", channels));
    }
    p.patch_size = 16;
    check(patch_embed_shared_bytes(p) > 232448, "a patch of 16, 192 channels");
    p.stream = Type::kFloat;
    check(patch_embed_shared_bytes(p) == 0, "none of it is asked for in fp32");
    AttentionArguments a = {};
    for (const Type type : {Type::kInt8, Type::kHalf}) {
        a.type = type;
        a.window = 7;
        check(attention_shared_bytes(a) == 0, "a small window");
        a.window = 24;
        check(attention_shared_bytes(a) <= 48 * 1024, "a window of 24");
        a.window = 150;
        check(attention_shared_bytes(a) > 232448, "a window of 150");
    }
    a.type = Type::kFloat;
    check(attention_shared_bytes(a) == 0, "any window in fp32");
}

// ---- tile cache ----

// Threads and processes that add to one file lose nothing.
void test_adding_at_once(const std::string& path, const std::string& gpu) {
    constexpr int kWriters = 4, kTiles = 20;
    const size_t before = read_tiles(path, gpu).size();
    auto add = [&](int writer) {
        for (int i = 0; i < kTiles; ++i) {
            add_tiles(path, gpu, {{{0, 0, 0, 1 + writer, 16, 16 * (1 + i)}, {0, 64, 64}}});
        }
    };
    std::vector<pid_t> children;
    for (int writer = 0; writer < kWriters; ++writer) {
        children.push_back(fork());
        if (children.back() == 0) {
            std::thread other(add, kWriters + writer);
            add(writer);
            other.join();
            std::_Exit(0);
        }
    }
    for (const pid_t child : children) {
        int status = 1;
        check(waitpid(child, &status, 0) == child && status == 0, "a writer of tiles failed");
    }
    check(read_tiles(path, gpu).size() == before + 2 * kWriters * kTiles, "all writers' tiles");
}

void test_tile_cache(const fs::path& folder) {
    const std::string gpu = "NVIDIA H100 80GB HBM3";
    const Tiles tiles = {{{0, 1, 0, 1 << 30, 384, 96}, {1, 128, 96}},
                         {{1, 0, 3, 49, 768, 768}, {0, 64, 64}}};
    auto same = [](const Tiles& a, const Tiles& b) {
        return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](auto& x, auto& y) {
            return x.first == y.first && x.second.instruction == y.second.instruction &&
                   x.second.rows == y.second.rows && x.second.columns == y.second.columns;
        });
    };
    const std::string content = format_tiles(gpu, tiles);
    check(same(parse_tiles(content, gpu), tiles), "tiles come back");
    check(same(parse_tiles(format_tiles(gpu, {}), gpu), {}), "no tiles come back");
    check(parse_tiles(content, "NVIDIA A100").empty(), "tiles of another GPU");
    for (size_t i = 0; i < content.size(); ++i) {
        std::string damaged = content;
        damaged[i] = static_cast<char>(damaged[i] ^ 1);
        check(parse_tiles(damaged, gpu).empty(), text("tiles with byte ", i, " changed"));
        check(parse_tiles(content.substr(0, i), gpu).empty(), text("tiles cut after ", i));
    }
    check(parse_tiles(content + "1", gpu).empty(), "tiles with more behind");

    setenv("XDG_CACHE_HOME", (folder / "xdg").c_str(), 1);
    unsetenv("SWINQ_CACHE_DIR");
    check(fs::path(tile_cache_path(gpu)).parent_path() == folder / "xdg" / "swinq", "XDG folder");
    setenv("SWINQ_CACHE_DIR", (folder / "own" / "deep").c_str(), 1);
    const std::string path = tile_cache_path(gpu);
    check(fs::path(path).parent_path() == folder / "own" / "deep", "own folder");
    check(fs::path(path).filename().string().rfind("tiles-nvidia-h100-80gb-hbm3-", 0) == 0,
          "name of the file: " + path);
    check(read_tiles(path, gpu).empty(), "no file, no tiles");
    add_tiles(path, gpu, tiles);
    check(same(read_tiles(path, gpu), tiles), "tiles from the file");
    check(std::distance(fs::directory_iterator(fs::path(path).parent_path()), {}) == 2,
          "nothing but its lock beside the file");
    Tiles changed = {{tiles.begin()->first, {0, 64, 32}}};
    add_tiles(path, gpu, changed);
    changed.insert(tiles.begin(), tiles.end());
    check(same(read_tiles(path, gpu), changed), "a new tile in place of the old one, others kept");
    test_adding_at_once(path, gpu);
    check(read_tiles(folder.string(), gpu).empty(), "a folder is no tile cache");
    write_file(folder / "in_the_way", "");
    check_refused("a file as folder", "cannot write the tile cache",
                  [&] { add_tiles((folder / "in_the_way" / "tiles.txt").string(), gpu, tiles); });
    check_refused("no folder at all", "no folder", [&] { add_tiles("", gpu, tiles); });
    unsetenv("SWINQ_CACHE_DIR");
    unsetenv("XDG_CACHE_HOME");
    unsetenv("HOME");
    check(tile_cache_path(gpu).empty(), "no folder in the environment");
}

// ---- JSON and digests ----

void test_json() {
    for (const char* good :
         {"{}", "[]", " null ", "true", "[1, -2.5e3, \"a\"]", "{\"a\": {\"b\": []}}",
          "\"\\u00e9\\ud83d\\ude00\\n\"", "0", "-0.1E+2", "[[[[]]]]"}) {
        check(refusal([&] { Json::parse(good); }).empty(), text("JSON: ", good));
    }
    const std::string deep(100000, '[');
    for (const std::string& bad : {std::string(),
                                   std::string("{"),
                                   std::string("[1,]"),
                                   std::string("{\"a\":1,}"),
                                   std::string("{\"a\":1,\"a\":2}"),
                                   std::string("01"),
                                   std::string("1."),
                                   std::string("+1"),
                                   std::string("NaN"),
                                   std::string("Infinity"),
                                   std::string("1e999"),
                                   std::string("'a'"),
                                   std::string("\"\\x\""),
                                   std::string("\"\\ud800\""),
                                   std::string("\"\\u12"),
                                   std::string("\"a\nb\""),
                                   std::string("\"abc"),
                                   std::string("[1 2]"),
                                   std::string("{1:2}"),
                                   std::string("truex"),
                                   std::string("[] []"),
                                   std::string("\"\\"),
                                   std::string("[1]\0", 4),
                                   deep}) {
        check_refused("JSON: " + bad.substr(0, 20), "no JSON", [&] { Json::parse(bad); });
    }
    const Json json =
        Json::parse("{\"n\": 9007199254740993, \"x\": 0.1, \"t\": \"\\u00e9\\ud83d\\ude00\"}");
    const auto& object = *json.get_if<Json::Object>();
    check(*object.at("n").get_if<int64_t>() == 9007199254740993, "a whole number keeps its bits");
    check(*object.at("x").get_if<double>() == 0.1, "a number");
    const std::string accented = *object.at("t").get_if<std::string>();
    check(accented == "\xc3\xa9\xf0\x9f\x98\x80", "escapes become UTF-8");
    check(json_quoted(accented + "\"\\\n\x01\x7f") ==
              "\"\\u00e9\\ud83d\\ude00\\\"\\\\\\n\\u0001\\u007f\"",
          "a text as Python writes it: " + json_quoted(accented));
    for (const char* bad : {"\xff", "\xc3", "\xc0\x80", "\xed\xa0\x80", "\xf5\x80\x80\x80"}) {
        check_refused("UTF-8", "not UTF-8", [&] { json_quoted(bad); });
    }
}

void test_sha256() {
    const std::pair<std::string, const char*> known[] = {
        {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
        {std::string(1000000, 'a'),
         "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"}};
    for (const auto& [message, digest] : known) {
        check(sha256(message.data(), message.size()) == digest,
              text("SHA-256 of ", message.size(), " bytes"));
    }
}

// ---- safetensors ----

std::string safetensors(const std::string& header, const std::string& data) {
    std::string file(8, '\0');
    for (size_t i = 0; i < 8; ++i) {
        file[i] = static_cast<char>(header.size() >> (8 * i));
    }
    return file + header + data;
}

void test_safetensors(const fs::path& folder) {
    const std::string path = (folder / "file.safetensors").string();
    auto read = [&path](const std::string& content) {
        write_file(path, content);
        return refusal([&] { Safetensors file(path); });
    };
    const std::string good = safetensors(
        R"({"__metadata__":{"a":"b"},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
        R"("y":{"dtype":"I8","shape":[],"data_offsets":[8,9]}})",
        "12345678z");
    check(read(good).empty(), "a good file: " + read(good));
    const Safetensors file(path);
    check(file.metadata().at("a") == "b" && file.tensors().size() == 2 &&
              file.tensors().at("x").shape == std::vector<int64_t>{2} &&
              *file.tensors().at("y").data == 'z',
          "what a good file holds");
    for (size_t i = 0; i < good.size(); ++i) {
        check(!read(good.substr(0, i)).empty(), text("a file cut after ", i, " bytes"));
        std::string damaged = good;
        damaged[i] = static_cast<char>(damaged[i] ^ 0x20);
        read(damaged);  // may be another good file, but must not crash
    }
    const std::pair<const char*, const char*> headers[] = {
        {R"({"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", "does not fit its shape"},
        {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,16]}})", "does not fit its shape"},
        {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", "does not fit its shape"},
        {R"({"x":{"dtype":"I8","shape":[4611686018427387904,4],"data_offsets":[0,0]}})",
         "does not fit its shape"},
        {R"({"x":{"dtype":"I8","shape":[-8],"data_offsets":[0,8]}})", "is no tensor's"},
        {R"({"x":{"dtype":"Q4","shape":[8],"data_offsets":[0,8]}})", "is no tensor's"},
        {R"({"x":{"dtype":"I8","shape":[8],"data_offsets":[0]}})", "is no tensor's"},
        {R"({"x":{"dtype":"I8","shape":[8]}})", "is no tensor's"},
        {R"({"x":7})", "is no tensor's"},
        {R"({"__metadata__":{"a":1}})", "wanted a text"},
        {R"({"x":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}})", "behind the last tensor"},
        {R"({"x":{"dtype":"I8","shape":[4],"data_offsets":[4,8]}})", "overlap or leave a gap"},
        {R"({"x":{"dtype":"I8","shape":[8],"data_offsets":[0,8]},)"
         R"("y":{"dtype":"I8","shape":[4],"data_offsets":[4,8]}})",
         "overlap or leave a gap"},
        {R"({"x":{"dtype":"I8","shape":[1],"data_offsets":[0,1]},)"
         R"("y":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}})",
         "does not fit its shape"}};
    for (const auto& [header, words] : headers) {
        const std::string said = read(safetensors(header, "12345678"));
        check(said.find(words) != std::string::npos, text(header, ": ", said));
    }
    check(read("PK\x03\x04 a pickle").find("a torch checkpoint") != std::string::npos, "a pickle");
    check(read("{\"a\": 1, \"b\": 2}").find("not a safetensors file") != std::string::npos, "JSON");
    check_refused("no file", "cannot be read",
                  [&] { Safetensors none((folder / "none").string()); });
    check_refused("a folder", "cannot be read", [&] { Safetensors none(folder.string()); });
    swinq_plan* plan = nullptr;
    write_file(path, good);
    check(swinq_plan_create_from_file(path.c_str(), 0, 0, &plan) == SWINQ_INVALID_ARGUMENT &&
              std::strstr(swinq_last_error(), "wanted 'swinq-int8'") != nullptr,
          text("a file that is no INT8 checkpoint: ", swinq_last_error()));
}

}  // namespace

int main() {
    const fs::path folder = fs::temp_directory_path() / text("swinq_engine_test.", getpid());
    fs::create_directories(folder);
    test_layouts();
    test_scales();
    test_json();
    test_sha256();
    test_safetensors(folder);
    test_dequantized();
    test_mistakes();
    test_without_gpu();
    test_shared_memory();
    test_tile_cache(folder);
    fs::remove_all(folder);
    std::printf("%d checks, %d failed\n", checked, failed);
    return failed != 0;
}

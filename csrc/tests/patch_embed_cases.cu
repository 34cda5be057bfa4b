// Patch embedding of images of every official size, and what the kernels say of images that are no
// numbers.
#include <cmath>
#include <limits>

#include "norm_problem.h"

namespace swinq::testing {

namespace {

constexpr float kEps = 1e-5f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Embedding {
    Embedding(Type image_type, Type stream, int batch, int in_chans, int img_size, int patch_size,
              int channels)
        : side(img_size / patch_size),
          rows(static_cast<int64_t>(batch) * side * side),
          images(random_bytes(image_type,
                              static_cast<int64_t>(batch) * in_chans * img_size * img_size,
                              next_seed(), -2.5f, 2.5f)),
          weight(random_bytes(stream,
                              static_cast<int64_t>(channels) * in_chans * patch_size * patch_size,
                              next_seed(), -0.25f, 0.25f)),
          bias(random_array<float>(channels, next_seed(), -0.5f, 0.5f)),
          gamma(random_array<float>(channels, next_seed(), 0.5f, 1.5f)),
          beta(random_array<float>(channels, next_seed(), -0.5f, 0.5f)),
          inverse(random_array<float>(channels, next_seed(), 15, 60)),
          status(std::vector<int>(batch, 7)),
          x(rows * channels * size_of(stream)),
          operand(rows * channels) {
        set_some(inverse.get(), channels, next_seed(), 5, 16);
        x.poison(rows * channels * size_of(stream));
        operand.poison(rows * channels);
        p.image_type = image_type, p.stream = stream, p.images = images.get();
        p.weight = weight.get(), p.bias = bias.get();
        p.gamma = gamma.get(), p.beta = beta.get(), p.x = x.get(), p.status = status.get();
        p.eps = kEps, p.batch = batch, p.in_chans = in_chans, p.img_size = img_size;
        p.patch_size = patch_size, p.channels = channels;
    }
    void want_codes() { p.operand = operand.as<int8_t>(), p.inverse = inverse.get(); }

    int side;
    int64_t rows;
    DeviceArray<uint8_t> images, weight;
    DeviceArray<float> bias, gamma, beta, inverse;  // (channels)
    DeviceArray<int> status;                        // (batch), not cleared
    GuardedBuffer x, operand;                       // (rows, channels)
    PatchEmbedArguments p = {};
};

std::string describe(const PatchEmbedArguments& p) {
    return "batch " + std::to_string(p.batch) + " image " + std::to_string(p.in_chans) + "x" +
           std::to_string(p.img_size) + " patch " + std::to_string(p.patch_size) + " channels " +
           std::to_string(p.channels) + (p.operand ? " codes" : "");
}

void embed(Group& group, Embedding& e, bool optional) {
    const PatchEmbedArguments& p = e.p;
    const std::string label = describe(p);
    Tally* tally = group.run(label, values(0x1p-17), [&] { patch_embed(p, nullptr); }, optional);
    if (!tally) return;
    const int64_t count = e.rows * p.channels;
    DeviceArray<double> convolved(count), exact(count);
    DeviceArray<float> plain(count);
    plain_patches(p, convolved.get());
    plain_layernorm(convolved.get(), e.rows, p.channels, p.gamma, p.beta, p.eps, exact.get(),
                    plain.get());
    compare(p.x, {p.stream}, {exact.get(), plain.get(), e.rows, p.channels}, false, tally);
    e.x.check_guards(tally);
    e.operand.check_guards(tally);
    group.check(e.status.read() == std::vector<int>(p.batch, 0), label, "a status of 0, cleared");
    if (!p.operand) return;
    Tally* coding = group.run(label + " of the stored x", testing::exact(), [] {});
    compare_requantized(p.operand, p.stream, p.x, p.inverse, e.rows, p.channels, coding);
}

void embeddings(Group& group, Type image_type, Type stream, bool quick) {
    for (int channels : {96, 128, 192, 256}) {
        for (int img_size : {32, 192, 224, 256, 384}) {
            if (quick && img_size > 32) continue;
            for (int batch : {1, 3}) {
                for (bool coded : {false, true}) {
                    if (coded && stream == Type::kFloat) continue;
                    Embedding e(image_type, stream, batch, 3, img_size, 4, channels);
                    if (coded) e.want_codes();
                    embed(group, e, channels > 192);
                }
            }
        }
    }
    // what a model of our own may have
    for (int in_chans : {1, 3, 4}) {
        for (int patch_size : {2, 4, 8}) {
            for (int channels : {24, 32, 64}) {
                if (quick && (channels != 32 || patch_size > 4)) continue;
                Embedding e(image_type, stream, 2, in_chans, 8 * patch_size, patch_size, channels);
                embed(group, e, true);
            }
        }
    }
}

void bad_images(Group& group, Type image_type, Type stream) {
    for (float bad : {std::nanf(""), kInfinity, -kInfinity, 1e6f}) {
        // a million is a number in fp32, but no fp16 one
        const bool wanted = !(bad == 1e6f && stream == Type::kFloat && image_type == Type::kFloat);
        for (int64_t index : {0, 1024, 3 * 32 * 32 - 1}) {
            Embedding e(image_type, stream, 3, 3, 32, 4, 96);
            plant(image_type, const_cast<void*>(e.p.images), 3 * 32 * 32 + index, bad);
            const std::string label = std::to_string(bad) + " at " + std::to_string(index);
            if (!group.attempt(label, [&] { patch_embed(e.p, nullptr); })) continue;
            group.check(e.status.read() == std::vector<int>({0, wanted, 0}), label,
                        "a status of 0 for the images beside it" +
                            std::string(wanted ? " and 1 for this" : " and this"));
        }
    }
}

void bad_stream(Group& group, Type stream) {
    constexpr int kChannels = 96, kSide = 6, kTokens = kSide * kSide;
    for (float bad : {std::nanf(""), kInfinity, -kInfinity}) {
        for (int64_t index : {0, 100, kTokens * kChannels - 1}) {
            const auto x = random_stream(stream, 3 * kTokens, kChannels, next_seed());
            plant(stream, x.get(), kTokens * kChannels + index, bad);
            const auto gamma = random_array<float>(4 * kChannels, next_seed(), 0.5f, 1.5f);
            const std::string label = std::to_string(bad) + " at " + std::to_string(index);
            for (bool merge : {false, true}) {
                for (bool norm : {false, true}) {
                    DeviceArray<uint8_t> out(3ll * kTokens * kChannels * size_of(stream));
                    DeviceArray<int> status(std::vector<int>(3, 0));
                    PrenormArguments p = {};
                    p.stream = stream, p.operand = stream, p.x = x.get(), p.out = out.get();
                    p.gamma = norm ? gamma.get() : nullptr, p.beta = norm ? gamma.get() : nullptr;
                    p.status = status.get(), p.eps = kEps;
                    p.batch = 3, p.resolution = kSide, p.channels = kChannels, p.merge = merge;
                    const std::string what =
                        label + (merge ? " merge" : "") + (norm ? " norm" : "");
                    if (!group.attempt(what, [&] { prenorm(p, nullptr); })) continue;
                    group.check(status.read() == std::vector<int>({0, 1, 0}), what,
                                "prenorm's status of the image set, and no other");
                }
            }
            // a status set before makes the last image's logits NaN as well
            DeviceArray<int> status(std::vector<int>{0, 0, 1});
            DeviceArray<uint8_t> pooled(3ll * kChannels * size_of(stream));
            const PoolArguments p = {stream,      x.get(),      pooled.get(), gamma.get(),
                                     gamma.get(), status.get(), kEps,         3,
                                     kTokens,     kChannels};
            if (!group.attempt(label + " pool", [&] { pool(p, nullptr); })) continue;
            const std::vector<uint8_t> bytes = pooled.read();
            int wrong = 0;
            for (int i = 0; i < 3 * kChannels; ++i) {
                const float value =
                    stream == Type::kHalf
                        ? __half2float(reinterpret_cast<const __half*>(bytes.data())[i])
                        : reinterpret_cast<const float*>(bytes.data())[i];
                wrong += i < kChannels ? !std::isfinite(value) : !std::isnan(value);
            }
            group.check(wrong == 0, label + " pool", "NaN for images 1 and 2 and numbers for 0");
        }
    }
}

}  // namespace

void patch_embed_suite(Report& report) {
    const bool quick = report.options().quick;
    const struct {
        const char* name;
        Type image, stream;
    } kinds[] = {{"half images", Type::kHalf, Type::kHalf},
                 {"float images", Type::kFloat, Type::kHalf},
                 {"float images, fp32 stream", Type::kFloat, Type::kFloat},
                 {"half images, fp32 stream", Type::kHalf, Type::kFloat}};
    for (const auto& kind : kinds) {
        report.group(std::string("patch embed ") + kind.name, 300,
                     [&](Group& group) { embeddings(group, kind.image, kind.stream, quick); });
        report.group(std::string("non-finite ") + kind.name, 100,
                     [&](Group& group) { bad_images(group, kind.image, kind.stream); });
    }
    report.group("non-finite half stream", 200,
                 [](Group& group) { bad_stream(group, Type::kHalf); });
    report.group("non-finite float stream", 200,
                 [](Group& group) { bad_stream(group, Type::kFloat); });
}

}  // namespace swinq::testing

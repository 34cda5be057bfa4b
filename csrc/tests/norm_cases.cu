// The kernels around LayerNorm: prenorm, postnorm and pool, at every width, and what they report.
#include "norm_problem.h"

namespace swinq::testing {

namespace {

constexpr float kEps = 1e-5f;

struct Norm {
    explicit Norm(int width)
        : gamma(random_array<float>(width, next_seed(), 0.5f, 1.5f)),
          beta(random_array<float>(width, next_seed(), -0.5f, 0.5f)),
          inverse(random_array<float>(width, next_seed(), 15, 60)),
          scale(random_array<float>(width, next_seed(), 1 / 60.0f, 1 / 20.0f)) {
        set_some(inverse.get(), width, next_seed(), 5, 16);
        set_some(inverse.get(), width, next_seed(), 31, 0);
        set_some(scale.get(), width, next_seed(), 37, 0);
    }
    DeviceArray<float> gamma, beta, inverse, scale;  // (width)
};

constexpr Bound kNumbers =
    values(0x1p-18);  // some last bits of fp32 beside the rounding to the type

struct PrenormCase {
    Type stream, operand;
    bool norm, merge;
    int batch, resolution, channels;
};

void run_prenorm(Group& group, const PrenormCase& c, bool optional) {
    const int width = c.merge ? 4 * c.channels : c.channels;
    const int64_t tokens = static_cast<int64_t>(c.batch) * c.resolution * c.resolution;
    const int64_t rows = c.merge ? tokens / 4 : tokens;
    const auto x = random_stream(c.stream, tokens, c.channels, next_seed());
    const Norm norm(width);
    DeviceArray<int> status(std::vector<int>(c.batch, 0));
    DeviceArray<double> exact(rows * width);
    DeviceArray<float> plain(rows * width);
    GuardedBuffer out(rows * width * size_of(c.operand));
    out.poison(rows * width * size_of(c.operand));

    PrenormArguments p = {};
    p.stream = c.stream, p.operand = c.operand, p.x = x.get(), p.out = out.get();
    p.gamma = c.norm ? norm.gamma.get() : nullptr, p.beta = c.norm ? norm.beta.get() : nullptr;
    p.inverse = c.operand == Type::kInt8 ? norm.inverse.get() : nullptr;
    p.status = status.get(), p.eps = kEps;
    p.batch = c.batch, p.resolution = c.resolution, p.channels = c.channels, p.merge = c.merge;
    const std::string label = std::string(c.norm ? "" : "no norm ") + (c.merge ? "merge " : "") +
                              "batch " + std::to_string(c.batch) + " map " +
                              std::to_string(c.resolution) + " channels " +
                              std::to_string(c.channels);
    const Bound bound = !c.norm                    ? testing::exact()
                        : c.operand == Type::kInt8 ? kRareCodes
                                                   : kNumbers;
    Tally* tally = group.run(label, bound, [&] { prenorm(p, nullptr); }, optional);
    if (!tally) return;
    const Rows source = {c.stream, x.get(), nullptr, rows, c.channels, c.merge, c.resolution};
    plain_layernorm(source, p.gamma, p.beta, kEps, exact.get(), plain.get());
    compare(out.get(), {c.operand, p.inverse}, {exact.get(), plain.get(), rows, width}, !c.norm,
            tally);
    out.check_guards(tally);
    const std::vector<int> reported = status.read();
    group.check(reported == std::vector<int>(c.batch, 0), label, "a status of 0 for every image");
}

// Widths whose rows quick gives more than a few of.
bool is_usual(int channels) {
    return channels == 96 || channels == 384;
}

// Rows this wide take a block each, of which a multiprocessor has one: with more rows than
// multiprocessors blocks take one after another.
constexpr int kBlockRowChannels = 3200;

void prenorms(Group& group, Type stream, Type operand, bool quick) {
    for (bool norm : {true, false}) {
        for (int channels : {32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 6144}) {
            const bool official = channels >= 96 && channels <= 1536;
            const bool few = quick && !is_usual(channels);
            const int side = few ? 3 : channels < 256 && !quick ? 56 : 5;
            if (!few) run_prenorm(group, {stream, operand, norm, false, 1, 7, channels}, !official);
            run_prenorm(group, {stream, operand, norm, false, 3, side, channels}, !official);
        }
        for (int channels : {8, 32, 96, 128, 192, 256, 384, 512, 768, 1024, 1536}) {
            const bool official = channels >= 96 && channels <= 768;
            const bool few = quick && !is_usual(channels);
            const int side = few ? 4 : channels < 256 && !quick ? 56 : 6;
            if (!few) run_prenorm(group, {stream, operand, norm, true, 1, 14, channels}, !official);
            run_prenorm(group, {stream, operand, norm, true, 3, side, channels}, !official);
        }
    }
    int side = 1;
    while (side * side <= multiprocessors()) ++side;
    run_prenorm(group, {stream, operand, true, false, 1, side, kBlockRowChannels}, true);
}

void postnorms(Group& group, Type y_type, Type stream, bool quick) {
    for (int channels :
         {32, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, kBlockRowChannels}) {
        const bool official = channels >= 96 && channels <= 1536;
        const Norm norm(channels);
        std::vector<int> counts = {1, 49, quick ? 65 : 3137};
        if (quick && !is_usual(channels)) counts = {9};
        if (channels == kBlockRowChannels) counts = {multiprocessors() + 1};
        for (int rows : counts) {
            const int64_t count = static_cast<int64_t>(rows) * channels;
            const auto y = y_type == Type::kInt8
                               ? random_bytes(y_type, count, next_seed(), -128, 127)
                               : random_stream(y_type, rows, channels, next_seed());
            const auto before = random_stream(stream, rows, channels, next_seed());
            DeviceArray<double> exact(count);
            DeviceArray<float> plain(count);
            const Rows source = {y_type, y.get(), norm.scale.get(), rows, channels, false, 1};
            plain_layernorm(source, norm.gamma.get(), norm.beta.get(), kEps, exact.get(),
                            plain.get());
            for (bool residual : {true, false}) {
                for (bool coded : {true, false}) {
                    if (coded && stream == Type::kFloat) continue;
                    if (quick && channels == kBlockRowChannels && !residual) continue;
                    GuardedBuffer x(count * size_of(stream)), operand(count);
                    x.poison(count * size_of(stream));
                    operand.poison(count);
                    if (residual) {
                        must(cudaMemcpyAsync(x.get(), before.get(), count * size_of(stream),
                                             cudaMemcpyDeviceToDevice),
                             "copy of the stream");
                    }
                    PostnormArguments p = {};
                    p.y_type = y_type, p.stream = stream, p.y = y.get(), p.x = x.get();
                    p.y_scale = y_type == Type::kInt8 ? norm.scale.get() : nullptr;
                    p.operand = coded ? operand.as<int8_t>() : nullptr;
                    p.inverse = coded ? norm.inverse.get() : nullptr;
                    p.gamma = norm.gamma.get(), p.beta = norm.beta.get(), p.eps = kEps;
                    p.rows = rows, p.channels = channels, p.residual = residual;
                    const std::string label =
                        "rows " + std::to_string(rows) + " channels " + std::to_string(channels) +
                        (residual ? " residual" : "") + (coded ? " codes" : "");
                    Tally* tally =
                        group.run(label, kNumbers, [&] { postnorm(p, nullptr); }, !official);
                    if (!tally) continue;
                    compare(x.get(), {stream, nullptr, nullptr, residual ? before.get() : nullptr},
                            {exact.get(), plain.get(), rows, channels}, false, tally);
                    x.check_guards(tally);
                    operand.check_guards(tally);
                    if (!coded) continue;
                    Tally* coding = group.run(label + " of the stored x", testing::exact(), [] {});
                    compare_requantized(operand.as<int8_t>(), stream, x.get(), norm.inverse.get(),
                                        rows, channels, coding);
                }
            }
        }
    }
}

void pools(Group& group, Type stream, bool quick) {
    for (int channels : {32, 96, 192, 512, 768, 1024, 1536}) {
        const Norm norm(channels);
        for (int tokens : {1, 36, 49, 64, 144}) {
            for (int batch : {1, 3, 33}) {
                if (quick && channels > 192 && (batch != 3 || (tokens != 1 && tokens != 49))) {
                    continue;
                }
                const int64_t rows = static_cast<int64_t>(batch) * tokens;
                const auto x = random_stream(stream, rows, channels, next_seed());
                DeviceArray<double> normalized(rows * channels), exact(batch * channels);
                DeviceArray<float> scratch(rows * channels), plain(batch * channels);
                GuardedBuffer pooled(static_cast<int64_t>(batch) * channels * size_of(stream));
                pooled.poison(static_cast<int64_t>(batch) * channels * size_of(stream));
                DeviceArray<int> status(std::vector<int>(batch, 0));
                const PoolArguments p = {
                    stream,       x.get(), pooled.get(), norm.gamma.get(), norm.beta.get(),
                    status.get(), kEps,    batch,        tokens,           channels};
                const std::string label = "batch " + std::to_string(batch) + " tokens " +
                                          std::to_string(tokens) + " channels " +
                                          std::to_string(channels);
                Tally* tally =
                    group.run(label, kNumbers, [&] { pool(p, nullptr); }, channels < 768);
                if (!tally) continue;
                const Rows source = {stream, x.get(), nullptr, rows, channels, false, 1};
                plain_layernorm(source, p.gamma, p.beta, kEps, normalized.get(), scratch.get());
                plain_mean(normalized.get(), batch, tokens, channels, exact.get(), plain.get());
                compare(pooled.get(), {stream}, {exact.get(), plain.get(), batch, channels}, false,
                        tally);
                pooled.check_guards(tally);
            }
        }
    }
}

}  // namespace

void norm_suite(Report& report) {
    const bool quick = report.options().quick;
    report.group("prenorm half to int8", 400,
                 [&](Group& g) { prenorms(g, Type::kHalf, Type::kInt8, quick); });
    report.group("prenorm half to half", 400,
                 [&](Group& g) { prenorms(g, Type::kHalf, Type::kHalf, quick); });
    report.group("prenorm float to float", 400,
                 [&](Group& g) { prenorms(g, Type::kFloat, Type::kFloat, quick); });
    report.group("postnorm int8", 600,
                 [&](Group& g) { postnorms(g, Type::kInt8, Type::kHalf, quick); });
    report.group("postnorm int8, fp32 stream", 600,
                 [&](Group& g) { postnorms(g, Type::kInt8, Type::kFloat, quick); });
    report.group("postnorm float", 600,
                 [&](Group& g) { postnorms(g, Type::kFloat, Type::kHalf, quick); });
    report.group("postnorm float, fp32 stream", 600,
                 [&](Group& g) { postnorms(g, Type::kFloat, Type::kFloat, quick); });
    report.group("pool half", 200, [&](Group& g) { pools(g, Type::kHalf, quick); });
    report.group("pool float", 200, [&](Group& g) { pools(g, Type::kFloat, quick); });
}

}  // namespace swinq::testing

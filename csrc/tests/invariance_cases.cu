// The same input gives the same bits: again, on another stream, and for an image elsewhere in a
// batch.
#include <algorithm>

#include "attention_problem.h"
#include "gemm_problem.h"
#include "norm_problem.h"

namespace swinq::testing {

namespace {

class Stream {
  public:
    Stream() { must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"); }
    ~Stream() { cudaStreamDestroy(stream_); }
    cudaStream_t get() const { return stream_; }

  private:
    cudaStream_t stream_ = nullptr;
};

// Launches what gives `bytes` on another stream, once the default one is done, and waits.
void elsewhere(const Stream& stream, const std::function<void(cudaStream_t)>& launch) {
    must(cudaDeviceSynchronize(), "the first run");
    launch(stream.get());
    must(cudaStreamSynchronize(stream.get()), "another stream");
}

const uint8_t* shifted(const void* data, int64_t bytes) {
    return static_cast<const uint8_t*>(data) + bytes;
}

void gemms(Group& group, Type operand, bool quick) {
    const Stream stream;
    constexpr int kRows = 49, kImages = 9;
    for (int k : {96, 768, 3072}) {
        if (quick && k > 96) continue;
        const int n = k == 3072 ? 768 : 288;
        GemmProblem problem(operand, kRows * kImages, n, k);
        problem.make(kRows * kImages, n, k, Data::kOrdinary);
        const Output output = operand == Type::kInt8 ? Output::kCodes : Output::kFloat;
        const int width = operand == Type::kInt8 ? 1 : 4;
        const int64_t whole_bytes = static_cast<int64_t>(kRows) * kImages * n * width;
        const int64_t image_bytes = whole_bytes / kImages;
        DeviceArray<uint8_t> whole(whole_bytes);
        GemmArguments g =
            problem.arguments(Activation::kNone, output, kRows * kImages, whole.get());
        if (!group.attempt("whole", [&] { gemm(g, nullptr, nullptr); })) continue;
        GuardedBuffer out(whole_bytes);
        std::vector<GemmTile> tiles = tiles_for(g);
        tiles.insert(tiles.begin(), GemmTile{});  // the default
        for (const GemmTile& tile : tiles) {
            const GemmTile* choice = tile.rows ? &tile : nullptr;
            for (int image : {0, 1, 5, 8}) {
                GemmArguments part = g;
                part.m = kRows, part.out = out.get();
                part.a = shifted(g.a, static_cast<int64_t>(image) * kRows * k * size_of(operand));
                out.poison(image_bytes);
                Tally* tally = group.run("image " + std::to_string(image) + " alone, " +
                                             describe(problem, kRows, choice),
                                         exact(), [&] { gemm(part, choice, nullptr); });
                if (!tally) continue;
                compare_bits(out.get(), whole.get() + image * image_bytes, image_bytes, width,
                             tally);
            }
            GemmArguments again = g;
            again.out = out.get();
            out.poison(whole_bytes);
            Tally* tally = group.run(
                "another stream, " + describe(problem, again.m, choice), exact(),
                [&] { elsewhere(stream, [&](cudaStream_t s) { gemm(again, choice, s); }); });
            if (tally) compare_bits(out.get(), whole.get(), whole_bytes, width, tally);
        }
    }
}

// So many that every block of a wgmma kernel has a second tile and one a third. With two slabs of
// 128 bytes a block has three stages, which bounds the blocks that run at once.
int many_tiles(const GemmTile& tile) {
    constexpr int kSharedBytes = 228 * 1024;  // of a multiprocessor of sm_90, which alone has wgmma
    const int blocks = kSharedBytes / (3 * (tile.rows + tile.columns) * 128);
    return 2 * blocks * multiprocessors() + 1;
}

// A product of many tiles side by side (one row) or below each other (the fewest columns). Its
// weights need no layout: any bytes are one of some weights.
class TileRow {
  public:
    TileRow(Type operand, const GemmTile& tile, bool wide)
        : operand_(operand),
          tile_(tile),
          wide_(wide),
          tiles_(many_tiles(tile)),
          m_(wide ? 1 : tiles_ * tile.rows),
          n_(wide ? tiles_ * tile.columns : 8),
          a_(random_bytes(operand, m_ * depth(), next_seed(), -reach(), reach())),
          w_(random_bytes(operand, ceil_div(n_, 32) * 32 * depth(), next_seed(), -reach(),
                          reach())),
          factor_(random_array<float>(n_, next_seed(), 0.5f / 65024, 1.5f / 65024)),
          bias_(random_array<float>(n_, next_seed(), -0.5f, 0.5f)),
          inverse_(random_array<float>(n_, next_seed(), 30, 60)),
          before_(random_bytes(Type::kHalf, count(), next_seed(), -4, 4)) {}

    // All tiles in one launch against as many a launch as there are multiprocessors.
    void run(Group& group, Output output) {
        const int width = output == Output::kCodes ? 1 : 2;
        GuardedBuffer together(count() * width), apart(count() * width);
        prepare(together, output, count() * width);
        prepare(apart, output, count() * width);
        const std::string label = "tile " + std::to_string(tile_.rows) + "x" +
                                  std::to_string(tile_.columns) + " m " + std::to_string(m_) +
                                  " n " + std::to_string(n_) +
                                  (output == Output::kResidual ? " residual" : "");
        Tally* tally = group.run(label, exact(), [&] {
            gemm(part(output, together, 0, tiles_), &tile_, nullptr);
            const int step = multiprocessors();
            for (int first = 0; first < tiles_; first += step) {
                gemm(part(output, apart, first, std::min(step, tiles_ - first)), &tile_, nullptr);
            }
        });
        if (!tally) return;
        compare_bits(together.get(), apart.get(), count() * width, width, tally);
        together.check_guards(tally);
        apart.check_guards(tally);
    }

  private:
    static constexpr int kRowBytes = 144;  // of k: a slab and a part of one

    int64_t depth() const { return kRowBytes / size_of(operand_); }
    float reach() const { return operand_ == Type::kInt8 ? 127 : 1; }
    int64_t count() const { return static_cast<int64_t>(m_) * n_; }

    void prepare(GuardedBuffer& out, Output output, int64_t bytes) const {
        out.poison(bytes);
        if (output != Output::kResidual) return;
        must(cudaMemcpyAsync(out.get(), before_.get(), bytes, cudaMemcpyDeviceToDevice),
             "copy of the stream");
    }

    // The arguments of some of the tiles.
    GemmArguments part(Output output, const GuardedBuffer& out, int first, int tiles) const {
        const int row = wide_ ? 0 : first * tile_.rows, column = wide_ ? first * tile_.columns : 0;
        const int width = output == Output::kCodes ? 1 : 2;
        GemmArguments g = {};
        g.operand = operand_, g.stream = Type::kHalf, g.output = output;
        g.a = shifted(a_.get(), static_cast<int64_t>(row) * kRowBytes);
        g.w = shifted(w_.get(), static_cast<int64_t>(column) * kRowBytes);
        g.out = out.as<uint8_t>() + (static_cast<int64_t>(row) * n_ + column) * width;
        g.factor = operand_ == Type::kInt8 ? factor_.get() + column : nullptr;
        g.bias = bias_.get() + column;
        g.out_inverse = output == Output::kCodes ? inverse_.get() + column : nullptr;
        g.m = wide_ ? 1 : tiles * tile_.rows, g.n = wide_ ? tiles * tile_.columns : n_;
        g.k = static_cast<int>(depth());
        return g;
    }

    Type operand_;
    GemmTile tile_;
    bool wide_;
    int tiles_, m_, n_;
    DeviceArray<uint8_t> a_, w_;                  // (m, k), (n padded to 32, k)
    DeviceArray<float> factor_, bias_, inverse_;  // (n)
    DeviceArray<uint8_t> before_;                 // (m, n)
};

// Blocks that take one tile after another, in a ring that goes round from tile to tile, against
// blocks that have one tile each.
void tile_after_tile(Group& group, Type operand, bool quick) {
    GemmArguments any = {};
    any.operand = operand;
    bool found = false;
    for (const GemmTile& tile : tiles_for(any)) {
        if (tile.instruction != 1) continue;
        found = true;
        for (bool wide : {true, false}) {
            // tall ones are large, and differ from the wide ones only in where a tile begins
            if (quick && !wide && !(tile.rows == 128 && tile.columns == 128)) continue;
            TileRow tiles(operand, tile, wide);
            tiles.run(group, operand == Type::kInt8 ? Output::kCodes : Output::kHalf);
            tiles.run(group, Output::kResidual);
        }
    }
    if (!found) group.check(true, "no wgmma on this GPU", "");
}

void attentions(Group& group, bool quick) {
    const Stream stream;
    for (Type type : {Type::kInt8, Type::kHalf, Type::kFloat}) {
        for (int window : {2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 24}) {
            if (quick && window > 8 && window != 10 && window != 14) continue;
            const AttentionSize size = {3, 2 * window, window, window / 2, quick ? 1 : 6};
            const AttentionProblem problem(type, size, Logits::kOrdinary);
            const int64_t bytes = problem.tokens() * problem.columns() * size_of(type);
            DeviceArray<uint8_t> whole(bytes);
            GuardedBuffer out(bytes);
            const AttentionArguments a = problem.arguments(type, whole.get());
            if (!group.attempt(describe(size), [&] { attention(a, nullptr); })) continue;
            for (int image : {0, 1, 2}) {
                AttentionArguments part = a;
                part.batch = 1, part.out = out.get(), part.qkv = shifted(a.qkv, bytes * image);
                out.poison(bytes / 3);
                Tally* tally =
                    group.run("image " + std::to_string(image) + " alone, " + describe(size),
                              exact(), [&] { attention(part, nullptr); });
                if (!tally) continue;
                compare_bits(out.get(), whole.get() + bytes / 3 * image, bytes / 3, size_of(type),
                             tally);
            }
            AttentionArguments again = a;
            again.out = out.get();
            out.poison(bytes);
            Tally* tally = group.run("another stream, " + describe(size), exact(), [&] {
                elsewhere(stream, [&](cudaStream_t s) { attention(again, s); });
            });
            if (tally) compare_bits(out.get(), whole.get(), bytes, size_of(type), tally);
        }
    }
}

// Rows that are normalised, merged or averaged; three images and each of them alone.
void norms(Group& group, Type stream_type) {
    const Stream stream;
    constexpr int kSide = 14, kTokens = kSide * kSide, kImages = 3;
    const int size = size_of(stream_type);
    for (int channels : {96, 192, 768}) {
        const auto x = random_stream(stream_type, kImages * kTokens, channels, next_seed());
        const auto gamma = random_array<float>(4 * channels, next_seed(), 0.5f, 1.5f);
        const int64_t bytes = static_cast<int64_t>(kTokens) * channels * size;  // of an image
        DeviceArray<uint8_t> whole(kImages * bytes), part(kImages * bytes);
        auto run = [&](const std::string& name, int64_t out_bytes,
                       const std::function<void(const void*, void*, int, cudaStream_t)>& launch) {
            const std::string label = name + " channels " + std::to_string(channels);
            if (!group.attempt(label, [&] { launch(x.get(), whole.get(), kImages, nullptr); })) {
                return;
            }
            for (int image = 0; image < kImages; ++image) {
                Tally* tally = group.run(label + " image " + std::to_string(image), exact(), [&] {
                    launch(shifted(x.get(), image * bytes), part.get(), 1, nullptr);
                });
                if (!tally) continue;
                compare_bits(part.get(), whole.get() + image * out_bytes, out_bytes, size, tally);
            }
            Tally* tally = group.run(label + " another stream", exact(), [&] {
                elsewhere(stream, [&](cudaStream_t s) { launch(x.get(), part.get(), kImages, s); });
            });
            if (tally) {
                compare_bits(part.get(), whole.get(), kImages * out_bytes, size, tally);
            }
        };
        for (bool merge : {false, true}) {
            run(merge ? "merge" : "prenorm", bytes,
                [&](const void* from, void* to, int batch, cudaStream_t s) {
                    PrenormArguments p = {};
                    p.stream = p.operand = stream_type, p.x = from, p.out = to;
                    p.gamma = p.beta = gamma.get(), p.eps = 1e-5f;
                    p.batch = batch, p.resolution = kSide, p.channels = channels, p.merge = merge;
                    prenorm(p, s);
                });
        }
        run("pool", static_cast<int64_t>(channels) * size,
            [&](const void* from, void* to, int batch, cudaStream_t s) {
                const PoolArguments p = {stream_type, from,  to,    gamma.get(), gamma.get(),
                                         nullptr,     1e-5f, batch, kTokens,     channels};
                pool(p, s);
            });
    }
}

void patches(Group& group, Type stream_type) {
    constexpr int kSide = 64, kImages = 3, kChannels = 96, kTokens = kSide * kSide / 16;
    const int size = size_of(stream_type);
    const auto images =
        random_bytes(Type::kFloat, kImages * 3ll * kSide * kSide, next_seed(), -2, 2);
    const auto weight = random_bytes(stream_type, kChannels * 48, next_seed(), -0.25f, 0.25f);
    const auto vector = random_array<float>(kChannels, next_seed(), 0.5f, 1.5f);
    const int64_t bytes = static_cast<int64_t>(kTokens) * kChannels * size;
    DeviceArray<uint8_t> whole(kImages * bytes), part(bytes);
    auto arguments = [&](int first, int count, void* x) {
        PatchEmbedArguments p = {};
        p.image_type = Type::kFloat, p.stream = stream_type;
        p.images = shifted(images.get(), first * 3ll * kSide * kSide * 4);
        p.weight = weight.get(), p.bias = vector.get(), p.gamma = vector.get();
        p.beta = vector.get(), p.x = x, p.eps = 1e-5f, p.batch = count, p.in_chans = 3;
        p.img_size = kSide, p.patch_size = 4, p.channels = kChannels;
        return p;
    };
    if (!group.attempt("whole",
                       [&] { patch_embed(arguments(0, kImages, whole.get()), nullptr); })) {
        return;
    }
    for (int image = 0; image < kImages; ++image) {
        Tally* tally = group.run("image " + std::to_string(image), exact(),
                                 [&] { patch_embed(arguments(image, 1, part.get()), nullptr); });
        if (tally) compare_bits(part.get(), whole.get() + image * bytes, bytes, size, tally);
    }
}

}  // namespace

void invariance_suite(Report& report) {
    const bool quick = report.options().quick;
    report.group("same bits, gemm int8", 400, [&](Group& g) { gemms(g, Type::kInt8, quick); });
    report.group("same bits, gemm half", 400, [&](Group& g) { gemms(g, Type::kHalf, quick); });
    report.group("same bits, gemm float", 400, [&](Group& g) { gemms(g, Type::kFloat, quick); });
    for (Type type : {Type::kInt8, Type::kHalf}) {
        const std::string name = type == Type::kInt8 ? "int8" : "half";
        report.group("same bits, tile after tile " + name, 40,
                     [&](Group& g) { tile_after_tile(g, type, quick); });
    }
    report.group("same bits, attention", 400, [&](Group& g) { attentions(g, quick); });
    for (Type type : {Type::kHalf, Type::kFloat}) {
        const std::string name = type == Type::kHalf ? "half" : "float";
        report.group("same bits, norms " + name, 400, [&](Group& g) { norms(g, type); });
        report.group("same bits, patch embed " + name, 8, [&](Group& g) { patches(g, type); });
    }
}

}  // namespace swinq::testing

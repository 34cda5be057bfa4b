// The fused MLP against the separate kernels. v1's LayerNorm may add in another order, which turns
// a code on its edge; v2's has the bits of postnorm().
#include <cmath>
#include <vector>

#include "gemm_problem.h"
#include "kernels/layernorm.h"
#include "kernels/mlp_small.cuh"
#include "norm_problem.h"
#include "swinq.h"

namespace swinq::testing {

namespace {

constexpr float kEps = 1e-5f;

// A weight in host memory, laid out for the GEMM and for the fused kernel.
struct Weight {
    using Layout = void (*)(const int8_t*, int, int, int8_t*);
    Weight(int n, int k, int channels, int hidden, Layout layout) {
        const DeviceArray<uint8_t> random =
            random_bytes(Type::kInt8, static_cast<int64_t>(n) * k, next_seed(), -127, 127);
        codes = random.read();
        std::vector<uint8_t> laid_out(ceil_div(n, 32) * 32 * k);
        swinq_gemm_layout(SWINQ_INT8, codes.data(), n, k, laid_out.data());
        gemm = DeviceArray<uint8_t>(laid_out);
        std::vector<int8_t> order(codes.size());
        layout(reinterpret_cast<const int8_t*>(codes.data()), channels, hidden, order.data());
        fused = DeviceArray<int8_t>(order);
    }
    std::vector<uint8_t> codes;  // (n, k), int8
    DeviceArray<uint8_t> gemm;
    DeviceArray<int8_t> fused;
};

struct Mlp {
    Mlp(int channels, int hidden)
        : channels(channels),
          hidden(hidden),
          fc1(hidden, channels, channels, hidden, mlp_layout_fc1),
          fc2(channels, hidden, channels, hidden, mlp_layout_fc2),
          gamma(random_array<float>(channels, next_seed(), 0.5f, 1.5f)),
          beta(random_array<float>(channels, next_seed(), -0.5f, 0.5f)),
          in_inverse(random_array<float>(channels, next_seed(), 30, 60)),
          fc1_factor(random_array<float>(hidden, next_seed(), 0.5f / spread(channels),
                                         1.5f / spread(channels))),
          fc1_bias(random_array<float>(hidden, next_seed(), -0.5f, 0.5f)),
          hidden_inverse(random_array<float>(hidden, next_seed(), 30, 90)),
          fc2_factor(random_array<float>(channels, next_seed(), 0.5f / spread(hidden),
                                         1.5f / spread(hidden))),
          fc2_bias(random_array<float>(channels, next_seed(), -0.5f, 0.5f)),
          out_inverse(random_array<float>(channels, next_seed(), 30, 60)),
          out_scale(random_array<float>(channels, next_seed(), 1 / 60.0f, 1 / 30.0f)) {
        set_some(in_inverse.get(), channels, next_seed(), 31, 0);
        set_some(hidden_inverse.get(), hidden, next_seed(), 31, 0);
        set_some(out_scale.get(), channels, next_seed(), 31, 0);
        find_reach();
    }
    static float spread(int k) { return std::sqrt(static_cast<float>(k)) * 40 * 73; }

    // How far two forms' outputs may be apart. Their LayerNorms add in another order, so that of a
    // row a code on its edge may turn, and everything behind it is a function of codes. It moves
    // hidden channel j before GELU by at most 127 fc1_factor, GELU is at most 1.13 as steep, and
    // what moves by a part of a code turns it with a probability of that part, by one. The weights
    // are random, so what the turned ones come to in column c has a mean of 0 and at most the
    // variance below; a row has 8 times its square root for it.
    void find_reach() {
        const std::vector<float> factor1 = fc1_factor.read(), inverse1 = hidden_inverse.read();
        const std::vector<float> factor2 = fc2_factor.read();
        const std::vector<float> inverse2 = out_inverse.read(), scale2 = out_scale.read();
        std::vector<float> plain(channels), rounded(channels);
        for (int c = 0; c < channels; ++c) {
            double variance = 0;
            for (int j = 0; j < hidden; ++j) {
                const auto w = static_cast<int8_t>(fc2.codes[c * hidden + j]);
                const double turning = std::fmin(1, 1.13 * 127 * factor1[j] * inverse1[j]);
                variance += turning * w * w;
            }
            plain[c] = static_cast<float>(8 * factor2[c] * std::sqrt(variance));
            // y's code moves as far, and may turn once more
            rounded[c] = (plain[c] * inverse2[c] + 1) * scale2[c];
        }
        reach[0] = DeviceArray<float>(plain);
        reach[1] = DeviceArray<float>(rounded);
    }

    MlpArguments fused(void* x, int m, bool rounded) const {
        MlpArguments a = {};
        a.x = x, a.gamma = gamma.get(), a.beta = beta.get(), a.in_inverse = in_inverse.get();
        a.fc1_weight = fc1.fused.get(), a.fc2_weight = fc2.fused.get();
        a.fc1_factor = fc1_factor.get(), a.fc1_bias = fc1_bias.get();
        a.hidden_inverse = hidden_inverse.get();
        a.fc2_factor = fc2_factor.get(), a.fc2_bias = fc2_bias.get();
        a.out_inverse = rounded ? out_inverse.get() : nullptr;
        a.out_scale = rounded ? out_scale.get() : nullptr;
        a.eps = kEps, a.m = m, a.channels = channels, a.hidden = hidden;
        return a;
    }

    void run_fc1(const int8_t* a, int8_t* h, int m) const {
        GemmArguments g = {};
        g.operand = Type::kInt8, g.stream = Type::kHalf;
        g.activation = Activation::kGelu, g.output = Output::kCodes;
        g.a = a, g.w = fc1.gemm.get(), g.out = h;
        g.factor = fc1_factor.get(), g.bias = fc1_bias.get(), g.out_inverse = hidden_inverse.get();
        g.m = m, g.n = hidden, g.k = channels;
        gemm(g, nullptr, nullptr);
    }

    // But for the form of the output.
    GemmArguments fc2_arguments(const int8_t* h, void* out, int m, bool rounded) const {
        GemmArguments g = {};
        g.operand = Type::kInt8, g.stream = Type::kHalf, g.activation = Activation::kNone;
        g.a = h, g.w = fc2.gemm.get(), g.out = out;
        g.factor = fc2_factor.get(), g.bias = fc2_bias.get();
        g.out_inverse = rounded ? out_inverse.get() : nullptr;
        g.m = m, g.n = channels, g.k = hidden;
        return g;
    }

    void separate(void* x, int8_t* a, int8_t* h, int m, bool rounded) const {
        PrenormArguments p = {};
        p.stream = Type::kHalf, p.operand = Type::kInt8, p.x = x, p.out = a;
        p.gamma = gamma.get(), p.beta = beta.get(), p.inverse = in_inverse.get(), p.eps = kEps;
        p.batch = m, p.resolution = 1, p.channels = channels;
        prenorm(p, nullptr);
        run_fc1(a, h, m);
        GemmArguments g = fc2_arguments(h, x, m, rounded);
        g.output = Output::kResidual, g.out_scale = rounded ? out_scale.get() : nullptr;
        gemm(g, nullptr, nullptr);
    }

    // v2: the codes of x are read and, if `next`, written.
    MlpArguments fused_v2(void* x, int8_t* codes, int m, bool rounded, bool next) const {
        MlpArguments a = fused(x, m, rounded);
        a.in_inverse = nullptr, a.operand = codes;
        a.next_inverse = next ? in_inverse.get() : nullptr;
        return a;
    }

    void separate_v2(void* x, int8_t* codes, int8_t* h, void* y, int m, bool rounded,
                     bool next) const {
        run_fc1(codes, h, m);
        GemmArguments g = fc2_arguments(h, y, m, rounded);
        g.output = rounded ? Output::kCodes : Output::kFloat;
        gemm(g, nullptr, nullptr);
        PostnormArguments p = {};
        p.y_type = rounded ? Type::kInt8 : Type::kFloat, p.stream = Type::kHalf;
        p.y = y, p.y_scale = rounded ? out_scale.get() : nullptr;
        p.x = x, p.operand = next ? codes : nullptr, p.inverse = next ? in_inverse.get() : nullptr;
        p.gamma = gamma.get(), p.beta = beta.get(), p.eps = kEps;
        p.rows = m, p.channels = channels, p.residual = true;
        postnorm(p, nullptr);
    }

    int channels, hidden;
    Weight fc1, fc2;
    DeviceArray<float> gamma, beta, in_inverse;                       // (channels)
    DeviceArray<float> fc1_factor, fc1_bias, hidden_inverse;          // (hidden)
    DeviceArray<float> fc2_factor, fc2_bias, out_inverse, out_scale;  // (channels)
    DeviceArray<float> reach[2];                                      // (channels): plain, rounded
};

// With guards around the bytes, which a kernel must not touch.
void copy_in(GuardedBuffer& to, const void* from, int64_t bytes) {
    to.poison(bytes);
    must(cudaMemcpyAsync(to.get(), from, bytes, cudaMemcpyDeviceToDevice), "filling a buffer");
}

void compare_mlp(Group& group, const Mlp& mlp_case, int m, bool rounded) {
    const int64_t count = static_cast<int64_t>(m) * mlp_case.channels;
    const auto before = random_stream(Type::kHalf, m, mlp_case.channels, next_seed());
    GuardedBuffer x(count * 2), wanted(count * 2);
    for (GuardedBuffer* to : {&x, &wanted}) copy_in(*to, before.get(), count * 2);
    DeviceArray<int8_t> a(count), h(static_cast<int64_t>(m) * mlp_case.hidden);
    const std::string label = "m " + std::to_string(m) + " channels " +
                              std::to_string(mlp_case.channels) + (rounded ? " rounded" : "");
    // the row sums of LayerNorm may be in another order, which turns a code on its edge and with it
    // a row, which is much of a small case
    Tally* tally = group.run(label, codes(1e-3, 0, mlp_case.channels), [&] {
        mlp(mlp_case.fused(x.get(), m, rounded), nullptr);
        mlp_case.separate(wanted.get(), a.get(), h.get(), m, rounded);
    });
    if (!tally) return;
    compare_near(x.get(), wanted.get(), mlp_case.reach[rounded].get(), m, mlp_case.channels, tally);
    x.check_guards(tally);
    wanted.check_guards(tally);
}

void compare_v2(Group& group, const Mlp& mlp_case, int m, bool rounded, bool next) {
    const int64_t count = static_cast<int64_t>(m) * mlp_case.channels;
    const auto x_before = random_stream(Type::kHalf, m, mlp_case.channels, next_seed());
    const auto codes_before = random_bytes(Type::kInt8, count, next_seed(), -128, 127);
    GuardedBuffer x(count * 2), wanted_x(count * 2), codes(count), wanted_codes(count);
    for (GuardedBuffer* to : {&x, &wanted_x}) copy_in(*to, x_before.get(), count * 2);
    for (GuardedBuffer* to : {&codes, &wanted_codes}) copy_in(*to, codes_before.get(), count);
    DeviceArray<int8_t> h(static_cast<int64_t>(m) * mlp_case.hidden);
    DeviceArray<float> y(count);
    const std::string label = "m " + std::to_string(m) + " channels " +
                              std::to_string(mlp_case.channels) + (rounded ? " rounded" : "") +
                              (next ? " with codes" : "");
    Tally* tally = group.run(label, exact(), [&] {
        auto* const made = static_cast<int8_t*>(codes.get());
        auto* const wanted = static_cast<int8_t*>(wanted_codes.get());
        mlp(mlp_case.fused_v2(x.get(), made, m, rounded, next), nullptr);
        mlp_case.separate_v2(wanted_x.get(), wanted, h.get(), y.get(), m, rounded, next);
    });
    if (!tally) return;
    compare_bits(x.get(), wanted_x.get(), count * 2, 2, tally);
    compare_bits(codes.get(), wanted_codes.get(), count, 1, tally);
    for (const GuardedBuffer* buffer : {&x, &wanted_x, &codes, &wanted_codes}) {
        buffer->check_guards(tally);
    }
}

// The first rows alone, which the kernel for few rows may take, and among many.
void compare_alone(Group& group, const Mlp& mlp_case, int alone, int many, bool rounded) {
    const int64_t row_bytes = static_cast<int64_t>(mlp_case.channels) * 2;
    const auto before = random_stream(Type::kHalf, many, mlp_case.channels, next_seed());
    GuardedBuffer x(alone * row_bytes), all(many * row_bytes);
    copy_in(x, before.get(), alone * row_bytes);
    copy_in(all, before.get(), many * row_bytes);
    const std::string label = "m " + std::to_string(alone) + " among " + std::to_string(many) +
                              " channels " + std::to_string(mlp_case.channels) +
                              (rounded ? " rounded" : "");
    Tally* tally = group.run(label, exact(), [&] {
        mlp(mlp_case.fused(x.get(), alone, rounded), nullptr);
        mlp(mlp_case.fused(all.get(), many, rounded), nullptr);
    });
    if (tally) compare_bits(x.get(), all.get(), alone * row_bytes, 2, tally);
}

}  // namespace

void mlp_suite(Report& report) {
    const bool quick = report.options().quick;
    const int few = few_rows();
    // here some of the warpgroups of a block have a second tile
    const int two_rounds = multiprocessors() * kWarpgroups * kRows + 1;
    report.group("fused mlp", 200, [&](Group& group) {
        for (int channels : {96, 128, 192, 256, 384, 512, 768}) {
            if (!mlp_supported(channels, 4 * channels)) continue;
            const Mlp mlp_case(channels, 4 * channels);
            std::vector<int> rows = {1,   17,  49,   64,    65,  127,     128,       129,
                                     300, 784, 3136, 25088, few, few + 1, two_rounds};
            if (quick) rows = {65, few + 1};
            if (quick && channels == 96) rows = {1, 17, 49, 64, 65, 127, 128, 129, few + 1};
            for (int m : rows) {
                for (bool rounded : {false, true}) compare_mlp(group, mlp_case, m, rounded);
            }
            // with these channels the weights go round in a ring
            if (quick && channels == 192) compare_mlp(group, mlp_case, two_rounds, true);
        }
        if (!mlp_supported(96, 384)) group.check(true, "no fused MLP on this GPU", "");
    });
    report.group("fused mlp of v2", 200, [&](Group& group) {
        for (int channels : {96, 128, 192}) {
            if (!mlp_supported(channels, 4 * channels)) continue;
            const Mlp mlp_case(channels, 4 * channels);
            std::vector<int> rows = {1, 17, 64, 65, 127, 300, 4096, 32768, few + 1, two_rounds};
            if (quick) rows = {1, 65, channels == 192 ? two_rounds : few + 1};
            for (int m : rows) {
                for (bool rounded : {false, true}) {
                    for (bool next : {false, true}) compare_v2(group, mlp_case, m, rounded, next);
                }
            }
        }
        if (!mlp_supported(96, 384)) group.check(true, "no fused MLP on this GPU", "");
    });
    report.group("same bits, fused mlp", 40, [&](Group& group) {
        for (int channels : {96, 128, 192}) {
            if (!mlp_supported(channels, 4 * channels)) continue;
            const Mlp mlp_case(channels, 4 * channels);
            if (quick) {
                compare_alone(group, mlp_case, 49, few + 1, true);
                continue;
            }
            for (int alone : {1, 49, 784, 3136}) {
                for (bool rounded : {false, true}) {
                    compare_alone(group, mlp_case, alone, 50176, rounded);
                }
            }
        }
        if (!mlp_supported(96, 384)) group.check(true, "no fused MLP on this GPU", "");
    });
}

}  // namespace swinq::testing

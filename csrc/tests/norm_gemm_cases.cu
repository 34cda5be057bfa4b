// GEMMs with a LayerNorm in their epilogue: what the separate kernels' equations give.
#include <set>

#include "gemm_problem.h"
#include "norm_problem.h"

namespace swinq::testing {

namespace {

constexpr float kEps = 1e-5f;

class NormedProblem {
  public:
    NormedProblem(int m, int n, int k)
        : gemm_(Type::kHalf, m, n, k),
          gamma_(random_array<float>(n, next_seed(), 0.5f, 1.5f)),
          beta_(random_array<float>(n, next_seed(), -0.5f, 0.5f)),
          inverse_(random_array<float>(n, next_seed(), 20, 60)),
          x_(static_cast<int64_t>(m) * n * 2),
          operand_(static_cast<int64_t>(m) * n * 2),
          y_(static_cast<int64_t>(m) * n * 4),
          exact_(static_cast<int64_t>(m) * n),
          plain_(static_cast<int64_t>(m) * n) {
        set_some(inverse_.get(), n, next_seed(), 5, 16);
        gemm_.make(m, n, k, Data::kOrdinary);
    }

    void run(Group& group, Output output, int rows) {
        const int n = gemm_.n();
        const int64_t count = static_cast<int64_t>(rows) * n;
        const bool adds = output == Output::kResidual;
        prepare(count, adds);
        GemmArguments g = gemm_.arguments(Activation::kNone, output, rows, x_.get());
        g.has_norm = true, g.norm_gamma = gamma_.get(), g.norm_beta = beta_.get();
        g.norm_eps = kEps, g.norm_operand = operand_.as<int8_t>();
        g.norm_inverse = inverse_.get();
        operand_.poison(count);
        const std::string label =
            std::string(adds ? "residual " : "stream ") + describe(gemm_, rows, nullptr);
        Tally* x_tally = group.run(label, values(0x1p-16), [&] { gemm(g, nullptr, nullptr); });
        if (!x_tally) return;
        // y itself by the GEMM without a norm, which other groups judge
        gemm(gemm_.arguments(Activation::kNone, Output::kFloat, rows, y_.get()), nullptr, nullptr);
        plain_layernorm({Type::kFloat, y_.get(), nullptr, rows, n, false, 1}, gamma_.get(),
                        beta_.get(), kEps, exact_.get(), plain_.get());
        compare(x_.get(), {Type::kHalf, nullptr, nullptr, adds ? gemm_.before() : nullptr},
                {exact_.get(), plain_.get(), rows, n}, false, x_tally);
        x_.check_guards(x_tally);
        operand_.check_guards(x_tally);
        Tally* tally = group.run(label + ", codes of the stored x", exact(), [] {});
        compare_requantized(operand_.as<int8_t>(), Type::kHalf, x_.get(), inverse_.get(), rows, n,
                            tally);
    }

  private:
    void prepare(int64_t count, bool adds) {
        x_.poison(count * 2);
        if (!adds) return;
        must(cudaMemcpyAsync(x_.get(), gemm_.before(), count * 2, cudaMemcpyDeviceToDevice),
             "copy of the stream");
    }

    GemmProblem gemm_;
    DeviceArray<float> gamma_, beta_, inverse_;  // (n)
    GuardedBuffer x_, operand_, y_;              // (m, n)
    DeviceArray<double> exact_;
    DeviceArray<float> plain_;
};

void normed(Group& group, bool quick) {
    const int widths[] = {96, 128, 192, 256, 384, 512, 768, 1024, 1536};
    bool any = false;
    for (int n : widths) {
        if (!can_normalize(Type::kHalf, n)) continue;
        any = true;
        const bool few = quick && n != 96 && n != 384;
        for (int k : {n, 4 * n}) {
            if (few && k > n) continue;
            const int most = quick ? 129 : 16 * 1024 * 96 / n;
            NormedProblem problem(most, n, k);
            for (int rows : few ? std::set<int>{1, 129} : std::set<int>{1, 49, 64, 129, most}) {
                for (Output output : {Output::kResidual, Output::kStream}) {
                    problem.run(group, output, rows);
                }
            }
        }
    }
    if (!any) group.check(true, "no such kernel on this GPU", "");
}

// The tiles of 128 rows, which the kernel takes as soon as they give every multiprocessor a block;
// the last has one row. Those of 96 and of 128 columns, four a cluster.
void tall(Group& group, bool quick) {
    constexpr int kRows = 128, kTilesAcross = 4, kDepth = 32;
    const int m = static_cast<int>(ceil_div(multiprocessors(), kTilesAcross) - 1) * kRows + 1;
    for (int n : {kTilesAcross * 96, kTilesAcross * 128}) {
        if (!can_normalize(Type::kHalf, n)) continue;
        NormedProblem problem(m, n, kDepth);
        problem.run(group, Output::kResidual, m);
        if (!quick) problem.run(group, Output::kStream, m);
    }
}

}  // namespace

void norm_gemm_suite(Report& report) {
    const bool quick = report.options().quick;
    report.group("gemm half with a norm", 4000, [&](Group& g) {
        normed(g, quick);
        tall(g, quick);
    });
}

}  // namespace swinq::testing

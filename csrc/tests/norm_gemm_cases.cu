// GEMMs with a LayerNorm in their epilogue: what the separate kernels' equations give.
#include "gemm_problem.h"
#include "norm_problem.h"

namespace swinq::testing {

namespace {

constexpr float kEps = 1e-5f;

class NormedProblem {
  public:
    NormedProblem(Type operand, int m, int n, int k)
        : gemm_(operand, m, n, k),
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

    void run(Group& group, Norm norm, Output output, bool rounded, Type norm_type, int rows) {
        const int n = gemm_.n();
        const int64_t count = static_cast<int64_t>(rows) * n;
        const bool adds = output == Output::kResidual, before = norm == Norm::kBefore;
        const bool codes = norm_type == Type::kInt8;
        prepare(count, adds);
        GemmArguments g = gemm_.arguments(Activation::kNone, output, rows, x_.get(), rounded);
        g.norm = norm, g.norm_gamma = gamma_.get(), g.norm_beta = beta_.get(), g.norm_eps = kEps;
        g.norm_operand = operand_.get(), g.norm_type = norm_type;
        g.norm_inverse = codes ? inverse_.get() : nullptr;
        operand_.poison(count * size_of(norm_type));
        const std::string label = std::string(before ? "norm of x, " : "norm of y, ") +
                                  (adds ? "residual " : "stream ") + (rounded ? "rounded " : "") +
                                  describe(gemm_, rows, nullptr);
        const bool exact_sums = gemm_.operand() == Type::kInt8;
        const Bound numbers = values(0x1p-16);
        Tally* x_tally = group.run(label, before && exact_sums ? exact() : numbers,
                                   [&] { gemm(g, nullptr, nullptr); });
        if (!x_tally) return;
        const Step step = {Type::kHalf, g.out_inverse, g.out_scale,
                           adds ? gemm_.before() : nullptr};
        if (before) {
            compare(x_.get(), step, gemm_.expected(Activation::kNone, rows), exact_sums, x_tally);
            normalize({Type::kHalf, x_.get(), nullptr, rows, n, false, 1});
        } else {
            // y itself, or its codes, by the GEMM without a norm, which other groups judge
            GemmArguments plain = gemm_.arguments(
                Activation::kNone, rounded ? Output::kCodes : Output::kFloat, rows, y_.get());
            gemm(plain, nullptr, nullptr);
            normalize(
                {rounded ? Type::kInt8 : Type::kFloat, y_.get(), gemm_.scale(), rows, n, false, 1});
            compare(x_.get(), {Type::kHalf, nullptr, nullptr, step.before}, normalized(rows), false,
                    x_tally);
        }
        x_.check_guards(x_tally);
        operand_.check_guards(x_tally);
        if (!before) {
            Tally* tally = group.run(label + ", codes of the stored x", exact(), [] {});
            compare_requantized(operand_.as<int8_t>(), Type::kHalf, x_.get(), inverse_.get(), rows,
                                n, tally);
            return;
        }
        Tally* tally = group.run(label + ", its operand", codes ? kRareCodes : numbers, [] {});
        compare(operand_.get(), {norm_type, g.norm_inverse}, normalized(rows), false, tally);
    }

  private:
    void prepare(int64_t count, bool adds) {
        x_.poison(count * 2);
        if (!adds) return;
        must(cudaMemcpyAsync(x_.get(), gemm_.before(), count * 2, cudaMemcpyDeviceToDevice),
             "copy of the stream");
    }
    void normalize(const Rows& rows) {
        plain_layernorm(rows, gamma_.get(), beta_.get(), kEps, exact_.get(), plain_.get());
    }
    Expected normalized(int rows) const { return {exact_.get(), plain_.get(), rows, gemm_.n()}; }

    GemmProblem gemm_;
    DeviceArray<float> gamma_, beta_, inverse_;  // (n)
    GuardedBuffer x_, operand_, y_;              // (m, n)
    DeviceArray<double> exact_;
    DeviceArray<float> plain_;
};

void normed(Group& group, Type operand, bool quick) {
    const int widths[] = {96, 128, 192, 256, 384, 512, 768, 1024, 1536};
    bool any = false;
    for (int n : widths) {
        if (!can_normalize(operand, n)) continue;
        any = true;
        if (quick && n != 96 && n != 384) continue;
        for (int k : {n, 4 * n}) {
            const int most = quick ? 129 : 16 * 1024 * 96 / n;
            NormedProblem problem(operand, most, n, k);
            for (int rows : {1, 49, 64, 129, most}) {
                for (Output output : {Output::kResidual, Output::kStream}) {
                    for (bool rounded : {false, true}) {
                        if (rounded && operand != Type::kInt8) continue;
                        problem.run(group, Norm::kBefore, output, rounded, Type::kInt8, rows);
                        problem.run(group, Norm::kBefore, output, rounded, Type::kHalf, rows);
                        problem.run(group, Norm::kAfter, output, rounded, Type::kInt8, rows);
                    }
                }
            }
        }
    }
    if (!any) group.check(true, "no such kernel on this GPU", "");
}

}  // namespace

void norm_gemm_suite(Report& report) {
    const bool quick = report.options().quick;
    report.group("gemm int8 with a norm", 4000, [&](Group& g) { normed(g, Type::kInt8, quick); });
    report.group("gemm half with a norm", 4000, [&](Group& g) { normed(g, Type::kHalf, quick); });
}

}  // namespace swinq::testing

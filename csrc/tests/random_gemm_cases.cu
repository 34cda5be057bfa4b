// GEMMs of random shapes, epilogues and tiles: as many as --random asks for.
#include <random>

#include "gemm_problem.h"

namespace swinq::testing {

namespace {

constexpr int kRows = 700, kColumns = 1600, kDepth = 3200;

struct Kind {
    Type operand;
    Activation activation;
    std::vector<Output> outputs;
    Bound bound;
};

void random_shapes(Group& group, const Kind& kind, int count) {
    GemmProblem problem(kind.operand, kRows, kColumns, kDepth);
    GuardedBuffer out(static_cast<int64_t>(kRows) * kColumns * 4);
    std::mt19937 random(count);
    auto below = [&random](int limit) { return static_cast<int>(random() % limit); };
    const int step = kind.activation == Activation::kNormalize ? 96 : 8;
    for (int i = 0; i < count; ++i) {
        const int rows = 1 + below(kRows);
        Data data = Data::kOrdinary;
        if (i % 16 == 0) data = Data::kExtreme;
        if (i % 16 == 1 && kind.activation == Activation::kNone) data = Data::kHalfway;
        if (i % 4 == 2 && kind.activation == Activation::kNone) data = Data::kAccumulator;
        problem.make(rows, step * (1 + below(kColumns / step)), 16 * (1 + below(kDepth / 16)),
                     data);
        const Output output = data == Data::kAccumulator
                                  ? Output::kFloat
                                  : kind.outputs[below(static_cast<int>(kind.outputs.size()))];
        const bool adds = output == Output::kResidual || output == Output::kStream;
        const bool rounded = adds && kind.operand == Type::kInt8 && below(2);
        const auto tiles =
            tiles_for(problem.arguments(kind.activation, output, rows, out.get(), rounded));
        const int choice = below(static_cast<int>(tiles.size()) + 1);
        const GemmTile* tile = choice ? &tiles[choice - 1] : nullptr;
        run_gemm(group,
                 "output " + std::to_string(static_cast<int>(output)) + " " +
                     describe(problem, rows, tile),
                 problem, kind.activation, output, rounded, rows, tile, kind.bound, out);
    }
}

}  // namespace

void random_gemm_suite(Report& report) {
    const int count = report.options().random;
    if (count == 0) return;
    const int fewer = count / 20 + 1;
    const std::vector<Output> numbers = {Output::kHalf, Output::kFloat, Output::kResidual,
                                         Output::kStream};
    std::vector<Output> all = numbers;
    all.push_back(Output::kCodes);
    auto run = [&report](const std::string& name, const Kind& kind, int cases) {
        report.group(name, cases, [&](Group& group) { random_shapes(group, kind, cases); });
    };
    run("random gemm int8", {Type::kInt8, Activation::kNone, all, exact()}, count);
    run("random gemm int8, gelu",
        {Type::kInt8, Activation::kGelu, {Output::kCodes}, kApproximatedCodes}, fewer);
    run("random gemm int8, normalize",
        {Type::kInt8, Activation::kNormalize, {Output::kCodes}, kRareCodes}, fewer);
    run("random gemm half", {Type::kHalf, Activation::kNone, numbers, values(0x1p-16)}, fewer);
    run("random gemm float",
        {Type::kFloat,
         Activation::kNone,
         {Output::kFloat, Output::kResidual, Output::kStream},
         values(0x1p-17)},
        fewer);
}

}  // namespace swinq::testing

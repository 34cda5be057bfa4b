// GEMMs: every layer shape, tile, activation and output against the plain product.
#include <algorithm>
#include <map>
#include <set>

#include "gemm_problem.h"
#include "kernels/gemm_wgmma_split.cuh"

namespace swinq::testing {

namespace {

struct Shape {
    int n, k;
    std::set<int> rows;
};

// Layers of all official models: (n, k), and the rows that one image gives them.
std::vector<Shape> layer_shapes(bool quick) {
    if (quick) {
        return {{288, 96, {1, 17, 129}},
                {96, 384, {17, 65}},
                {40, 48, {49}},
                {192, 208, {130}},
                {40, 896, {49}}};  // more slabs than any tile has stages
    }
    std::map<std::pair<int, int>, std::set<int>> shapes;
    auto add = [&shapes](int n, int k, int tokens) {
        shapes[{n, k}].insert({1, 17, 49, 127, 129, tokens});
    };
    for (int embed_dim : {96, 128, 192}) {
        for (int img_size : {192, 224, 256, 384}) {
            for (int stage = 0; stage < 4; ++stage) {
                const int c = embed_dim << stage, side = img_size / 4 >> stage;
                add(3 * c, c, side * side);                         // qkv
                add(c, c, side * side);                             // proj
                add(4 * c, c, side * side);                         // fc1
                add(c, 4 * c, side * side);                         // fc2
                if (stage < 3) add(2 * c, 4 * c, side * side / 4);  // reduction
                if (embed_dim == 96) {  // heads of 24 channels, padded to 32
                    add(4 * c, c, side * side);
                    add(c, c / 3 * 4, side * side);
                }
            }
        }
    }
    std::vector<Shape> list;
    for (const auto& [key, rows] : shapes) list.push_back({key.first, key.second, rows});
    return list;
}

void layers(Group& group, Type operand, bool quick) {
    const bool integers = operand == Type::kInt8;
    for (const Shape& shape : layer_shapes(quick)) {
        const int most = *shape.rows.rbegin();
        GemmProblem problem(operand, most, shape.n, shape.k);
        GuardedBuffer out(static_cast<int64_t>(most) * shape.n * 4);
        for (Data data : {Data::kAccumulator, Data::kOrdinary}) {
            if (data == Data::kAccumulator && !integers) continue;
            problem.make(most, shape.n, shape.k, data);
            const bool sums = data == Data::kAccumulator || operand == Type::kFloat;
            const Output output = sums ? Output::kFloat : integers ? Output::kCodes : Output::kHalf;
            // fp32 sums of tensor cores are cut, not rounded, so their last bits are worth less
            const Bound bound = integers                 ? exact()
                                : operand == Type::kHalf ? values(0x1p-16)
                                                         : values(0x1p-17);
            for (int rows : shape.rows) {
                auto tiles =
                    tiles_for(problem.arguments(Activation::kNone, output, rows, out.get()));
                const bool all = integers || rows == 129 || rows == most || quick;
                if (!all) tiles.clear();
                for (const GemmTile& tile : tiles) {
                    run_gemm(group, describe(problem, rows, &tile), problem, Activation::kNone,
                             output, false, rows, &tile, bound, out);
                }
                run_gemm(group, describe(problem, rows, nullptr), problem, Activation::kNone,
                         output, false, rows, nullptr, bound, out);
            }
        }
    }
}

struct Combination {
    Activation activation;
    Output output;
    bool rounded;
    const char* name;
};

constexpr Combination kPlain[] = {
    {Activation::kNone, Output::kCodes, false, "codes"},
    {Activation::kNone, Output::kHalf, false, "half"},
    {Activation::kNone, Output::kFloat, false, "float"},
    {Activation::kNone, Output::kResidual, false, "residual"},
    {Activation::kNone, Output::kStream, false, "stream"},
};
constexpr Combination kRounded[] = {
    {Activation::kNone, Output::kResidual, true, "rounded residual"},
    {Activation::kNone, Output::kStream, true, "rounded stream"},
};
constexpr Combination kActivatedNumbers[] = {
    {Activation::kGelu, Output::kHalf, false, "gelu half"},
    {Activation::kGelu, Output::kFloat, false, "gelu float"},
    {Activation::kNormalize, Output::kHalf, false, "normalize half"},
    {Activation::kNormalize, Output::kFloat, false, "normalize float"},
};
constexpr Combination kGeluCodes[] = {{Activation::kGelu, Output::kCodes, false, "gelu codes"}};
constexpr Combination kNormalizedCodes[] = {
    {Activation::kNormalize, Output::kCodes, false, "normalize codes"}};

// Whether the engine needs the combination, so that its refusal is a failure.
bool needed(Type operand, const Combination& c) {
    if (operand == Type::kFloat) {
        return c.output != Output::kCodes && c.output != Output::kHalf && !c.rounded;
    }
    return c.activation == Activation::kNone || c.output != Output::kFloat;
}

// The tile that takes it, if there are as few tiles and as many slabs as it wants.
bool is_split_tile(const GemmTile& tile) {
    return tile.instruction == 1 && tile.rows == SplitTile::kRows &&
           tile.columns == SplitTile::kColumns;
}

template <size_t kCount>
void epilogues(Group& group, Type operand, const Combination (&combinations)[kCount],
               const Bound& bound, bool quick) {
    struct Size {
        int m, n, k;
        bool split = false;  // only the int8 kernel whose warpgroups split k
    };
    // of the split ones a warpgroup has two slabs, and four, for which its ring goes round
    std::vector<Size> sizes = {
        {1, 96, 96}, {129, 192, 208}, {49, 96, 912, true}, {17, 288, 1552, true}};
    if (!quick) {
        sizes.insert(sizes.end(), {{49, 288, 96},
                                   {127, 1000, 768},
                                   {333, 40, 48},
                                   {64, 8, 16},
                                   {300, 1536, 384},
                                   {784, 576, 192},
                                   {130, 104, 1024},
                                   {8449, 776, 208}});  // several tiles a block
    }
    for (const Size& size : sizes) {
        if (size.split && operand != Type::kInt8) continue;
        GemmProblem problem(operand, size.m, size.n, size.k);
        GuardedBuffer out(static_cast<int64_t>(size.m) * size.n * 4);
        for (Data data : {Data::kOrdinary, Data::kHalfway, Data::kExtreme}) {
            if (data != Data::kOrdinary && operand != Type::kInt8) continue;
            if (data == Data::kExtreme && quick) continue;
            problem.make(size.m, size.n, size.k, data);
            for (const Combination& c : combinations) {
                // a norm that is not exact may leave the middle between two codes
                const bool normalized = c.activation == Activation::kNormalize;
                if (normalized && (size.n % 96 || data == Data::kHalfway)) continue;
                for (const GemmTile& tile : tiles_for(
                         problem.arguments(c.activation, c.output, size.m, out.get(), c.rounded))) {
                    if (size.split && !is_split_tile(tile)) continue;
                    const std::string label = std::string(data == Data::kExtreme   ? "extreme "
                                                          : data == Data::kHalfway ? "halfway "
                                                                                   : "") +
                                              c.name + " " + describe(problem, size.m, &tile);
                    run_gemm(group, label, problem, c.activation, c.output, c.rounded, size.m,
                             &tile, bound, out, !needed(operand, c));
                }
            }
        }
    }
}

// The classifier: one row an image, as many columns as there are classes.
void heads(Group& group, bool quick) {
    for (int n : {16, 1000, 21848}) {
        if (quick && n > 1000) continue;
        for (int k : {192, 768, 1024, 1536}) {
            if (quick && k > 192) continue;
            GemmProblem problem(Type::kHalf, 65, n, k);
            GuardedBuffer out(65 * static_cast<int64_t>(n) * 4);
            problem.make(65, n, k, Data::kOrdinary);
            for (int rows : {1, 3, 65}) {
                run_gemm(group, describe(problem, rows, nullptr), problem, Activation::kNone,
                         Output::kFloat, false, rows, nullptr, values(0x1p-16), out);
            }
        }
    }
}

}  // namespace

void gemm_suite(Report& report) {
    const bool quick = report.options().quick;
    report.group("gemm weight layout", 8, [](Group& group) {
        for (Type type : {Type::kInt8, Type::kHalf, Type::kFloat}) {
            std::vector<int> order = layout_order(type);
            std::sort(order.begin(), order.end());
            bool complete = order.size() == 32;
            for (size_t i = 0; complete && i < 32; ++i) complete = order[i] == static_cast<int>(i);
            group.check(complete, "type " + std::to_string(static_cast<int>(type)),
                        "each of 32 rows once, then rows of zeros");
        }
    });
    report.group("gemm int8, layers", 20000, [&](Group& g) { layers(g, Type::kInt8, quick); });
    report.group("gemm half, layers", 20000, [&](Group& g) { layers(g, Type::kHalf, quick); });
    report.group("gemm float, layers", 20000, [&](Group& g) { layers(g, Type::kFloat, quick); });
    report.group("gemm half, classifier", 64, [&](Group& g) { heads(g, quick); });

    report.group("gemm int8, every output", 4000, [&](Group& g) {
        epilogues(g, Type::kInt8, kPlain, exact(), quick);
        epilogues(g, Type::kInt8, kRounded, exact(), quick);
    });
    report.group("gemm int8, gelu codes", 1000, [&](Group& g) {
        epilogues(g, Type::kInt8, kGeluCodes, kApproximatedCodes, quick);
    });
    report.group("gemm int8, normalize codes", 1000,
                 [&](Group& g) { epilogues(g, Type::kInt8, kNormalizedCodes, kRareCodes, quick); });
    report.group("gemm int8, activated numbers", 2000, [&](Group& g) {
        epilogues(g, Type::kInt8, kActivatedNumbers, values(0x1p-19), quick);
    });
    report.group("gemm half, every number", 4000, [&](Group& g) {
        constexpr Combination kNumbers[] = {kPlain[1], kPlain[2], kPlain[3], kPlain[4]};
        epilogues(g, Type::kHalf, kNumbers, values(0x1p-16), quick);
        epilogues(g, Type::kHalf, kActivatedNumbers, values(0x1p-16), quick);
    });
    report.group("gemm half, codes", 1000, [&](Group& g) {
        // sums in fp32 have no fixed order, so some codes fall the other way
        constexpr Combination kCodes[] = {kPlain[0]};
        epilogues(g, Type::kHalf, kCodes, kRareCodes, quick);
        epilogues(g, Type::kHalf, kGeluCodes, kApproximatedCodes, quick);
        epilogues(g, Type::kHalf, kNormalizedCodes, kRareCodes, quick);
    });
    report.group("gemm float, every number", 4000, [&](Group& g) {
        constexpr Combination kNumbers[] = {kPlain[2], kPlain[3], kPlain[4]};
        epilogues(g, Type::kFloat, kNumbers, values(0x1p-17), quick);
        epilogues(g, Type::kFloat, kActivatedNumbers, values(0x1p-17), quick);
    });
}

}  // namespace swinq::testing

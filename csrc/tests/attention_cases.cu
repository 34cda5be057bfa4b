// Attention: every window, shift, number of heads and pair of types against the plain one.
#include <cmath>

#include "attention_problem.h"
#include "norm_problem.h"

namespace swinq::testing {

namespace {

// Windows that no kernel is made for: one token, a part of a tile of queries, several blocks of
// them.
constexpr int kOtherWindows[] = {1, 2, 3, 5, 10, 14};

// What the official models have, every number of heads up to 24 for the commonest window, and
// windows of other models.
std::vector<AttentionSize> sizes(bool quick) {
    std::vector<AttentionSize> list;
    if (quick) {
        for (int window : {4, 6, 7, 8}) {
            list.push_back({1, window, window, 0, 2});
            list.push_back({1, 2 * window, window, window / 2, 1});
        }
        list.insert(list.end(), {{1, 24, 12, 6, 1}, {1, 32, 16, 8, 1}, {1, 24, 24, 0, 1}});
        for (int window : kOtherWindows) {
            if (window < 10) list.push_back({1, window, window, 0, 2});
            list.push_back({1, 2 * window, window, window / 2, 1});
        }
        return list;
    }
    for (int window : {4, 6, 7, 8, 12, 16, 24}) {
        for (int batch : {1, 3}) {
            for (int heads : {1, 3, 4, 8, 24}) {
                list.push_back({batch, window, window, 0, heads});
                list.push_back({batch, 2 * window, window, 0, heads});
                list.push_back({batch, 2 * window, window, window / 2, heads});
            }
        }
        list.push_back({1, 4 * window, window, window / 2, 2});
        list.push_back({1, 3 * window, window, 1, 5});
    }
    for (int window : kOtherWindows) {
        list.push_back({1, window, window, 0, 3});
        list.push_back({3, 2 * window, window, window / 2, 4});
        list.push_back({1, 3 * window, window, window > 1 ? 1 : 0, 1});
    }
    for (int heads = 1; heads <= 24; ++heads) list.push_back({2, 14, 7, 3, heads});
    list.insert(list.end(), {{1, 56, 7, 3, 3},
                             {2, 56, 7, 0, 6},
                             {1, 64, 8, 4, 4},
                             {1, 7, 7, 0, 48},
                             {5, 8, 8, 0, 32},
                             {1, 96, 12, 6, 4},
                             {1, 64, 16, 8, 3}});
    return list;
}

void compare_all(Group& group, Type type, Type out_type, Logits logits, const Bound& bound,
                 bool quick) {
    int number = 0;
    for (const AttentionSize& size : sizes(quick)) {
        // the other logits need no second batch
        if (logits != Logits::kOrdinary && number++ % 3 && !quick) continue;
        AttentionProblem problem(type, size, logits);
        const int64_t bytes = problem.tokens() * problem.columns() * size_of(out_type);
        GuardedBuffer out(bytes);
        out.poison(bytes);
        const AttentionArguments arguments = problem.arguments(out_type, out.get());
        Tally* tally = group.run(describe(size), bound, [&] { attention(arguments, nullptr); });
        if (!tally) continue;
        compare(out.get(), {out_type, arguments.out_inverse}, problem.expected(), true, tally);
        out.check_guards(tally);
    }
}

// One number of q, k or v of the second of three images; the outputs are codes, which hide NaN.
void bad_operands(Group& group, Type type) {
    constexpr int kHeads = 2, kColumns = kHeads * kHeadDim;
    const AttentionSize sizes[] = {{3, 14, 7, 3, kHeads},  {3, 8, 8, 0, kHeads},
                                   {3, 12, 12, 0, kHeads}, {3, 32, 16, 8, kHeads},
                                   {3, 24, 24, 0, kHeads}, {3, 10, 5, 2, kHeads}};
    for (const AttentionSize& size : sizes) {
        const int64_t tokens = static_cast<int64_t>(size.resolution) * size.resolution;
        AttentionProblem problem(type, size, Logits::kOrdinary);
        GuardedBuffer out(3 * tokens * kColumns);
        AttentionArguments a = problem.arguments(Type::kInt8, out.get());
        for (float value : {0.5f, std::nanf(""), INFINITY, -INFINITY}) {
            for (int part = 0; part < 3; ++part) {
                for (int64_t token : {int64_t{0}, tokens / 2 + 1, tokens - 1}) {
                    const int64_t row = (tokens + token) * 3 + part;
                    const int64_t index = row * kColumns + (7 * token + 31 * part) % kColumns;
                    DeviceArray<int> status(std::vector<int>(3, 0));
                    a.status = status.get();
                    plant(type, const_cast<void*>(a.qkv), index, value);
                    const std::string label = describe(size) + " " + std::to_string(value) +
                                              " in " + "qkv"[part] + " of token " +
                                              std::to_string(token);
                    const bool ran = group.attempt(label, [&] { attention(a, nullptr); });
                    plant(type, const_cast<void*>(a.qkv), index, 0.5f);
                    if (!ran) continue;
                    const int wanted = !std::isfinite(value);
                    group.check(status.read() == std::vector<int>({0, wanted, 0}), label,
                                "a status of 1 for the image if it is not finite, else 0");
                }
            }
        }
    }
}

}  // namespace

void attention_suite(Report& report) {
    const bool quick = report.options().quick;
    struct Kind {
        const char* name;
        Type type, out_type;
        Bound bound;
    };
    // A probability one code off moves an output by v_scale (1/64) at the most.
    const Kind kinds[] = {
        {"int8 to int8", Type::kInt8, Type::kInt8, kApproximatedCodes},
        {"int8 to half", Type::kInt8, Type::kHalf, values(0x1p-12, 1 / 64.0)},
        {"half to half", Type::kHalf, Type::kHalf, values(0x1p-14)},
        {"half to int8", Type::kHalf, Type::kInt8, kApproximatedCodes},
        {"float to float", Type::kFloat, Type::kFloat, values(0x1p-17)},
    };
    struct Input {
        Logits logits;
        const char* name;
    };
    const Input inputs[] = {
        {Logits::kOrdinary, ""},
        {Logits::kSharp, ", logit scale 100"},
        {Logits::kEqual, ", equal logits"},
        {Logits::kBiased, ", biases of 100"},
    };
    for (const Kind& kind : kinds) {
        for (const Input& input : inputs) {
            report.group(
                std::string("attention ") + kind.name + input.name, 400, [&](Group& group) {
                    compare_all(group, kind.type, kind.out_type, input.logits, kind.bound, quick);
                });
        }
    }
    report.group("non-finite half attention", 200,
                 [](Group& group) { bad_operands(group, Type::kHalf); });
    report.group("non-finite float attention", 200,
                 [](Group& group) { bad_operands(group, Type::kFloat); });
}

}  // namespace swinq::testing

// Attention: every window, shift, number of heads and pair of types against the plain one.
#include "attention_problem.h"

namespace swinq::testing {

namespace {

// What the official models have, and every number of heads up to 24 for the commonest window.
std::vector<AttentionSize> sizes(bool quick) {
    std::vector<AttentionSize> list;
    if (quick) {
        for (int window : {4, 6, 7, 8}) {
            list.push_back({1, window, window, 0, 2});
            list.push_back({1, 2 * window, window, window / 2, 1});
        }
        list.insert(list.end(), {{1, 24, 12, 6, 1}, {1, 32, 16, 8, 1}, {1, 24, 24, 0, 1}});
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
}

}  // namespace swinq::testing

// Arguments that cannot be meant: each must be an Error with words, before anything is launched.
#include "attention_problem.h"
#include "gemm_problem.h"
#include "norm_problem.h"

namespace swinq::testing {

namespace {

template <typename Arguments, typename Change, typename Call>
void refuse(Group& group, const char* what, Arguments arguments, Change change, Call call) {
    change(arguments);
    group.expect_refusal(what, [&] { call(arguments); });
}

const void* odd(const void* pointer) {
    return static_cast<const uint8_t*>(pointer) + 1;
}

void gemms(Group& group) {
    GemmProblem problem(Type::kInt8, 16, 96, 96);
    problem.make(16, 96, 96, Data::kOrdinary);
    GuardedBuffer out(16 * 96 * 4);
    using G = GemmArguments;
    const G good = problem.arguments(Activation::kNone, Output::kCodes, 16, out.get());
    auto call = [](const G& g) { gemm(g, nullptr, nullptr); };
    refuse(group, "gemm m -1", good, [](G& g) { g.m = -1; }, call);
    refuse(group, "gemm n 0", good, [](G& g) { g.n = 0; }, call);
    refuse(group, "gemm n 12", good, [](G& g) { g.n = 12; }, call);
    refuse(group, "gemm k 40", good, [](G& g) { g.k = 40; }, call);
    refuse(group, "gemm k 0", good, [](G& g) { g.k = 0; }, call);
    refuse(group, "gemm null a", good, [](G& g) { g.a = nullptr; }, call);
    refuse(group, "gemm null out", good, [](G& g) { g.out = nullptr; }, call);
    refuse(group, "gemm odd a", good, [](G& g) { g.a = odd(g.a); }, call);
    refuse(group, "gemm odd w", good, [](G& g) { g.w = odd(g.w); }, call);
    refuse(group, "gemm null factor", good, [](G& g) { g.factor = nullptr; }, call);
    refuse(group, "gemm null inverse", good, [](G& g) { g.out_inverse = nullptr; }, call);
    refuse(
        group, "gemm normalize 4 heads",
        problem.arguments(Activation::kNormalize, Output::kCodes, 16, out.get()),
        [](G& g) { g.n = 64; }, call);
    const GemmTile wrong = {0, 17, 3};
    group.expect_refusal("gemm tile 17x3", [&] { gemm(good, &wrong, nullptr); });
}

void attentions(Group& group) {
    const AttentionProblem problem(Type::kInt8, {1, 14, 7, 3, 2}, Logits::kOrdinary);
    GuardedBuffer out(problem.tokens() * problem.columns());
    using A = AttentionArguments;
    const A good = problem.arguments(Type::kInt8, out.get());
    auto call = [](const A& a) { attention(a, nullptr); };
    refuse(group, "attention window 5", good, [](A& a) { a.window = 5; }, call);
    refuse(group, "attention window 0", good, [](A& a) { a.window = 0; }, call);
    refuse(group, "attention shift 7", good, [](A& a) { a.shift = 7; }, call);
    refuse(group, "attention shift -1", good, [](A& a) { a.shift = -1; }, call);
    refuse(group, "attention heads 0", good, [](A& a) { a.heads = 0; }, call);
    refuse(group, "attention batch -1", good, [](A& a) { a.batch = -1; }, call);
    refuse(group, "attention null qkv", good, [](A& a) { a.qkv = nullptr; }, call);
    refuse(group, "attention odd qkv", good, [](A& a) { a.qkv = odd(a.qkv); }, call);
    refuse(group, "attention null inverse", good, [](A& a) { a.out_inverse = nullptr; }, call);
}

void norms(Group& group) {
    const auto x = random_stream(Type::kHalf, 49, 96, next_seed());
    const auto vector = random_array<float>(4 * 96, next_seed(), 0.5f, 1.5f);
    DeviceArray<uint8_t> out(49 * 96 * 4);
    PrenormArguments pre = {};
    pre.stream = Type::kHalf, pre.operand = Type::kInt8, pre.x = x.get(), pre.out = out.get();
    pre.gamma = pre.beta = pre.inverse = vector.get(), pre.eps = 1e-5f;
    pre.batch = 1, pre.resolution = 7, pre.channels = 96;
    using P = PrenormArguments;
    auto prenorm_of = [](const P& p) { prenorm(p, nullptr); };
    refuse(group, "prenorm merges 7", pre, [](P& p) { p.merge = true; }, prenorm_of);
    refuse(group, "prenorm channels 90", pre, [](P& p) { p.channels = 90; }, prenorm_of);
    refuse(group, "prenorm null x", pre, [](P& p) { p.x = nullptr; }, prenorm_of);
    refuse(group, "prenorm no inverse", pre, [](P& p) { p.inverse = nullptr; }, prenorm_of);
    refuse(group, "prenorm stream int8", pre, [](P& p) { p.stream = Type::kInt8; }, prenorm_of);

    PostnormArguments post = {};
    post.y_type = Type::kFloat, post.stream = Type::kHalf, post.y = out.get();
    post.x = const_cast<uint8_t*>(x.get()), post.gamma = post.beta = vector.get();
    post.eps = 1e-5f, post.rows = 49, post.channels = 96;
    using Q = PostnormArguments;
    auto postnorm_of = [](const Q& p) { postnorm(p, nullptr); };
    refuse(group, "postnorm channels 90", post, [](Q& p) { p.channels = 90; }, postnorm_of);
    refuse(group, "postnorm null y", post, [](Q& p) { p.y = nullptr; }, postnorm_of);
    refuse(group, "postnorm no scale", post, [](Q& p) { p.y_type = Type::kInt8; }, postnorm_of);
    refuse(group, "postnorm null gamma", post, [](Q& p) { p.gamma = nullptr; }, postnorm_of);
}

}  // namespace

void refusal_suite(Report& report) {
    report.group("refusals", 8, [](Group& group) {
        gemms(group);
        attentions(group);
        norms(group);
    });
}

}  // namespace swinq::testing

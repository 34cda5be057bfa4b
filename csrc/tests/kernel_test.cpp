// kernel_test: every kernel on the GPU against plain computations; see the usage below.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <iterator>

#include "plants.h"
#include "testing.h"

namespace {

constexpr char kUsage[] =
    "usage: kernel_test [--filter TEXT] [--quick] [--random N] [--isolate] | --plant FAULT\n"
    "  --filter TEXT  only the groups of cases whose name has TEXT in it\n"
    "  --quick        few and small cases, for compute-sanitizer\n"
    "  --random N     N random GEMM shapes as well\n"
    "  --isolate      each suite in a process of its own, so that one crash ends only that\n"
    "  --plant FAULT  only a kernel with a fault that compute-sanitizer must find: out-of-bounds\n"
    "                 (memcheck), race (racecheck), sync (synccheck), uninitialised (initcheck)\n";

using swinq::testing::Options;
using swinq::testing::Report;
using Suite = void (*)(Report&);

constexpr Suite kSuites[] = {
    swinq::testing::gemm_suite,        swinq::testing::norm_gemm_suite,
    swinq::testing::attention_suite,   swinq::testing::norm_suite,
    swinq::testing::patch_embed_suite, swinq::testing::mlp_suite,
    swinq::testing::invariance_suite,  swinq::testing::refusal_suite,
    swinq::testing::random_gemm_suite,
};

int conclude(int passed, int failed) {
    std::printf("%d passed, %d failed\n", passed, failed);
    if (passed + failed == 0) std::printf("no group of cases matches the filter\n");
    return failed || passed == 0;
}

// Runs the suites in child processes, as a CUDA context does not survive a crash or a fork.
int run_isolated(const Options& options) {
    int failed = 0;
    for (Suite suite : kSuites) {
        const pid_t child = fork();
        if (child == 0) {
            Report report(options);
            suite(report);
            std::printf("%d passed, %d failed\n", report.passed(), report.failed());
            std::fflush(stdout);
            std::_Exit(report.failed() != 0);
        }
        int status = 1;
        if (child < 0 || waitpid(child, &status, 0) < 0 || status != 0) ++failed;
    }
    std::printf("%d of %zu suites failed\n", failed, std::size(kSuites));
    return failed != 0;
}

}  // namespace

int main(int argc, char** argv) {
    Options options;
    bool isolated = false;
    for (int i = 1; i < argc; ++i) {
        const std::string argument = argv[i];
        const char* value = i + 1 < argc ? argv[i + 1] : nullptr;
        if (argument == "--help") {
            std::printf("%s", kUsage);
            return 0;
        } else if (argument == "--quick") {
            options.quick = true;
        } else if (argument == "--isolate") {
            isolated = true;
        } else if (argument == "--filter" && value) {
            options.filter = argv[++i];
        } else if (argument == "--random" && value && std::atoi(value) > 0) {
            options.random = std::atoi(argv[++i]);
        } else if (argument == "--plant" && value) {
            if (swinq::testing::run_plant(argv[++i])) return 0;
            std::fprintf(stderr, "--plant: no fault %s\n%s", argv[i], kUsage);
            return 2;
        } else {
            std::fprintf(stderr, "error: %s is no option, or its value is missing\n%s", argv[i],
                         kUsage);
            return 2;
        }
    }
    if (isolated) return run_isolated(options);
    Report report(options);
    for (Suite suite : kSuites) suite(report);
    return conclude(report.passed(), report.failed());
}

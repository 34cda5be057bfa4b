// A small test framework: groups of cases, each judged by tallies that kernels filled on the
// device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/types.h"

namespace swinq::testing {

// What a comparison found in one case; on the device until the group is judged.
struct Tally {
    unsigned long long count;       // elements compared
    unsigned long long differing;   // other bits, or another code
    unsigned long long beyond;      // codes more than one apart; numbers that are NaN, infinite, or
                                    // further apart than a code that turned explains
    unsigned long long damaged;     // bytes around an output that did not keep their value
    long long signed_sum;           // of code - expected code
    double squares, plain_squares;  // of errors against float64, ours and the plain computation's
    // The largest ones, and the largest true value, as bits of non-negative doubles.
    unsigned long long worst, plain_worst, largest;
};

// What a case must keep to.
struct Bound {
    enum Kind { kExact, kCodes, kValues };
    Kind kind;
    double fraction;  // kCodes: of codes that may be one off
    double mean;      // kCodes: of the signed error in codes
    double relative;  // kValues: beside twice the plain error, this times the largest value
    double absolute;  // kValues: and this; kCodes: codes of a case that may be off beside these
};

constexpr Bound exact() {
    return {Bound::kExact, 0, 0, 0, 0};
}
constexpr Bound codes(double fraction, double mean, double more = 0) {
    return {Bound::kCodes, fraction, mean, 0, more};
}
constexpr Bound values(double relative, double absolute = 0) {
    return {Bound::kValues, 0, 0, relative, absolute};
}

constexpr Bound kRareCodes = codes(1e-4, 0.01);          // equal but for sums of floats
constexpr Bound kApproximatedCodes = codes(0.02, 0.01);  // behind GELU or exp

struct Options {
    std::string filter;  // part of a group's name
    bool quick = false;  // few and small cases: compute-sanitizer is 100 times slower
    int random = 0;      // random GEMM shapes
};

// One line of the report. Every case has a tally and a bound; `judge` reads all tallies back.
class Group {
  public:
    Group(std::string name, int capacity);
    ~Group();
    Group(const Group&) = delete;
    Group& operator=(const Group&) = delete;

    // Enqueues a case once the one before has ended, so that a crash is blamed on the right one,
    // and returns its tally. Null after an Error, which fails the case; with `optional`,
    // Error::kUnsupported only counts as refused.
    Tally* run(const std::string& label, const Bound& bound, const std::function<void()>& launch,
               bool optional = false);
    // The same for a case that `check` judges.
    bool attempt(const std::string& label, const std::function<void()>& launch,
                 bool optional = false);
    // Fails unless `launch` throws an Error other than kCuda.
    void expect_refusal(const std::string& label, const std::function<void()>& launch);
    void check(bool holds, const std::string& label, const std::string& wanted);

    void judge();
    int passed() const { return passed_; }
    int failed() const { return failed_; }

  private:
    struct Case {
        std::string label;
        Bound bound;
    };
    void fail(const std::string& label, const std::string& reason);
    void settle(const Case& item, const Tally& tally);

    std::string name_, last_ = "before the first case";
    std::vector<Case> cases_;
    Tally* tallies_ = nullptr;
    int capacity_;
    int passed_ = 0, failed_ = 0, refused_ = 0;
    double share_ = 0;  // largest share that a case used of what its bound allows
    unsigned long long compared_ = 0, differing_ = 0;
    double codes_ = 0, codes_off_ = 0, signed_sum_ = 0;  // of the cases bounded by kCodes
};

class Report {
  public:
    explicit Report(Options options) : options_(std::move(options)) {}
    const Options& options() const { return options_; }

    // Runs one group if the filter wants it.
    void group(const std::string& name, int capacity, const std::function<void(Group&)>& run);
    int passed() const { return passed_; }
    int failed() const { return failed_; }

  private:
    Options options_;
    int passed_ = 0, failed_ = 0;
};

// Waits for the device; after a CUDA error or a minute without an end says where and ends the
// process, as nothing can run on it any more.
void synchronize(const std::string& where);

// A failure of the test program itself ends it.
void must(cudaError_t status, const char* what);

// The suites, a file each.
void gemm_suite(Report& report);
void random_gemm_suite(Report& report);
void norm_gemm_suite(Report& report);
void attention_suite(Report& report);
void norm_suite(Report& report);
void patch_embed_suite(Report& report);
void mlp_suite(Report& report);
void invariance_suite(Report& report);
void refusal_suite(Report& report);

}  // namespace swinq::testing

// Judging the cases of a group and printing its line.
#include "testing.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace swinq::testing {

namespace {

constexpr int kShownFailures = 8;  // of a group

double as_double(unsigned long long bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

std::string number(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.3g", value);
    return text;
}

// What `fraction` of `count` codes may come to; few codes may have some more by chance.
double allowed_codes(double fraction, double count) {
    return fraction * count + 4 * std::sqrt(fraction * count) + 2;
}

[[noreturn]] void stop(const std::string& where, const std::string& what) {
    std::printf("%s: %s; nothing else can run in this process\n0 passed, 1 failed\n", where.c_str(),
                what.c_str());
    std::fflush(stdout);
    std::_Exit(1);
}

}  // namespace

void synchronize(const std::string& where) {
    using Clock = std::chrono::steady_clock;
    const auto deadline = Clock::now() + std::chrono::seconds(60);
    cudaError_t status = cudaStreamQuery(nullptr);
    for (int64_t i = 0; status == cudaErrorNotReady; ++i) {
        if (i > 10000) std::this_thread::sleep_for(std::chrono::microseconds(50));
        if (Clock::now() > deadline) stop(where, "has not ended after 60 s");
        status = cudaStreamQuery(nullptr);
    }
    if (status == cudaSuccess) status = cudaGetLastError();
    if (status != cudaSuccess) stop(where, cudaGetErrorString(status));
}

void must(cudaError_t status, const char* what) {
    if (status != cudaSuccess) stop(what, cudaGetErrorString(status));
}

Group::Group(std::string name, int capacity) : name_(std::move(name)), capacity_(capacity) {
    must(cudaMalloc(&tallies_, sizeof(Tally) * capacity), "tallies");
    must(cudaMemset(tallies_, 0, sizeof(Tally) * capacity), "tallies");
    cases_.reserve(capacity);
}

Group::~Group() {
    cudaFree(tallies_);
}

bool Group::attempt(const std::string& label, const std::function<void()>& launch, bool optional) {
    synchronize(name_ + ", " + last_);
    last_ = label;
    try {
        launch();
        return true;
    } catch (const Error& error) {
        if (optional && error.code == Error::kUnsupported) {
            ++refused_;
        } else {
            fail(label, error.what());
        }
        return false;
    }
}

Tally* Group::run(const std::string& label, const Bound& bound, const std::function<void()>& launch,
                  bool optional) {
    if (!attempt(label, launch, optional)) return nullptr;
    if (static_cast<int>(cases_.size()) == capacity_) stop(name_, "more cases than were declared");
    cases_.push_back({label, bound});
    return tallies_ + cases_.size() - 1;
}

void Group::expect_refusal(const std::string& label, const std::function<void()>& launch) {
    try {
        launch();
    } catch (const Error& error) {
        return check(error.code != Error::kCuda && error.what()[0] != '\0', label,
                     "an explanation before the launch, not: " + std::string(error.what()));
    }
    fail(label, "was accepted, wanted an Error");
}

void Group::check(bool holds, const std::string& label, const std::string& wanted) {
    if (!holds) return fail(label, "wanted " + wanted);
    ++passed_;
}

void Group::fail(const std::string& label, const std::string& reason) {
    if (++failed_ <= kShownFailures) {
        std::printf("  FAILED %s, %s: %s\n", name_.c_str(), label.c_str(), reason.c_str());
    }
}

void Group::settle(const Case& item, const Tally& tally) {
    const double count = static_cast<double>(tally.count);
    const std::string of = " of " + std::to_string(tally.count);
    compared_ += tally.count;
    if (item.bound.kind != Bound::kValues) differing_ += tally.differing;
    if (item.bound.kind == Bound::kCodes) {
        codes_ += count;
        codes_off_ += static_cast<double>(tally.differing);
        signed_sum_ += static_cast<double>(tally.signed_sum);
    }
    if (tally.damaged) {
        return fail(item.label, std::to_string(tally.damaged) + " bytes beside the output written");
    }
    if (tally.count == 0) return fail(item.label, "nothing was compared");
    if (item.bound.kind == Bound::kExact) {
        if (tally.differing)
            return fail(item.label, std::to_string(tally.differing) + of + " differ");
    } else if (tally.beyond) {
        return fail(item.label, std::to_string(tally.beyond) + of +
                                    " are no numbers, or further off than a code or what it moves");
    } else if (item.bound.kind == Bound::kCodes) {
        const double allowed = allowed_codes(item.bound.fraction, count) + item.bound.absolute;
        share_ = std::fmax(share_, static_cast<double>(tally.differing) / allowed);
        if (static_cast<double>(tally.differing) > allowed) {
            return fail(item.label, std::to_string(tally.differing) + of + " codes are one off");
        }
    } else {
        const double slack = item.bound.relative * as_double(tally.largest) + item.bound.absolute;
        const double allowed = 2 * as_double(tally.plain_worst) + slack;
        const double allowed_rms = 2 * std::sqrt(tally.plain_squares / count) + slack;
        const double worst = as_double(tally.worst), rms = std::sqrt(tally.squares / count);
        if (allowed > 0) share_ = std::fmax(share_, std::fmax(worst / allowed, rms / allowed_rms));
        if (!(worst <= allowed && rms <= allowed_rms)) {
            return fail(item.label, "error " + number(worst) + " (mean square " + number(rms) +
                                        ") where at most " + number(allowed) + " (" +
                                        number(allowed_rms) + ") is allowed");
        }
    }
    ++passed_;
}

void Group::judge() {
    synchronize(name_ + ", " + last_);
    std::vector<Tally> tallies(cases_.size());
    must(cudaMemcpy(tallies.data(), tallies_, sizeof(Tally) * tallies.size(),
                    cudaMemcpyDeviceToHost),
         "tallies");
    Bound whole = exact();
    for (size_t i = 0; i < cases_.size(); ++i) {
        settle(cases_[i], tallies[i]);
        if (cases_[i].bound.kind == Bound::kCodes && cases_[i].bound.fraction > whole.fraction) {
            whole = cases_[i].bound;
        }
    }
    const double fraction = codes_off_ / std::fmax(1, codes_);
    const double mean = signed_sum_ / std::fmax(1, codes_);
    if (whole.kind == Bound::kCodes) {
        check(codes_off_ <= allowed_codes(whole.fraction, codes_) && std::fabs(mean) <= whole.mean,
              "all cases together",
              number(whole.fraction) + " of the codes one off and a mean of " + number(whole.mean) +
                  ", got " + number(fraction) + " and " + number(mean));
    }
    if (failed_ > kShownFailures) std::printf("  and %d more\n", failed_ - kShownFailures);
    std::printf("%-34s %6d cases %4d failed %11llu elements %9llu differ", name_.c_str(),
                passed_ + failed_, failed_, compared_, differing_);
    if (whole.kind == Bound::kCodes) std::printf(" (%.2g), mean %+.2g code", fraction, mean);
    if (share_ > 0) std::printf(", worst at %.0f %% of its bound", 100 * share_);
    if (refused_) std::printf(", %d combinations refused", refused_);
    std::printf("\n");
    std::fflush(stdout);
}

void Report::group(const std::string& name, int capacity, const std::function<void(Group&)>& run) {
    if (name.find(options_.filter) == std::string::npos) return;
    Group group(name, capacity);
    run(group);
    group.judge();
    passed_ += group.passed();
    failed_ += group.failed();
}

}  // namespace swinq::testing

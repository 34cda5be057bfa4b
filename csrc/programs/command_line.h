// The command line of the programs: whole numbers in a fixed order, then options.
#pragma once

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace swinq::programs {

// A mistake on the command line: usage and exit code 2.
struct UsageError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Number {
    const char* name;
    int low, high;
};

// The positional numbers of argv, one for each of `wanted`, and `--checkpoint FILE` if `checkpoint`
// is not null.
inline std::vector<int> parse(int argc, char** argv, const std::vector<Number>& wanted,
                              std::string* checkpoint) {
    std::vector<int> numbers;
    for (int i = 1; i < argc; ++i) {
        const std::string argument = argv[i];
        if (argument == "--checkpoint" && checkpoint) {
            if (++i == argc) throw UsageError("--checkpoint wants a file");
            *checkpoint = argv[i];
            continue;
        }
        if (numbers.size() == wanted.size()) throw UsageError("too much: " + argument);
        const Number& want = wanted[numbers.size()];
        char* end = nullptr;
        errno = 0;
        const long value = std::strtol(argv[i], &end, 10);
        if (end == argv[i] || *end || errno || value < want.low || value > want.high) {
            throw UsageError(std::string(want.name) + " is " + argument +
                             ", wanted a number from " + std::to_string(want.low) + " to " +
                             std::to_string(want.high));
        }
        numbers.push_back(static_cast<int>(value));
    }
    if (numbers.size() < wanted.size()) {
        throw UsageError(std::string(wanted[numbers.size()].name) + " is missing");
    }
    return numbers;
}

// Runs a program: 0, or 2 after a wrong command line, or 1 after anything else that went wrong.
template <typename Body>
int run_main(const char* usage, Body body) {
    try {
        return body();
    } catch (const UsageError& error) {
        std::fprintf(stderr, "error: %s\n%s", error.what(), usage);
        return 2;
    } catch (const std::bad_alloc&) {
        std::fprintf(stderr,
                     "error: out of host memory\n  fix: use a smaller batch, image or window\n");
        return 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}

}  // namespace swinq::programs

// Errors in words: how their texts are put together, and how exceptions become codes of the C ABI.
#pragma once

#include <sstream>
#include <string>

#include "include/swinq.h"
#include "kernels/types.h"

namespace swinq {

// All parts written one behind the other.
template <typename... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

// Throws an Error that names the problem and, on a line of its own, what to do.
[[noreturn]] void fail(Error::Code code, const std::string& problem, const std::string& fix);

// The same for an argument that cannot be meant.
[[noreturn]] void refuse(const std::string& problem, const std::string& fix);

// Keeps the text of the exception being handled for this thread's last_error() and returns its
// code.
swinq_status keep_exception();
const char* last_error();

// Runs `work` and turns what it throws into a code and a text.
template <typename Work>
swinq_status guarded(Work&& work) {
    try {
        work();
        return SWINQ_OK;
    } catch (...) {
        return keep_exception();
    }
}

}  // namespace swinq

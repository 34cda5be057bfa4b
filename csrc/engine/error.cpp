// Errors in words: see error.h.
#include "engine/error.h"

#include <new>

namespace swinq {
namespace {

thread_local std::string last_text;

// Never throws: where even the text finds no memory, the code alone must do.
swinq_status keep(swinq_status status, const char* what) noexcept {
    try {
        last_text = what;
    } catch (...) {
        last_text.clear();
    }
    return status;
}

}  // namespace

void fail(Error::Code code, const std::string& problem, const std::string& fix) {
    throw Error(code, problem + "\n  fix: " + fix);
}

void refuse(const std::string& problem, const std::string& fix) {
    fail(Error::kInvalidArgument, problem, fix);
}

swinq_status keep_exception() {
    try {
        throw;
    } catch (const Error& error) {
        return keep(static_cast<swinq_status>(error.code), error.what());
    } catch (const std::bad_alloc&) {
        return keep(SWINQ_OUT_OF_MEMORY,
                    "out of host memory\n  fix: free some, or use a smaller model");
    } catch (const std::exception& error) {
        return keep(SWINQ_INTERNAL_ERROR, error.what());
    } catch (...) {
        return keep(SWINQ_INTERNAL_ERROR, "an exception without a text");
    }
}

const char* last_error() {
    return last_text.c_str();
}

}  // namespace swinq

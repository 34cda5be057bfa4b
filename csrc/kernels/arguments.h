// What the host functions that launch kernels say about arguments that cannot be meant.
#pragma once

#include "types.h"

namespace swinq {

constexpr int kAlignment = 16;  // bytes: the widest load of a thread

inline bool is_aligned(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kAlignment == 0;
}

[[noreturn]] inline void refuse_argument(const std::string& kernel, const std::string& problem,
                                         const std::string& fix) {
    throw Error(Error::kInvalidArgument, kernel + ": " + problem + "\n  fix: " + fix);
}

[[noreturn]] inline void refuse_type(const std::string& kernel, const std::string& name, Type type,
                                     const std::string& wanted) {
    refuse_argument(kernel, name + " is type " + std::to_string(static_cast<int>(type)),
                    "use " + wanted + " (0 int8, 1 half, 2 float)");
}

// A vector or matrix that the kernel reads or writes in pieces of 16 bytes.
inline void require_pointer(const std::string& kernel, const char* name, const void* pointer) {
    if (pointer == nullptr) refuse_argument(kernel, std::string(name) + " is null", "pass it");
    if (!is_aligned(pointer)) {
        refuse_argument(kernel, std::string(name) + " is not aligned to 16 bytes",
                        "start it at a multiple of 16 bytes, as cudaMalloc does");
    }
}

// Rows and what is added to them are ints, and eight channels are one thread's vector.
inline void require_matrix(const std::string& kernel, int64_t rows, int channels) {
    if (rows < 0 || rows > (1 << 30)) {
        refuse_argument(kernel, std::to_string(rows) + " rows; there can be 0 to 2^30",
                        "use a smaller batch");
    }
    if (channels <= 0 || channels % 8 != 0) {
        refuse_argument(kernel,
                        "channels is " + std::to_string(channels) + ", wanted a multiple of 8",
                        "pad the channels");
    }
}

}  // namespace swinq

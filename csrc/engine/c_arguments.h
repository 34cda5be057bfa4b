// What arguments of the C ABI must be, whichever function they are for.
#pragma once

#include <cstdint>

#include "engine/error.h"

namespace swinq {

// A pointer that may not be null, and where it points a multiple of `alignment` bytes.
inline void require_pointer(const char* name, const void* pointer, uintptr_t alignment = 1) {
    if (pointer == nullptr) {
        refuse(text(name, " is null"), text("pass ", name));
    }
    if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
        refuse(text(name, " is at ", pointer, ", which is not aligned to ", alignment, " bytes"),
               text("start ", name, " at a multiple of ", alignment, " bytes, as cudaMalloc does"));
    }
}

// The same of a pointer that may be null.
inline void require_alignment(const char* name, const void* pointer, uintptr_t alignment) {
    if (pointer != nullptr) {
        require_pointer(name, pointer, alignment);
    }
}

inline void require_range(const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) {
        refuse(text(name, " is ", value, ", wanted ", low, " to ", high), text("correct ", name));
    }
}

// A number of the C ABI as the enum that it stands for, whose values are 0 to `last`.
template <typename Enum>
Enum enum_of(const char* name, int32_t value, Enum last) {
    require_range(name, value, 0, static_cast<int64_t>(last));
    return static_cast<Enum>(value);
}

}  // namespace swinq

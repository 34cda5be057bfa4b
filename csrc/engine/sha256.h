// SHA-256 (FIPS 180-4), to notice damage. It keeps nothing secret.
#pragma once

#include <cstddef>
#include <string>

namespace swinq {

// In hex, as swinq/export/integrity.py writes it.
std::string sha256(const void* data, size_t bytes);

}  // namespace swinq

// Comparing a kernel's output with what it should be, on the device.
#pragma once

#include "device_data.h"

namespace swinq::testing {

// What the numbers before an output step are: exactly (fp64), and as a plain computation in the
// kernel's own precision gets them (fp32). Both (rows, columns).
struct Expected {
    const double* exact;
    const float* plain;
    int64_t rows;
    int columns;
};

// How the numbers became the output.
struct Step {
    Type type;                       // of the output: codes, half or float
    const float* inverse = nullptr;  // (columns): kInt8, or with `scale` the rounding of numbers
    const float* scale = nullptr;    // (columns) or null: number := quantize(number) * scale
    const void* before = nullptr;    // (rows, columns) of `type` or null: what was added to
};

// Codes: wanted are those of `plain` if `bit_equal`, else of `exact`. Numbers: `differing` counts
// those that are not `plain` rounded to the type; errors of the output and of that are against
// `exact`.
void compare(const void* out, const Step& step, const Expected& expected, bool bit_equal,
             Tally* tally);

// Two arrays of bytes, as numbers of `width` bytes.
void compare_bits(const void* out, const void* expected, int64_t bytes, int width, Tally* tally);

// Two arrays of halves, (rows, columns): `differing` counts other bits, `beyond` those that are
// further apart than apart[c] and the rounding of both to half explain, or no numbers.
void compare_near(const void* out, const void* expected, const float* apart, int64_t rows,
                  int columns, Tally* tally);

// Codes of what is stored in x (of type half or float), bit by bit.
void compare_requantized(const int8_t* codes, Type type, const void* x, const float* inverse,
                         int64_t rows, int columns, Tally* tally);

}  // namespace swinq::testing

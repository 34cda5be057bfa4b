// Tallies are summed over a block and then with atomics: order matters only to the last digit of
// squares.
#include "compare.h"

namespace swinq::testing {

namespace {

constexpr int kThreads = 256;

// clamp(rint(x * inverse)) as docs/numerics.md has it, written without the kernels' helpers.
__device__ float code_of(float x, float inverse) {
    return fminf(fmaxf(rintf(__fmul_rn(x, inverse)), -128.0f), 127.0f);
}

struct Found {
    unsigned differing = 0, beyond = 0;
    int signed_sum = 0;
    double squares = 0, plain_squares = 0, worst = 0, plain_worst = 0, largest = 0;

    __device__ void add_code(int code, int wanted) {
        differing += code != wanted;
        beyond += abs(code - wanted) > 1;
        signed_sum += code - wanted;
    }
    __device__ void add_number(double number, double plain, double exact) {
        if (!isfinite(number)) {
            beyond += isfinite(exact);
            return;
        }
        const double error = fabs(number - exact), plain_error = fabs(plain - exact);
        squares += error * error, plain_squares += plain_error * plain_error;
        worst = fmax(worst, error), plain_worst = fmax(plain_worst, plain_error);
        largest = fmax(largest, fabs(exact));
    }
};

template <typename T>
__device__ T warp_add(T value) {
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    return value;
}

__device__ double warp_max(double value) {
    for (int offset = 16; offset; offset /= 2) {
        value = fmax(value, __shfl_xor_sync(~0u, value, offset));
    }
    return value;
}

__device__ void atomic_max(unsigned long long* target, double value) {
    if (value > 0) atomicMax(target, static_cast<unsigned long long>(__double_as_longlong(value)));
}

__device__ void report(const Found& found, Tally* tally) {
    const unsigned differing = warp_add(found.differing), beyond = warp_add(found.beyond);
    const int signed_sum = warp_add(found.signed_sum);
    const double squares = warp_add(found.squares), plain_squares = warp_add(found.plain_squares);
    const double worst = warp_max(found.worst), plain_worst = warp_max(found.plain_worst);
    const double largest = warp_max(found.largest);
    if (threadIdx.x % 32) return;
    if (differing) atomicAdd(&tally->differing, static_cast<unsigned long long>(differing));
    if (beyond) atomicAdd(&tally->beyond, static_cast<unsigned long long>(beyond));
    if (signed_sum) {  // two's complement: the sum of unsigned is that of signed
        atomicAdd(reinterpret_cast<unsigned long long*>(&tally->signed_sum),
                  static_cast<unsigned long long>(static_cast<long long>(signed_sum)));
    }
    if (squares > 0) atomicAdd(&tally->squares, squares);
    if (plain_squares > 0) atomicAdd(&tally->plain_squares, plain_squares);
    atomic_max(&tally->worst, worst);
    atomic_max(&tally->plain_worst, plain_worst);
    atomic_max(&tally->largest, largest);
}

__global__ void count_kernel(Tally* tally, unsigned long long count) {
    tally->count += count;
}

template <typename T>
__global__ void compare_kernel(const T* out, Step step, Expected expected, bool bit_equal,
                               Tally* tally) {
    Found found;
    const int64_t count = expected.rows * expected.columns;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
         i += stride) {
        const int c = static_cast<int>(i % expected.columns);
        double exact = expected.exact[i];
        float plain = expected.plain[i];
        if constexpr (sizeof(T) == 1) {
            const float number = bit_equal ? plain : static_cast<float>(exact);
            found.add_code(out[i], static_cast<int>(code_of(number, step.inverse[c])));
        } else {
            if (step.scale) {
                exact = static_cast<double>(code_of(static_cast<float>(exact), step.inverse[c])) *
                        step.scale[c];
                plain = __fmul_rn(code_of(plain, step.inverse[c]), step.scale[c]);
            }
            if (step.before) {
                const float before = static_cast<float>(static_cast<const T*>(step.before)[i]);
                exact += before;
                plain = __fadd_rn(before, plain);
            }
            const T rounded = static_cast<T>(plain);
            const float number = static_cast<float>(out[i]);
            const float wanted = static_cast<float>(rounded);
            found.differing += !(number == wanted);  // 0 equals -0
            found.add_number(number, wanted, exact);
        }
    }
    report(found, tally);
}

template <typename T>
__global__ void compare_bits_kernel(const T* out, const T* expected, int64_t count, Tally* tally) {
    Found found;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
         i += stride) {
        found.differing += out[i] != expected[i];
    }
    report(found, tally);
}

__global__ void compare_near_kernel(const __half* out, const __half* expected, const float* apart,
                                    int64_t count, int columns, Tally* tally) {
    constexpr float kHalfUlp = 0x1p-11f, kHalfSubnormal = 0x1p-25f;  // of a half, relative; least
    Found found;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
         i += stride) {
        const float number = __half2float(out[i]), wanted = __half2float(expected[i]);
        const float rounding = kHalfUlp * (fabsf(number) + fabsf(wanted)) + 2 * kHalfSubnormal;
        found.differing += __half_as_ushort(out[i]) != __half_as_ushort(expected[i]);
        const bool near = fabsf(number - wanted) <= apart[i % columns] + rounding;
        found.beyond += !(near && isfinite(number));  // an infinity allows itself any rounding
    }
    report(found, tally);
}

template <typename T>
__global__ void requantized_kernel(const int8_t* codes, const T* x, const float* inverse,
                                   int64_t count, int columns, Tally* tally) {
    Found found;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
         i += stride) {
        const float wanted = code_of(static_cast<float>(x[i]), inverse[i % columns]);
        found.add_code(codes[i], static_cast<int>(wanted));
    }
    report(found, tally);
}

int grid_for(int64_t count) {
    const int64_t blocks = ceil_div(count, kThreads);
    return static_cast<int>(blocks < 1 ? 1 : blocks > 2048 ? 2048 : blocks);
}

void add_count(Tally* tally, int64_t count) {
    count_kernel<<<1, 1>>>(tally, static_cast<unsigned long long>(count));
}

}  // namespace

void compare(const void* out, const Step& step, const Expected& expected, bool bit_equal,
             Tally* tally) {
    const int64_t count = expected.rows * expected.columns;
    const int grid = grid_for(count);
    if (step.type == Type::kInt8) {
        compare_kernel<<<grid, kThreads>>>(static_cast<const int8_t*>(out), step, expected,
                                           bit_equal, tally);
    } else if (step.type == Type::kHalf) {
        compare_kernel<<<grid, kThreads>>>(static_cast<const __half*>(out), step, expected,
                                           bit_equal, tally);
    } else {
        compare_kernel<<<grid, kThreads>>>(static_cast<const float*>(out), step, expected,
                                           bit_equal, tally);
    }
    add_count(tally, count);
}

void compare_bits(const void* out, const void* expected, int64_t bytes, int width, Tally* tally) {
    const int64_t count = bytes / width;
    const int grid = grid_for(count);
    if (width == 1) {
        compare_bits_kernel<<<grid, kThreads>>>(
            static_cast<const uint8_t*>(out), static_cast<const uint8_t*>(expected), count, tally);
    } else if (width == 2) {
        compare_bits_kernel<<<grid, kThreads>>>(static_cast<const uint16_t*>(out),
                                                static_cast<const uint16_t*>(expected), count,
                                                tally);
    } else {
        compare_bits_kernel<<<grid, kThreads>>>(static_cast<const uint32_t*>(out),
                                                static_cast<const uint32_t*>(expected), count,
                                                tally);
    }
    add_count(tally, count);
}

void compare_near(const void* out, const void* expected, const float* apart, int64_t rows,
                  int columns, Tally* tally) {
    const int64_t count = rows * columns;
    compare_near_kernel<<<grid_for(count), kThreads>>>(static_cast<const __half*>(out),
                                                       static_cast<const __half*>(expected), apart,
                                                       count, columns, tally);
    add_count(tally, count);
}

void compare_requantized(const int8_t* codes, Type type, const void* x, const float* inverse,
                         int64_t rows, int columns, Tally* tally) {
    const int64_t count = rows * columns;
    if (type == Type::kHalf) {
        requantized_kernel<<<grid_for(count), kThreads>>>(codes, static_cast<const __half*>(x),
                                                          inverse, count, columns, tally);
    } else {
        requantized_kernel<<<grid_for(count), kThreads>>>(codes, static_cast<const float*>(x),
                                                          inverse, count, columns, tally);
    }
    add_count(tally, count);
}

}  // namespace swinq::testing

// The plain LayerNorm, mean and patch embedding: a block a row, everything in fp64.
#include "norm_problem.h"

namespace swinq::testing {

namespace {

constexpr int kThreads = 128;

__device__ double value_at(const Rows& rows, int64_t row, int column) {
    int64_t token = row;
    int channel = column;
    if (rows.merge) {
        const int part = column / rows.channels, half = rows.resolution / 2;  // part: 2 * dx + dy
        channel = column % rows.channels;
        const int64_t image = row / (half * half), y = row / half % half, x = row % half;
        token = (image * rows.resolution + 2 * y + part % 2) * rows.resolution + 2 * x + part / 2;
    }
    const int64_t at = token * rows.channels + channel;
    if (rows.type == Type::kHalf) return __half2float(static_cast<const __half*>(rows.data)[at]);
    if (rows.type == Type::kFloat) return static_cast<const float*>(rows.data)[at];
    return __fmul_rn(static_cast<const int8_t*>(rows.data)[at], rows.scale[channel]);
}

__device__ double value_at(const double* rows, int64_t row, int column, int width) {
    return rows[row * width + column];
}

__device__ double block_sum(double value) {
    __shared__ double sums[kThreads];
    sums[threadIdx.x] = value;
    __syncthreads();
    for (int offset = kThreads / 2; offset; offset /= 2) {
        if (threadIdx.x < offset) sums[threadIdx.x] += sums[threadIdx.x + offset];
        __syncthreads();
    }
    const double sum = sums[0];
    __syncthreads();
    return sum;
}

// `value(column)` of a row of `width`; all threads of the block call.
template <typename Value>
__device__ void normalize_row(Value value, int64_t row, int width, const float* gamma,
                              const float* beta, float eps, double* exact, float* plain) {
    double sum = 0, squares = 0;
    for (int c = threadIdx.x; c < width; c += kThreads) sum += value(c);
    const double mean = block_sum(sum) / width;
    for (int c = threadIdx.x; c < width; c += kThreads) {
        squares += (value(c) - mean) * (value(c) - mean);
    }
    const double factor = 1 / sqrt(block_sum(squares) / width + static_cast<double>(eps));
    for (int c = threadIdx.x; c < width; c += kThreads) {
        const double x = value(c);
        const double y = gamma ? (x - mean) * factor * gamma[c] + beta[c] : x;
        exact[row * width + c] = y;
        plain[row * width + c] = static_cast<float>(y);
    }
}

__global__ void layernorm_kernel(Rows rows, int width, const float* gamma, const float* beta,
                                 float eps, double* exact, float* plain) {
    const int64_t row = blockIdx.x;
    normalize_row([&](int c) { return value_at(rows, row, c); }, row, width, gamma, beta, eps,
                  exact, plain);
}

__global__ void layernorm_kernel(const double* rows, int width, const float* gamma,
                                 const float* beta, float eps, double* exact, float* plain) {
    const int64_t row = blockIdx.x;
    normalize_row([&](int c) { return value_at(rows, row, c, width); }, row, width, gamma, beta,
                  eps, exact, plain);
}

__global__ void mean_kernel(const double* rows, int tokens, int channels, double* mean,
                            float* plain) {
    const int64_t image = blockIdx.x;
    for (int c = threadIdx.x; c < channels; c += kThreads) {
        double sum = 0;
        for (int t = 0; t < tokens; ++t) sum += rows[(image * tokens + t) * channels + c];
        mean[image * channels + c] = sum / tokens;
        plain[image * channels + c] = static_cast<float>(sum / tokens);
    }
}

template <typename T>
__device__ double number(const void* data, int64_t at) {
    return static_cast<float>(static_cast<const T*>(data)[at]);
}

__device__ double number(Type type, const void* data, int64_t at) {
    return type == Type::kHalf ? number<__half>(data, at) : number<float>(data, at);
}

__global__ void patches_kernel(PatchEmbedArguments p, double* exact) {
    const int side = p.img_size / p.patch_size;
    const int64_t row = blockIdx.x, image = row / (side * side);
    const int token_y = row / side % side, token_x = row % side;
    for (int c = threadIdx.x; c < p.channels; c += kThreads) {
        double sum = p.bias[c];
        for (int i = 0; i < p.in_chans * p.patch_size * p.patch_size; ++i) {
            const int x = i % p.patch_size, y = i / p.patch_size % p.patch_size;
            const int channel = i / (p.patch_size * p.patch_size);
            const int64_t at =
                ((image * p.in_chans + channel) * p.img_size + token_y * p.patch_size + y) *
                    p.img_size +
                token_x * p.patch_size + x;
            double pixel = number(p.image_type, p.images, at);
            if (p.stream == Type::kHalf) {
                pixel = __half2float(__float2half_rn(static_cast<float>(pixel)));
            }
            const int64_t w =
                static_cast<int64_t>(c) * p.in_chans * p.patch_size * p.patch_size + i;
            sum += pixel * number(p.stream, p.weight, w);
        }
        exact[row * p.channels + c] = sum;
    }
}

__global__ void plant_kernel(Type type, void* data, int64_t index, float value) {
    if (type == Type::kHalf) {
        static_cast<__half*>(data)[index] = __float2half_rn(value);
    } else {
        static_cast<float*>(data)[index] = value;
    }
}

template <typename T>
__global__ void shape_stream_kernel(T* data, int64_t count, int channels) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const int row = static_cast<int>(i / channels), channel = static_cast<int>(i % channels);
    const float offset = static_cast<float>(row % 13 - 6) * 0.5f;
    const float spread = channel % 29 == 7 ? 20.0f : 1.0f;
    data[i] = static_cast<T>(static_cast<float>(data[i]) * spread + offset);
}

}  // namespace

void plain_layernorm(const Rows& rows, const float* gamma, const float* beta, float eps,
                     double* exact, float* plain) {
    layernorm_kernel<<<static_cast<unsigned>(rows.count), kThreads>>>(rows, rows.width(), gamma,
                                                                      beta, eps, exact, plain);
}

void plain_layernorm(const double* rows, int64_t count, int channels, const float* gamma,
                     const float* beta, float eps, double* exact, float* plain) {
    layernorm_kernel<<<static_cast<unsigned>(count), kThreads>>>(rows, channels, gamma, beta, eps,
                                                                 exact, plain);
}

void plain_mean(const double* exact, int64_t images, int tokens, int channels, double* mean,
                float* plain) {
    mean_kernel<<<static_cast<unsigned>(images), kThreads>>>(exact, tokens, channels, mean, plain);
}

void plain_patches(const PatchEmbedArguments& p, double* exact) {
    const int side = p.img_size / p.patch_size;
    patches_kernel<<<static_cast<unsigned>(p.batch * side * side), kThreads>>>(p, exact);
}

void plant(Type type, void* data, int64_t index, float value) {
    plant_kernel<<<1, 1>>>(type, data, index, value);
}

DeviceArray<uint8_t> random_stream(Type type, int64_t rows, int channels, uint32_t seed) {
    const int64_t count = rows * channels;
    DeviceArray<uint8_t> stream = random_bytes(type, count, seed, -2, 2);
    const unsigned grid = static_cast<unsigned>(ceil_div(count, 256));
    if (type == Type::kHalf) {
        shape_stream_kernel<<<grid, 256>>>(reinterpret_cast<__half*>(stream.get()), count,
                                           channels);
    } else {
        shape_stream_kernel<<<grid, 256>>>(reinterpret_cast<float*>(stream.get()), count, channels);
    }
    return stream;
}

}  // namespace swinq::testing

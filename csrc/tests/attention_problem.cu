// The plain attention: docs/numerics.md equation by equation, and the same in fp64 without
// rounding.
#include "attention_problem.h"

namespace swinq::testing {

namespace {

struct Plain {
    AttentionSize size;
    const float* table;
    const float* factor;
    float v_scale;
};

// Where token `i` of a window lies, before and after the cyclic shift.
struct Place {
    int y, x, region;  // in the window; of the shift mask
    int64_t token;
};

__device__ int region_of(int position, const AttentionSize& size) {
    if (size.shift == 0) return 0;
    if (position < size.resolution - size.window) return 0;
    return position < size.resolution - size.shift ? 1 : 2;
}

__device__ Place place_of(int i, int window_index, const AttentionSize& size) {
    const int across = size.resolution / size.window;
    const int image = window_index / (across * across), window = window_index % (across * across);
    Place place;
    place.y = i / size.window, place.x = i % size.window;
    const int y = window / across * size.window + place.y;
    const int x = window % across * size.window + place.x;
    place.region = region_of(y, size) * 3 + region_of(x, size);
    const int64_t row = (y + size.shift) % size.resolution;
    const int64_t column = (x + size.shift) % size.resolution;
    place.token = (image * size.resolution + row) * size.resolution + column;
    return place;
}

__device__ float value_of(const int8_t* p) {
    return *p;
}
__device__ float value_of(const __half* p) {
    return __half2float(*p);
}
__device__ float value_of(const float* p) {
    return *p;
}

template <typename T>
__global__ void attention_kernel(const T* qkv, Plain plain, double* exact, float* rounded) {
    constexpr bool kCodes = sizeof(T) == 1;
    const AttentionSize size = plain.size;
    const int head = blockIdx.y, tokens = size.window * size.window, width = 2 * size.window - 1;
    const int64_t row = 3ll * size.heads * kHeadDim;  // elements of a token's q, k and v
    const float factor = plain.factor[head];
    for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
        const Place query = place_of(i, blockIdx.x, size);
        float q[kHeadDim];
        for (int d = 0; d < kHeadDim; ++d) {
            q[d] = value_of(qkv + query.token * row + head * kHeadDim + d);
        }
        // s of a key, and the same exactly
        auto logit = [&](int j, const Place& key, double& exact_s) {
            const T* k = qkv + key.token * row + (size.heads + head) * kHeadDim;
            float sum = 0;  // of codes: exact, below 2^24
            double exact_sum = 0;
            for (int d = 0; d < kHeadDim; ++d) {
                sum = __fmaf_rn(q[d], value_of(k + d), sum);
                exact_sum += static_cast<double>(q[d]) * value_of(k + d);
            }
            const int index =
                (query.y - key.y + size.window - 1) * width + query.x - key.x + size.window - 1;
            const float mask = query.region == key.region ? 0.0f : -100.0f;
            const float table = plain.table[head * width * width + index];
            exact_s = exact_sum * factor + (static_cast<double>(table) + mask);
            return __fadd_rn(__fmul_rn(sum, factor), __fadd_rn(table, mask));
        };
        float largest = -INFINITY;
        double exact_largest = -INFINITY;
        for (int j = 0; j < tokens; ++j) {
            double exact_s;
            largest = fmaxf(largest, logit(j, place_of(j, blockIdx.x, size), exact_s));
            exact_largest = fmax(exact_largest, exact_s);
        }
        float sum = 0, values[kHeadDim] = {};
        int code_sum = 0, code_values[kHeadDim] = {};
        double exact_sum = 0, exact_values[kHeadDim] = {};
        for (int j = 0; j < tokens; ++j) {
            const Place key = place_of(j, blockIdx.x, size);
            double exact_s;
            const float below = __fsub_rn(logit(j, key, exact_s), largest);
            const float e = static_cast<float>(exp(static_cast<double>(below)));
            const T* v = qkv + key.token * row + (2 * size.heads + head) * kHeadDim;
            if constexpr (kCodes) {
                const int p = static_cast<int>(rintf(__fmul_rn(255.0f, e)));
                code_sum += p;
                for (int d = 0; d < kHeadDim; ++d) code_values[d] += p * v[d];
            } else {
                const float p = sizeof(T) == 2 ? __half2float(__float2half_rn(e)) : e;
                const double exact_p = exp(exact_s - exact_largest);
                sum = __fadd_rn(sum, p), exact_sum += exact_p;
                for (int d = 0; d < kHeadDim; ++d) {
                    values[d] = __fmaf_rn(p, value_of(v + d), values[d]);
                    exact_values[d] += exact_p * value_of(v + d);
                }
            }
        }
        const int64_t at = query.token * size.heads * kHeadDim + head * kHeadDim;
        for (int d = 0; d < kHeadDim; ++d) {
            if constexpr (kCodes) {
                const float weight = __fdiv_rn(plain.v_scale, __int2float_rn(code_sum));
                rounded[at + d] = __fmul_rn(__int2float_rn(code_values[d]), weight);
                exact[at + d] = rounded[at + d];
            } else {
                rounded[at + d] = __fdiv_rn(values[d], sum);
                exact[at + d] = exact_values[d] / exact_sum;
            }
        }
    }
}

}  // namespace

AttentionProblem::AttentionProblem(Type type, const AttentionSize& size, Logits logits)
    : type_(type),
      size_(size),
      factor_(size.heads),
      exact_(tokens() * columns()),
      plain_(tokens() * columns()) {
    const int64_t elements = tokens() * 3 * columns();
    const bool sharp = logits == Logits::kSharp, equal = logits == Logits::kEqual;
    if (type == Type::kInt8) {  // sharp: vectors of norm 127, as normalised ones have
        qkv_ = random_bytes(type, elements, next_seed(), sharp ? -39 : -128, sharp ? 39 : 127);
    } else {
        const float reach = sharp ? 0.3f : 1.7f;
        qkv_ = random_bytes(type, elements, next_seed(), -reach, reach);
    }
    if (equal) {
        must(cudaMemset2D(qkv_.get(), 3ll * columns() * size_of(type), 0,
                          2ll * columns() * size_of(type), tokens()),
             "zeros for q and k");
    }
    const float unit = type == Type::kInt8 ? (sharp ? 1 / 127.0f : 1.7f / 127) : 1;
    const float scale = unit * unit * (sharp ? 100.0f : 0.1767767f);
    fill(factor_.get(), size.heads, next_seed(), 0.8f * scale, scale);
    if (sharp) fill(factor_.get(), 1, next_seed(), scale, scale);
    const float bias = logits == Logits::kBiased ? 100 : equal ? 0 : 3;
    const int width = 2 * size.window - 1;
    table_ = random_array<float>(static_cast<int64_t>(size.heads) * width * width, next_seed(),
                                 -bias, bias);
    const int64_t expanded = expanded_bias_size(size.window, size.heads);
    if (expanded > 0) {
        std::vector<float> host(expanded);
        expand_bias(table_.read().data(), size.window, size.heads, host.data());
        expanded_ = DeviceArray<float>(host);
    }
    v_scale_ = 1 / 64.0f;
    // With these biases, or in the smallest windows, a query attends to few keys: its outputs are
    // as large as values, and a probability that is one code off moves them by up to v_scale. That
    // is one code where codes are no finer than those of v, as they are when they have to hold such
    // outputs.
    const bool few_keys = type == Type::kInt8 && (logits == Logits::kBiased || size.window < 4);
    inverse_ = random_array<float>(columns(), next_seed(), 30, few_keys ? 1 / v_scale_ : 260);
    set_some(inverse_.get(), columns(), next_seed(), 41, 0);

    const Plain plain = {size, table_.get(), factor_.get(), v_scale_};
    const int across = size.resolution / size.window;
    const dim3 grid(size.batch * across * across, size.heads);
    if (type == Type::kInt8) {
        attention_kernel<<<grid, 64>>>(reinterpret_cast<const int8_t*>(qkv_.get()), plain,
                                       exact_.get(), plain_.get());
    } else if (type == Type::kHalf) {
        attention_kernel<<<grid, 64>>>(reinterpret_cast<const __half*>(qkv_.get()), plain,
                                       exact_.get(), plain_.get());
    } else {
        attention_kernel<<<grid, 64>>>(reinterpret_cast<const float*>(qkv_.get()), plain,
                                       exact_.get(), plain_.get());
    }
}

AttentionArguments AttentionProblem::arguments(Type out_type, void* out) const {
    AttentionArguments a = {};
    a.type = type_, a.out_type = out_type;
    a.qkv = qkv_.get(), a.out = out;
    a.bias_table = table_.get(), a.bias = expanded_.get(), a.factor = factor_.get();
    a.v_scale = type_ == Type::kInt8 ? v_scale_ : 1.0f;
    a.out_inverse = out_type == Type::kInt8 ? inverse_.get() : nullptr;
    a.batch = size_.batch, a.resolution = size_.resolution, a.window = size_.window;
    a.shift = size_.shift, a.heads = size_.heads;
    return a;
}

std::string describe(const AttentionSize& size) {
    return "batch " + std::to_string(size.batch) + " map " + std::to_string(size.resolution) +
           " window " + std::to_string(size.window) + " shift " + std::to_string(size.shift) +
           " heads " + std::to_string(size.heads);
}

}  // namespace swinq::testing

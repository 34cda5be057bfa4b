// The plain product and everything around it.
#include "gemm_problem.h"

#include <cmath>
#include <cstring>

#include "swinq.h"

namespace swinq::testing {

namespace {

constexpr int kTile = 32;  // rows, columns and k of a block of the plain product

template <typename To, typename From>
__device__ To number(From x) {
    return static_cast<To>(x);
}
template <typename To>
__device__ To number(__half x) {
    return static_cast<To>(__half2float(x));
}

__device__ int multiply_add(int a, int b, int c) {
    return a * b + c;
}
__device__ float multiply_add(float a, float b, float c) {
    return __fmaf_rn(a, b, c);
}
__device__ double multiply_add(double a, double b, double c) {
    return __fma_rn(a, b, c);
}

// sums[r, c] = sum over k, in order, of a[r, k] * w[c, k].
template <typename In, typename Sum>
__global__ void product_kernel(const In* a, const In* w, int m, int n, int k, Sum* sums) {
    __shared__ Sum tile_a[kTile][kTile + 1], tile_w[kTile][kTile + 1];
    const int x = threadIdx.x, y = threadIdx.y;  // 32 x 8 threads, four rows each
    const int row = blockIdx.y * kTile, column = blockIdx.x * kTile;
    Sum sum[4] = {};
    for (int first = 0; first < k; first += kTile) {
        for (int i = y; i < kTile; i += 8) {
            const bool inside = first + x < k;
            tile_a[i][x] = inside && row + i < m
                               ? number<Sum>(a[static_cast<int64_t>(row + i) * k + first + x])
                               : Sum(0);
            tile_w[i][x] = inside && column + i < n
                               ? number<Sum>(w[static_cast<int64_t>(column + i) * k + first + x])
                               : Sum(0);
        }
        __syncthreads();
        for (int kk = 0; kk < kTile; ++kk) {
            for (int i = 0; i < 4; ++i) {
                sum[i] = multiply_add(tile_a[y + 8 * i][kk], tile_w[x][kk], sum[i]);
            }
        }
        __syncthreads();
    }
    for (int i = 0; i < 4; ++i) {
        if (row + y + 8 * i < m && column + x < n) {
            sums[static_cast<int64_t>(row + y + 8 * i) * n + column + x] = sum[i];
        }
    }
}

// y = fma(sum, factor, bias): one rounding, so exact and plain are the same number.
__global__ void scale_kernel(const int* sums, const float* factor, const float* bias, int64_t count,
                             int n, double* exact, float* plain) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const int c = static_cast<int>(i % n);
    plain[i] = __fmaf_rn(__int2float_rn(sums[i]), factor[c], bias[c]);
    exact[i] = plain[i];
}

__global__ void add_bias_kernel(const float* bias, int64_t count, int n, double* exact,
                                float* plain) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const int c = static_cast<int>(i % n);
    exact[i] += bias[c];
    plain[i] = __fadd_rn(plain[i], bias[c]);
}

__global__ void gelu_kernel(const double* exact, const float* plain, int64_t count,
                            double* exact_out, float* plain_out) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    exact_out[i] = 0.5 * exact[i] * (1 + erf(exact[i] * 0.70710678118654752));
    plain_out[i] = 0.5f * plain[i] * (1.0f + erff(plain[i] * 0.70710678f));
}

// One thread a head of 32 channels; q and k (the first two thirds of n) are divided by their norms.
__global__ void normalise_kernel(const double* exact, const float* plain, int64_t heads, int n,
                                 double* exact_out, float* plain_out) {
    const int64_t head = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (head >= heads) return;
    const int64_t first = head * kHeadDim;
    double exact_norm = 1;
    float plain_norm = 1;
    if (first % n < n / 3 * 2) {
        double exact_sum = 0;
        float plain_sum = 0;
        for (int i = 0; i < kHeadDim; ++i) {
            exact_sum += exact[first + i] * exact[first + i];
            plain_sum = __fmaf_rn(plain[first + i], plain[first + i], plain_sum);
        }
        exact_norm = fmax(sqrt(exact_sum), 1e-12);
        plain_norm = fmaxf(__fsqrt_rn(plain_sum), 1e-12f);
    }
    for (int i = 0; i < kHeadDim; ++i) {
        exact_out[first + i] = exact[first + i] / exact_norm;
        plain_out[first + i] = __fdiv_rn(plain[first + i], plain_norm);
    }
}

// Rows of each group of 32 in the order of the layout; zeros beyond row n.
__global__ void lay_out_kernel(const uint8_t* w, const int* order, int n, int64_t row_bytes,
                               uint8_t* laid_out) {
    const int place = blockIdx.x, row = place / 32 * 32 + order[place % 32];
    for (int64_t i = threadIdx.x; i < row_bytes; i += blockDim.x) {
        laid_out[place * row_bytes + i] = row < n ? w[row * row_bytes + i] : 0;
    }
}

__global__ void sign_rows_kernel(int8_t* w, int64_t count, int k) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count && i / k % 2) w[i] = static_cast<int8_t>(-w[i]);
}

unsigned grid_for(int64_t count) {
    return static_cast<unsigned>(ceil_div(count, 256));
}

int64_t padded(int64_t n) {
    return ceil_div(n, 32) * 32;
}

template <typename In, typename Sum>
void product(const void* a, const void* w, int m, int n, int k, Sum* sums) {
    const dim3 grid(static_cast<unsigned>(ceil_div(n, kTile)),
                    static_cast<unsigned>(ceil_div(m, kTile)));
    product_kernel<<<grid, dim3(kTile, 8)>>>(static_cast<const In*>(a), static_cast<const In*>(w),
                                             m, n, k, sums);
}

}  // namespace

std::vector<int> layout_order(Type type) {
    constexpr int kRows = 40, kPlaces = 64;
    const int k = 32 / size_of(type);  // rows of 32 bytes, all of them the row's number plus one
    std::vector<uint8_t> weight(kRows * 32), laid_out(kPlaces * 32, 0xff);
    for (int row = 0; row < kRows; ++row) std::memset(&weight[row * 32], row + 1, 32);
    must(swinq_gemm_layout(static_cast<swinq_type>(type), weight.data(), kRows, k,
                           laid_out.data()) == SWINQ_OK
             ? cudaSuccess
             : cudaErrorUnknown,
         "swinq_gemm_layout");
    std::vector<int> order(32, -1);
    for (int place = 0; place < kPlaces; ++place) {
        const int value = laid_out[place * 32];
        for (int i = 1; i < 32; ++i) {
            if (laid_out[place * 32 + i] != value) return {};
        }
        if (place < 32) {
            if (value < 1 || value > 32) return {};
            order[place] = value - 1;
        } else {
            const int row = 32 + order[place - 32];
            if (value != (row < kRows ? row + 1 : 0)) return {};
        }
    }
    return order;
}

GemmProblem::GemmProblem(Type operand, int m, int n, int k)
    : operand_(operand),
      a_(static_cast<int64_t>(m) * k * size_of(operand)),
      w_(static_cast<int64_t>(n) * k * size_of(operand)),
      laid_out_(padded(n) * k * size_of(operand)),
      order_(layout_order(operand)),
      factor_(n),
      bias_(n),
      inverse_(n),
      scale_(n),
      before_(static_cast<int64_t>(m) * n * size_of(stream())),
      sums_(operand == Type::kInt8 ? static_cast<int64_t>(m) * n : 0),
      exact_(static_cast<int64_t>(m) * n),
      exact_activated_(static_cast<int64_t>(m) * n),
      plain_(static_cast<int64_t>(m) * n),
      plain_activated_(static_cast<int64_t>(m) * n) {
    if (order_.size() != 32) must(cudaErrorUnknown, "rows of laid out weights are not in order");
}

void GemmProblem::make(int m, int n, int k, Data data) {
    m_ = m, n_ = n, k_ = k;
    const int64_t count = static_cast<int64_t>(m) * n;
    const int64_t a_count = static_cast<int64_t>(m) * k, w_count = static_cast<int64_t>(n) * k;
    // y has a standard deviation of about one, codes often saturate
    float spread = std::sqrt(static_cast<float>(k)) / 3;
    if (operand_ == Type::kInt8) {
        auto* a = reinterpret_cast<int8_t*>(a_.get());
        auto* w = reinterpret_cast<int8_t*>(w_.get());
        const bool extreme = data == Data::kExtreme, halfway = data == Data::kHalfway;
        fill(a, a_count, next_seed(), halfway ? -1 : -128, halfway ? 1 : extreme ? -128 : 127);
        fill(w, w_count, next_seed(), halfway ? -2 : extreme ? 127 : -127, halfway ? 2 : 127);
        if (extreme) sign_rows_kernel<<<grid_for(w_count), 256>>>(w, w_count, k);
        spread *= 128 * 127;
    } else if (operand_ == Type::kHalf) {
        fill(reinterpret_cast<__half*>(a_.get()), a_count, next_seed(), -1, 1);
        fill(reinterpret_cast<__half*>(w_.get()), w_count, next_seed(), -1 / spread, 1 / spread);
    } else {
        fill(reinterpret_cast<float*>(a_.get()), a_count, next_seed(), -1, 1);
        fill(reinterpret_cast<float*>(w_.get()), w_count, next_seed(), -1 / spread, 1 / spread);
    }
    if (data == Data::kAccumulator || (data == Data::kHalfway && operand_ == Type::kInt8)) {
        const float factor = data == Data::kHalfway ? 0.5f : 1;
        fill(factor_.get(), n, next_seed(), factor, factor);
        fill(bias_.get(), n, next_seed(), 0, 0);
        fill(inverse_.get(), n, next_seed(), 1, 1);
        fill(scale_.get(), n, next_seed(), 1, 1);
    } else {
        fill(factor_.get(), n, next_seed(), 0.5f / spread, 1.5f / spread);
        fill(bias_.get(), n, next_seed(), -0.5f, 0.5f);
        fill(inverse_.get(), n, next_seed(), 30, 130);
        fill(scale_.get(), n, next_seed(), 1 / 130.0f, 1 / 30.0f);
        set_some(factor_.get(), n, next_seed(), 29, 0);
        set_some(inverse_.get(), n, next_seed(), 31, 0);
        set_some(scale_.get(), n, next_seed(), 37, 0);
    }
    if (stream() == Type::kHalf) {
        fill(reinterpret_cast<__half*>(before_.get()), count, next_seed(), -4, 4);
    } else {
        fill(reinterpret_cast<float*>(before_.get()), count, next_seed(), -4, 4);
    }
    lay_out_kernel<<<static_cast<unsigned>(padded(n)), 128>>>(
        w_.get(), order_.get(), n, static_cast<int64_t>(k) * size_of(operand_), laid_out_.get());
    if (operand_ == Type::kInt8) {
        product<int8_t>(a_.get(), w_.get(), m, n, k, sums_.get());
        scale_kernel<<<grid_for(count), 256>>>(sums_.get(), factor_.get(), bias_.get(), count, n,
                                               exact_.get(), plain_.get());
        return;
    }
    if (operand_ == Type::kHalf) {
        product<__half>(a_.get(), w_.get(), m, n, k, exact_.get());
        product<__half>(a_.get(), w_.get(), m, n, k, plain_.get());
    } else {
        product<float>(a_.get(), w_.get(), m, n, k, exact_.get());
        product<float>(a_.get(), w_.get(), m, n, k, plain_.get());
    }
    add_bias_kernel<<<grid_for(count), 256>>>(bias_.get(), count, n, exact_.get(), plain_.get());
}

Expected GemmProblem::expected(Activation activation, int rows) {
    if (activation == Activation::kNone) return {exact_.get(), plain_.get(), rows, n_};
    const int64_t count = static_cast<int64_t>(rows) * n_;
    if (activation == Activation::kGelu) {
        gelu_kernel<<<grid_for(count), 256>>>(exact_.get(), plain_.get(), count,
                                              exact_activated_.get(), plain_activated_.get());
    } else {
        normalise_kernel<<<grid_for(count / kHeadDim), 256>>>(
            exact_.get(), plain_.get(), count / kHeadDim, n_, exact_activated_.get(),
            plain_activated_.get());
    }
    return {exact_activated_.get(), plain_activated_.get(), rows, n_};
}

GemmArguments GemmProblem::arguments(Activation activation, Output output, int rows, void* out,
                                     bool rounded) const {
    GemmArguments g = {};
    g.operand = operand_, g.stream = stream(), g.activation = activation, g.output = output;
    g.a = a_.get(), g.w = laid_out_.get(), g.out = out;
    g.factor = operand_ == Type::kInt8 ? factor_.get() : nullptr;
    g.bias = bias_.get();
    g.out_inverse = output == Output::kCodes || rounded ? inverse_.get() : nullptr;
    g.out_scale = rounded ? scale_.get() : nullptr;
    g.m = rows, g.n = n_, g.k = k_;
    return g;
}

Type output_type(const GemmArguments& g) {
    switch (g.output) {
        case Output::kCodes:
            return Type::kInt8;
        case Output::kHalf:
            return Type::kHalf;
        case Output::kFloat:
            return Type::kFloat;
        default:
            return g.stream;
    }
}

int64_t output_bytes(const GemmArguments& g) {
    return static_cast<int64_t>(g.m) * g.n * size_of(output_type(g));
}

void run_gemm(Group& group, const std::string& label, GemmProblem& problem, Activation activation,
              Output output, bool rounded, int rows, const GemmTile* tile, const Bound& bound,
              GuardedBuffer& out, bool optional) {
    const GemmArguments g = problem.arguments(activation, output, rows, out.get(), rounded);
    const int64_t bytes = output_bytes(g);
    out.poison(bytes);
    const bool adds = output == Output::kResidual;
    if (adds) {
        must(cudaMemcpyAsync(out.get(), problem.before(), bytes, cudaMemcpyDeviceToDevice),
             "copy of the stream");
    }
    Tally* tally = group.run(label, bound, [&] { gemm(g, tile, nullptr); }, optional);
    if (!tally) return;
    const Step step = {output_type(g), g.out_inverse, g.out_scale,
                       adds ? problem.before() : nullptr};
    compare(out.get(), step, problem.expected(activation, rows), bound.kind == Bound::kExact,
            tally);
    out.check_guards(tally);
}

std::vector<GemmTile> tiles_for(const GemmArguments& arguments) {
    std::vector<GemmTile> tiles(64);
    tiles.resize(list_tiles(arguments, tiles.data(), static_cast<int>(tiles.size())));
    return tiles;
}

std::string describe(const GemmProblem& problem, int rows, const GemmTile* tile) {
    std::string text = "m " + std::to_string(rows) + " n " + std::to_string(problem.n()) + " k " +
                       std::to_string(problem.k());
    if (!tile) return text + " default tile";
    return text + (tile->instruction ? " wgmma " : " mma ") + std::to_string(tile->rows) + "x" +
           std::to_string(tile->columns);
}

}  // namespace swinq::testing

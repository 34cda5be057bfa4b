// Host side of the fused MLP: the weights' order, checks, launch. Compiled for sm_90a only.
#include "mlp.h"

#include <algorithm>
#include <utility>

#include "arguments.h"
#include "mlp_kernel.cuh"
#include "mlp_small.cuh"

namespace swinq {
namespace {

// The thread's place in a fragment is free: it takes 8 neighbours (top of mlp_kernel.cuh).
constexpr int channel_of_byte(int byte) {
    return byte % 16 / 4 * 8 + byte / 16 * 4 + byte % 4;
}
constexpr int channel_of_row(int row) {
    return row % 8 / 2 * 8 + row / 8 * 2 + row % 2;
}

// (rows, k) into units of `unit_rows` rows and 32 bytes of k, four units a slab.
void lay_out(const int8_t* weight, int rows, int k, int unit_rows, int8_t* laid_out) {
    const int blocks = k / kGroup;
    for (int unit = 0; unit < rows / unit_rows * blocks; ++unit) {
        int8_t* const slab = laid_out + int64_t{unit / 4} * unit_rows * 128;
        for (int r = 0; r < unit_rows; ++r) {
            const int row =
                unit / blocks * unit_rows + r / kGroup * kGroup + channel_of_row(r % kGroup);
            const int8_t* const from = weight + int64_t{row} * k + unit % blocks * kGroup;
            for (int b = 0; b < kGroup; ++b) {
                slab[swizzle_128(r * 128 + unit % 4 * kGroup + b)] = from[channel_of_byte(b)];
            }
        }
    }
}

bool has_kernel(int channels, int hidden) {
    return (channels == 96 || channels == 128 || channels == 192) &&
           hidden == kExpansion * channels;
}

void require_kernel(int channels, int hidden) {
    if (has_kernel(channels, hidden)) return;
    throw Error(Error::kUnsupported,
                "mlp: " + std::to_string(channels) + " channels, " + std::to_string(hidden) +
                    " hidden; the kernel has 96, 128 or 192 with four times as many\n"
                    "  fix: use prenorm() and two gemm()");
}

// What a struct at a multiple of 1024 takes of a block's shared memory.
template <typename Memory>
constexpr int shared_bytes() {
    constexpr int kBytes = sizeof(Memory) + 1024;  // the start may have to move
    static_assert(kBytes <= 227 * 1024, "shared memory of a block");
    return kBytes;
}

// Both forms give the same bits; a tile is 64 rows.
template <int kChannels>
void launch_mlp(const MlpArguments& arguments, cudaStream_t stream) {
    using S = MlpShape<kChannels>;
    using Small = SmallMlpShape<kChannels>;
    static_assert(S::kPartBytes % 1024 == 0 && (!S::kRing || S::kStagePasses > 0), "stages");
    const int64_t tiles = ceil_div(arguments.m, kRows);
    const bool rounded = arguments.out_scale != nullptr, is_v1 = arguments.operand == nullptr;
    if (is_v1 && arguments.m <= few_rows()) {
        launch_clusters(Small::kParts,
                        rounded ? small_mlp_kernel<Small, true> : small_mlp_kernel<Small, false>,
                        dim3(static_cast<unsigned>(tiles * Small::kParts)), dim3(Small::kThreads),
                        shared_bytes<SmallMlpMemory<Small>>(), stream, arguments);
        return;
    }
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors()));
    const auto v1 = rounded ? mlp_kernel<S, true, true> : mlp_kernel<S, false, true>;
    const auto v2 = rounded ? mlp_kernel<S, true, false> : mlp_kernel<S, false, false>;
    launch(is_v1 ? v1 : v2, dim3(blocks), dim3(kThreads), shared_bytes<MlpMemory<S>>(), stream,
           arguments);
}

}  // namespace

bool mlp_supported(int channels, int hidden) {
    return has_kernel(channels, hidden) && compute_capability() == 90;
}

int mlp_few_rows_v2() {
    return few_rows();
}

void mlp(const MlpArguments& p, cudaStream_t stream) {
    require_kernel(p.channels, p.hidden);
    if (compute_capability() != 90) {
        throw Error(Error::kUnsupported, "mlp: compute capability " +
                                             std::to_string(compute_capability()) +
                                             ", the kernel exists for 90\n"
                                             "  fix: use prenorm() and two gemm()");
    }
    require_matrix("mlp", p.m, p.channels);
    const std::pair<const char*, const void*> pointers[] = {{"x", p.x},
                                                            {"gamma", p.gamma},
                                                            {"beta", p.beta},
                                                            {"fc1_weight", p.fc1_weight},
                                                            {"fc1_factor", p.fc1_factor},
                                                            {"fc1_bias", p.fc1_bias},
                                                            {"hidden_inverse", p.hidden_inverse},
                                                            {"fc2_weight", p.fc2_weight},
                                                            {"fc2_factor", p.fc2_factor},
                                                            {"fc2_bias", p.fc2_bias}};
    for (const auto& [name, pointer] : pointers) require_pointer("mlp", name, pointer);
    if ((p.in_inverse == nullptr) == (p.operand == nullptr)) {
        refuse_argument("mlp", "in_inverse and operand are both given or both null",
                        "pass in_inverse for v1's MLP, operand for v2's");
    }
    if (p.in_inverse != nullptr) require_pointer("mlp", "in_inverse", p.in_inverse);
    if (p.operand != nullptr) require_pointer("mlp", "operand", p.operand);
    if (p.next_inverse != nullptr) require_pointer("mlp", "next_inverse", p.next_inverse);
    if ((p.out_inverse == nullptr) != (p.out_scale == nullptr)) {
        refuse_argument("mlp", "one of out_inverse and out_scale is null, the other is not",
                        "pass both to round the output, or neither");
    }
    if (p.out_scale != nullptr) {
        require_pointer("mlp", "out_inverse", p.out_inverse);
        require_pointer("mlp", "out_scale", p.out_scale);
    }
    if (p.m == 0) return;
    switch (p.channels) {
        case 96:
            return launch_mlp<96>(p, stream);
        case 128:
            return launch_mlp<128>(p, stream);
        case 192:
            return launch_mlp<192>(p, stream);
    }
}

void mlp_layout_fc1(const int8_t* weight, int channels, int hidden, int8_t* laid_out) {
    require_kernel(channels, hidden);
    lay_out(weight, hidden, channels, step_of(channels), laid_out);
}

void mlp_layout_fc2(const int8_t* weight, int channels, int hidden, int8_t* laid_out) {
    require_kernel(channels, hidden);
    lay_out(weight, channels, hidden, channels, laid_out);
}

}  // namespace swinq

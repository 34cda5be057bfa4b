// The fused MLP for few rows, sm_90a only: equations, weights and bits of mlp_kernel.cuh, over more
// multiprocessors.
//
// A cluster of blocks shares a tile of 64 rows. Each of its channels / 16 warpgroups computes 64
// hidden channels from all of the input, hands their codes to every block of the cluster, and then
// computes 16 outputs from all hidden channels. No sum is ever divided, so nothing has to be added
// up again. Every block holds its share of both weights, all of it on its way from the start.
//
// Codes travel as A fragments: the thread that makes one stands where the threads that use it do.
// Of every 32 outputs a warpgroup has half, which is 4 neighbouring channels of a thread's 8.
#pragma once

#include "mlp_kernel.cuh"

namespace swinq {

// Up to this many rows, two multiprocessors a tile, this form is taken.
inline int few_rows() {
    return multiprocessors() / 2 * kRows;
}

template <int kChannels_>
struct SmallMlpShape : MlpShape<kChannels_> {
    using Base = MlpShape<kChannels_>;
    static constexpr int kShareHidden = 64, kShareOutputs = 16;  // of a warpgroup
    static constexpr int kShares = kChannels_ / kShareOutputs;
    static_assert(kShares * kShareHidden == Base::kHidden, "shares of a tile");

    static constexpr int kWarpgroups = kShares % 3 == 0 ? 3 : 4;  // of a block
    static constexpr int kParts = kShares / kWarpgroups;          // blocks of a cluster
    static constexpr int kThreads = kWarpgroups * kWarpgroup;
    static constexpr int kPartHidden = kWarpgroups * kShareHidden;
    static constexpr int kPartOutputs = kWarpgroups * kShareOutputs;
    static_assert(kPartHidden % Base::kStep == 0, "a block's units of fc1");

    // A block's slabs: of fc1 those that its hidden channels touch, of fc2 its rows of all.
    static constexpr int kFc1Units = kPartHidden / Base::kStep * Base::kBlocks;
    static constexpr int kFc1Slabs = (kFc1Units + 3) / 4;
    static constexpr int kFc1SlabBytes = Base::kStep * 128;
    static constexpr int kFc2Slabs = Base::kHidden / 128;
    static constexpr int kFc2SlabBytes = kPartOutputs * 128;
    static_assert(kFc1SlabBytes % 1024 == 0 && kFc2SlabBytes % 1024 == 0, "slabs");

    __host__ __device__ static constexpr int first_fc1_slab(int part) {
        return part * kFc1Units / 4;
    }
    // Where the 32 rows of fc1 from `hidden` on and the 32 bytes of k of `block` lie in a block.
    __host__ __device__ static constexpr uint32_t fc1_offset(int part, int hidden, int block) {
        const int unit = hidden / Base::kStep * Base::kBlocks + block;
        return (unit / 4 - first_fc1_slab(part)) * kFc1SlabBytes + hidden % Base::kStep * 128 +
               unit % 4 * kGroup;
    }
    // Where a warpgroup's 16 rows of fc2 and the 32 bytes of k of `group` lie.
    __host__ __device__ static constexpr uint32_t fc2_offset(int warpgroup, int group) {
        return group / 4 * kFc2SlabBytes + warpgroup * kShareOutputs * 128 + group % 4 * kGroup;
    }
};

template <typename Shape>
struct SmallMlpMemory {
    uint8_t fc1[Shape::kFc1Slabs * Shape::kFc1SlabBytes];
    uint8_t fc2[Shape::kFc2Slabs * Shape::kFc2SlabBytes];
    uint4 hidden[Shape::kHidden / kGroup][kWarpgroup];  // fragments, from all of the cluster
    uint32_t input[Shape::kBlocks][4][kWarpgroup];      // fragments
    MlpConstants<Shape> constants;
    uint64_t constants_full, fc1_full, fc2_full;  // barriers
};

template <typename Shape>
__device__ __forceinline__ void init_barriers(const SmallMlpMemory<Shape>& s) {
    init_barrier(shared_address(&s.constants_full), 1);
    init_barrier(shared_address(&s.fc1_full), 1);
    init_barrier(shared_address(&s.fc2_full), 1);
    publish_barriers();
}

// By one thread: all that block `part` of a cluster needs.
template <typename Shape>
__device__ __forceinline__ void start_copies(const MlpArguments& p, const SmallMlpMemory<Shape>& s,
                                             int part) {
    copy_constants(s.constants, p, shared_address(&s.constants_full));
    const uint32_t fc1_full = shared_address(&s.fc1_full);
    arrive_expecting(fc1_full, sizeof(s.fc1));
    copy_bulk(shared_address(s.fc1),
              p.fc1_weight + Shape::first_fc1_slab(part) * Shape::kFc1SlabBytes, sizeof(s.fc1),
              fc1_full);
    const uint32_t fc2_full = shared_address(&s.fc2_full);
    arrive_expecting(fc2_full, sizeof(s.fc2));
    for (int slab = 0; slab < Shape::kFc2Slabs; ++slab) {
        copy_bulk(shared_address(s.fc2 + slab * Shape::kFc2SlabBytes),
                  p.fc2_weight + slab * (Shape::kChannels * 128) + part * Shape::kFc2SlabBytes,
                  Shape::kFc2SlabBytes, fc2_full);
    }
}

// LayerNorm of the tile's rows, a row a quad of the first eight warps; codes to s.input.
template <typename Shape>
__device__ __forceinline__ void normalize_tile(const MlpArguments& p, SmallMlpMemory<Shape>& s,
                                               int tile) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (warp >= kRows / 8) return;
    const int row = tile * kRows + warp * 8 + lane / 4;
    const __half* const from = static_cast<const __half*>(p.x) +
                               static_cast<int64_t>(row) * Shape::kChannels + lane % 4 * kVector;
    Vector<__half> bits[Shape::kBlocks];
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) {
        if (row < p.m) bits[block].load(from + block * kGroup);
    }
    wait_for_barrier(shared_address(&s.constants_full), 0);
    uint32_t codes[Shape::kBlocks][2];
    normalize<Shape>(codes, bits, p.eps, s.constants);
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            s.input[block][2 * i + warp % 2][warp / 2 * kWarp + lane] = codes[block][i];
        }
    }
}

template <typename Shape, bool kRounded>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    small_mlp_kernel(const __grid_constant__ MlpArguments p) {
    constexpr int kBlocks = Shape::kBlocks, kHiddenGroups = Shape::kHidden / kGroup;
    constexpr int kGroups = Shape::kShareHidden / kGroup;
    static_assert(kGroups == 2, "two chains of fc1");
    extern __shared__ uint8_t shared[];
    auto& s = *reinterpret_cast<SmallMlpMemory<Shape>*>(shared + (-shared_address(shared) & 1023u));

    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);  // uniform
    const int part = static_cast<int>(blockIdx.x) % Shape::kParts;
    const int tile = static_cast<int>(blockIdx.x) / Shape::kParts;
    const int share = part * Shape::kWarpgroups + warpgroup;
    const bool copies = threadIdx.x == Shape::kThreads - kWarp;  // of a warp without LayerNorm
    if (copies) init_barriers(s);
    __syncthreads();
    arrive_at_cluster();
    if (copies) start_copies(p, s, part);
    __syncwarp();
    wait_for_predecessor();
    let_successor_start();

    // What the thread will add to: 4 channels of rows g and g + 8.
    const int row = tile * kRows + thread / kWarp * 16 + thread % kWarp / 4;
    const int channel = share / 2 * kGroup + thread % 4 * kVector + share % 2 * 4;
    __half* const x =
        static_cast<__half*>(p.x) + static_cast<int64_t>(row) * Shape::kChannels + channel;
    uint2 before[2] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        if (row + 8 * h < p.m) {
            before[h] = *reinterpret_cast<const uint2*>(x + 8 * h * Shape::kChannels);
        }
    }
    normalize_tile(p, s, tile);
    __syncthreads();
    wait_for_barrier(shared_address(&s.constants_full), 0);  // also for the warps without LayerNorm

    uint32_t input[kBlocks][4];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) input[block][i] = s.input[block][i][thread];
    }
    wait_for_barrier(shared_address(&s.fc1_full), 0);
    const uint64_t fc1 = tile_descriptor(shared_address(s.fc1));
    int sums[kGroups][kGroup / 2];
    begin_products();
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            const uint32_t at =
                Shape::fc1_offset(part, share * Shape::kShareHidden + i * kGroup, block);
            Products<kGroup>::s8(sums[i], input[block], move_descriptor(fc1, at / 16), block > 0);
        }
        commit_products();
    }

    auto hand_over = [&](int i) {
        const int group = share * kGroups + i;
        uint32_t codes[4];
        hold(sums[i]);
        activate<Shape>(codes, sums[i], 0, group * kGroup + thread % 4 * kVector, s.constants);
        const uint32_t to = shared_address(&s.hidden[group][thread]);
#pragma unroll
        for (int to_part = 0; to_part < Shape::kParts; ++to_part) {
            store_remote(remote_address(to, to_part),
                         make_uint4(codes[0], codes[1], codes[2], codes[3]));
        }
    };
    wait_for_cluster();  // all its blocks have started
    wait_for_products<1>();
    hand_over(0);
    wait_for_products<0>();
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) hold(input[block]);
    hand_over(1);
    arrive_at_cluster();
    wait_for_barrier(shared_address(&s.fc2_full), 0);
    wait_for_cluster();  // all codes are here, all of x is read

    const uint64_t fc2 = tile_descriptor(shared_address(s.fc2));
    uint32_t hidden[kHiddenGroups][4];
    int outputs[Shape::kShareOutputs / 2];
#pragma unroll
    for (int first = 0; first < kHiddenGroups; first += kBlocks) {
#pragma unroll
        for (int group = first; group < first + kBlocks; ++group) {
            const uint4 codes = s.hidden[group][thread];
            hidden[group][0] = codes.x, hidden[group][1] = codes.y;
            hidden[group][2] = codes.z, hidden[group][3] = codes.w;
        }
        begin_products();
#pragma unroll
        for (int group = first; group < first + kBlocks; ++group) {
            const uint32_t at = Shape::fc2_offset(warpgroup, group);
            Products<Shape::kShareOutputs>::s8(outputs, hidden[group],
                                               move_descriptor(fc2, at / 16), group > 0);
        }
        commit_products();
    }
    float factor[4], bias[4], inverse[4], scale[4];
    load_shared(factor, s.constants.fc2_factor + channel);
    load_shared(bias, s.constants.fc2_bias + channel);
    if constexpr (kRounded) {
        load_shared(inverse, s.constants.out_inverse + channel);
        load_shared(scale, s.constants.out_scale + channel);
    }
    wait_for_products<0>();
    hold(outputs);
#pragma unroll
    for (int group = 0; group < kHiddenGroups; ++group) hold(hidden[group]);

#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float2 low = unpack_half(before[h].x), high = unpack_half(before[h].y);
        const float old[4] = {low.x, low.y, high.x, high.y};
        float y[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int sum = outputs[c / 2 * 4 + h * 2 + c % 2];
            y[c] = __fadd_rn(old[c], output<kRounded>(sum, c, factor, bias, inverse, scale));
        }
        if (row + 8 * h < p.m) {
            *reinterpret_cast<uint2*>(x + 8 * h * Shape::kChannels) =
                make_uint2(pack_half(y[0], y[1]), pack_half(y[2], y[3]));
        }
    }
}

}  // namespace swinq

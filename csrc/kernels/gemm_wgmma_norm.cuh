// A GEMM of fp16 operands into the residual stream together with a LayerNorm over its rows, sm_90
// only: csrc/NUMERICS.md, "Norm in the epilogue". It spares a pass over the stream and a launch.
//
// The blocks of a row of tiles form a cluster. Each finds mean and sum of squared deviations of its
// own columns, all from registers; they exchange them through distributed shared memory and combine
// them in a fixed order (Chan, Golub, LeVeque 1983). The width of a tile depends on n alone, so a
// row's bits do not depend on the batch.
#pragma once

#include "gemm_wgmma.cuh"

namespace swinq {

constexpr int kMostBlocksInCluster = 8;

struct NormArguments {
    EpilogueArguments epilogue;
    const float* gamma;
    const float* beta;
    const float* inverse;
    int8_t* operand;  // or null
    float eps;
    bool residual;  // add to the stream
};

// Into the same place in block `rank` of the cluster.
__device__ __forceinline__ void store_remote(uint32_t shared, int rank, float2 value) {
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(remote_address(shared, rank)),
                 "f"(value.x), "f"(value.y)
                 : "memory");
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    gemm_norm_kernel(const __grid_constant__ CUtensorMap map_a,
                     const __grid_constant__ CUtensorMap map_w, int k_bytes, int stages, int blocks,
                     NormArguments norm) {
    constexpr int kGroups = Tile::kColumns / kGroup;
    __shared__ float2 s_moments[kMostBlocksInCluster][Tile::kRows];
    const EpilogueArguments& epilogue = norm.epilogue;
    if (blocks > 1) arrive_at_cluster();
    Pipeline<Tile> pipeline(map_a, map_w, epilogue.m, epilogue.n, k_bytes, stages);
    const Place<Tile> place(blockIdx.x, pipeline.tiles_across());
    prefetch_channels<Tile::kColumns>(epilogue, place.column);
    if (norm.residual) {
        prefetch_stream<Tile::kRows, Tile::kColumns, Tile::kThreads>(epilogue, place.row,
                                                                     place.column);
    }
    float acc[Tile::kColumns / 2];
    pipeline.multiply_tile(acc);

    const int lane = threadIdx.x % kWarp;
    const int local_row = static_cast<int>(threadIdx.x / kWarp) * 16 + lane / 4;
    const int channel = place.column + lane % 4 * kChannels;
    auto at = [&](int group, int half) {
        return static_cast<int64_t>(place.row + local_row + half * 8) * epilogue.n + channel +
               group * kGroup;
    };
    const bool valid[2] = {place.row + local_row < epilogue.m,
                           place.row + local_row + 8 < epilogue.m};

    // what is to be normalised, in the accumulators' registers
    float v[kGroups][2][kChannels];
    float sum[2] = {0, 0};
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        float(&rows)[2][kChannels] = v[group];
        const int first = channel + group * kGroup;
        float bias[kChannels];
        load_channels(bias, epilogue.bias + first);
#pragma unroll
        for (int i = 0; i < 2 * kChannels; ++i) {
            const int half = i / kChannels, c = i % kChannels;
            rows[half][c] = __fadd_rn(acc[(group * 4 + c / 2) * 4 + half * 2 + c % 2], bias[c]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float(&y)[kChannels] = rows[half];
#pragma unroll
            for (int i = 0; i < kChannels; ++i) sum[half] += y[i];
        }
    }

    float mean[2], scale[2];  // of a row; scale 1 / standard deviation
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        mean[half] = quad_sum(sum[half]) * (1.0f / Tile::kColumns);
        float squares = 0;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
#pragma unroll
            for (int i = 0; i < kChannels; ++i) {
                const float deviation = v[group][half][i] - mean[half];
                squares = __fmaf_rn(deviation, deviation, squares);
            }
        }
        scale[half] = quad_sum(squares);
    }
    if (blocks > 1) {
        const int rank = static_cast<int>(blockIdx.x) % blocks;
        wait_for_cluster();  // all its blocks have started
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t to = shared_address(&s_moments[rank][local_row + half * 8]);
            for (int peer = lane % 4; peer < blocks; peer += 4) {
                store_remote(to, peer, make_float2(mean[half], scale[half]));
            }
        }
        arrive_at_cluster();
        wait_for_cluster();  // all moments are here
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float means = 0, squares = 0;
            for (int block = 0; block < blocks; ++block) {
                const float2 moments = s_moments[block][local_row + half * 8];
                means += moments.x;
                squares += moments.y;
            }
            mean[half] = means / static_cast<float>(blocks);
            for (int block = 0; block < blocks; ++block) {
                const float apart = s_moments[block][local_row + half * 8].x - mean[half];
                squares = __fmaf_rn(apart * apart, Tile::kColumns, squares);
            }
            scale[half] = squares;
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        scale[half] = rsqrtf(scale[half] / static_cast<float>(epilogue.n) + norm.eps);
    }

#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        float gamma[kChannels], beta[kChannels], inverse[kChannels];
        const int first = channel + group * kGroup;
        load_channels(gamma, norm.gamma + first);
        load_channels(beta, norm.beta + first);
        if (norm.operand) load_channels(inverse, norm.inverse + first);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (!valid[half]) continue;
            float(&y)[kChannels] = v[group][half];
#pragma unroll
            for (int i = 0; i < kChannels; ++i) {
                y[i] = __fmaf_rn(__fmul_rn(y[i] - mean[half], scale[half]), gamma[i], beta[i]);
            }
            if (norm.residual) add_stream<Type::kHalf>(y, epilogue.out, at(group, half));
            store_stream<Type::kHalf>(y, epilogue.out, at(group, half));
            if (!norm.operand) continue;
#pragma unroll
            for (int i = 0; i < kChannels; ++i) y[i] = __half2float(__float2half_rn(y[i]));
            store_codes(y, inverse, norm.operand, at(group, half));
        }
    }
}

}  // namespace swinq

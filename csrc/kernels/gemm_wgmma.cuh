// GEMM on wgmma, sm_90 only: the copy engine fills a ring of shared memory stages (128 bytes of k
// each), warpgroups of 64 rows multiply from there, both operands read in place.
//
// Small products of Swin have few slabs and long epilogues, so blocks do not specialise warps: several
// blocks share an SM, and one block's epilogue runs beside another's products. Thread 0 refills a
// stage as soon as all warpgroups are done with it.
#pragma once

#include <algorithm>

#include "epilogue.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace swinq {

template <int kWarpgroups_, int kColumns_, int kStages_, int kBlocksPerSm_>
struct WgmmaTile {
    static constexpr int kWarpgroups = kWarpgroups_;
    static constexpr int kRows = 64 * kWarpgroups, kColumns = kColumns_;
    static constexpr int kThreads = 128 * kWarpgroups;
    static constexpr int kStages = kStages_;  // most; fewer where k is short
    static constexpr int kBlocksPerSm = kBlocksPerSm_;
    static constexpr int kSlab = 128;  // bytes of k
    static constexpr int kBytesA = kRows * kSlab, kStageBytes = (kRows + kColumns) * kSlab;

    // The swizzle wants stages at multiples of 1,024 bytes.
    static int shared_bytes(int stages) { return stages * kStageBytes + 1024; }
};

// A box of the map (slab_map: 128 bytes a row) from byte `k` and row `row` on; completes on `barrier`.
__device__ __forceinline__ void copy_box(uint32_t shared, const CUtensorMap* map, uint32_t barrier,
                                         int k, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4}], [%2];" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(k), "r"(row)
        : "memory");
}

template <int kCount>
__device__ __forceinline__ void multiply(int (&d)[kCount], uint64_t a, uint64_t w, int accumulate) {
    Products<2 * kCount>::s8(d, a, w, accumulate);
}
template <int kCount>
__device__ __forceinline__ void multiply(float (&d)[kCount], uint64_t a, uint64_t w,
                                         int accumulate) {
    Products<2 * kCount>::f16(d, a, w, accumulate);
}

// acc := the tile's products. `row` and `column`: the first of the tile in a and w. Also orders the
// kernel behind its predecessor. Every thread of the block must call.
template <typename Tile, typename Accumulator>
__device__ __forceinline__ void multiply_tile(Accumulator (&acc)[Tile::kColumns / 2],
                                              const CUtensorMap& map_a, const CUtensorMap& map_w,
                                              int k_bytes, int stages, int row, int column) {
    extern __shared__ uint8_t shared[];
    __shared__ __align__(8) uint64_t s_full[Tile::kStages], s_empty[Tile::kStages];
    const uint32_t ring = (shared_address(shared) + 1023) & ~1023u;
    const uint32_t full = shared_address(s_full), empty = shared_address(s_empty);
    const int warpgroup = threadIdx.x / kWarpgroup;
    const int slabs = (k_bytes + Tile::kSlab - 1) / Tile::kSlab;

    auto load_w = [&](int slab, int stage) {
        arrive_expecting(full + 8 * stage, Tile::kStageBytes);
        copy_box(ring + stage * Tile::kStageBytes + Tile::kBytesA, &map_w, full + 8 * stage,
                 slab * Tile::kSlab, column);
    };
    auto load_a = [&](int slab, int stage) {
        copy_box(ring + stage * Tile::kStageBytes, &map_a, full + 8 * stage, slab * Tile::kSlab, row);
    };

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < stages; ++stage) {
            init_barrier(full + 8 * stage, 1);
            init_barrier(empty + 8 * stage, Tile::kWarpgroups);
        }
        publish_barriers();
        for (int stage = 0; stage < stages; ++stage) load_w(stage, stage);
    }
    wait_for_predecessor();
    let_successor_start();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < stages; ++stage) load_a(stage, stage);
    }
    __syncthreads();  // the barriers are initialised for all

    int stage = 0, phase = 0, previous = 0, previous_phase = 0;
    for (int slab = 0; slab < slabs; ++slab) {
        wait_for_barrier(full + 8 * stage, phase);
        const uint32_t a = ring + stage * Tile::kStageBytes + warpgroup * 64 * Tile::kSlab;
        const uint32_t w = ring + stage * Tile::kStageBytes + Tile::kBytesA;
        // k beyond the matrix is zeros: a short last slab costs a few idle products, no branch
        begin_products();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            multiply(acc, tile_descriptor(a + step * 32), tile_descriptor(w + step * 32),
                     slab + step > 0);
        }
        commit_products();
        const int refill = slab - 1 + stages;
        if (slab > 0 && refill < slabs) {
            wait_for_products<1>();  // those of the slab before are done
            if (threadIdx.x % kWarpgroup == 0) arrive(empty + 8 * previous);
            if (threadIdx.x == 0) {
                wait_for_barrier(empty + 8 * previous, previous_phase);
                load_w(refill, previous);
                load_a(refill, previous);
            }
        }
        previous = stage, previous_phase = phase;
        if (++stage == stages) stage = 0, phase ^= 1;
    }
    wait_for_products<0>();
    hold(acc);
}

// Blocks of one row of tiles are neighbours, so that they share a's rows in L2.
template <typename Tile>
struct Place {
    int row, column;

    __device__ __forceinline__ explicit Place(int n) {
        const int tiles_across = (n + Tile::kColumns - 1) / Tile::kColumns;
        row = static_cast<int>(blockIdx.x / tiles_across) * Tile::kRows;
        column = static_cast<int>(blockIdx.x % tiles_across) * Tile::kColumns;
    }
};

template <Type kOperand, typename Tile, typename Epilogue>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    gemm_wgmma_kernel(const __grid_constant__ CUtensorMap map_a,
                      const __grid_constant__ CUtensorMap map_w, int k_bytes, int stages,
                      EpilogueArguments epilogue) {
    using Accumulator = typename Number<kOperand>::Accumulator;
    Accumulator acc[Tile::kColumns / 2];
    const Place<Tile> place(epilogue.n);
    multiply_tile<Tile>(acc, map_a, map_w, k_bytes, stages, place.row, place.column);
    using Fragments = const Accumulator(&)[1][Tile::kColumns / 8][4];
    Epilogue::run(reinterpret_cast<Fragments>(acc), epilogue,
                  place.row + static_cast<int>(threadIdx.x / kWarp) * 16, place.column);
}

// Stages that a product of this k needs.
template <typename Tile>
int stages_for(int k_bytes) {
    return static_cast<int>(std::min<int64_t>(Tile::kStages, ceil_div(k_bytes, Tile::kSlab)));
}

template <Type kOperand, typename Tile, typename Epilogue>
void launch_wgmma_tile(const GemmArguments& g, const EpilogueArguments& epilogue, unsigned blocks,
                       cudaStream_t stream) {
    const int k_bytes = g.k * size_of(kOperand);
    const int padded_n = static_cast<int>(ceil_div(g.n, kGroup)) * kGroup;
    const int stages = stages_for<Tile>(k_bytes);
    launch(gemm_wgmma_kernel<kOperand, Tile, Epilogue>, dim3(blocks), dim3(Tile::kThreads),
           Tile::shared_bytes(stages), stream, slab_map(g.a, g.m, k_bytes, Tile::kRows),
           slab_map(g.w, padded_n, k_bytes, Tile::kColumns), k_bytes, stages, epilogue);
}

}  // namespace swinq

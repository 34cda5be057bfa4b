// The int8 GEMM for few rows and many channels, sm_90 only: four warpgroups share a tile of 64 x
// 64, each takes every fourth slab of k through a ring of its own, and their sums are added.
// Integers have no order, so the bits are those of the other kernels. At batch 1 most
// multiprocessors have no tile at all and what counts is how long one tile takes.
#pragma once

#include "gemm_wgmma.cuh"

namespace swinq {

struct SplitTile {
    static constexpr int kRows = 64, kColumns = 64, kWarpgroups = 4, kStages = 3;  // a warpgroup
    static constexpr int kThreads = kWarpgroups * kWarpgroup;
    static constexpr int kSlab = 128;  // bytes of k
    static constexpr int kBytesA = kRows * kSlab, kStageBytes = (kRows + kColumns) * kSlab;
    static constexpr int kSharedBytes = kWarpgroups * kStages * kStageBytes + 1024;
    static constexpr int kLeastSlabs =
        2 * kWarpgroups;  // below, the addition costs more than it spares
};

template <typename Epilogue>
__global__ void __launch_bounds__(SplitTile::kThreads, 1)
    gemm_split_kernel(const __grid_constant__ CUtensorMap map_a,
                      const __grid_constant__ CUtensorMap map_w, int k_bytes,
                      EpilogueArguments epilogue) {
    using Tile = SplitTile;
    constexpr int kSums = Tile::kColumns / 2;
    extern __shared__ uint8_t shared[];
    __shared__ __align__(8) uint64_t s_full[Tile::kWarpgroups * Tile::kStages];
    const int warpgroup = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
    const int slabs = (k_bytes + Tile::kSlab - 1) / Tile::kSlab;
    const int own = (slabs - warpgroup + Tile::kWarpgroups - 1) / Tile::kWarpgroups;
    const Place<Tile> place(blockIdx.x, (epilogue.n + Tile::kColumns - 1) / Tile::kColumns);
    const uint32_t base = (shared_address(shared) + 1023) & ~1023u;
    const uint32_t ring = base + warpgroup * Tile::kStages * Tile::kStageBytes;
    const uint32_t full = shared_address(s_full + warpgroup * Tile::kStages);

    auto load_w = [&](int i, int stage) {
        arrive_expecting(full + 8 * stage, Tile::kStageBytes);
        copy_box(ring + stage * Tile::kStageBytes + Tile::kBytesA, &map_w, full + 8 * stage,
                 (i * Tile::kWarpgroups + warpgroup) * Tile::kSlab, place.column);
    };
    auto load_a = [&](int i, int stage) {
        copy_box(ring + stage * Tile::kStageBytes, &map_a, full + 8 * stage,
                 (i * Tile::kWarpgroups + warpgroup) * Tile::kSlab, place.row);
    };
    const int first = min(own, Tile::kStages);
    if (thread == 0) {
        for (int stage = 0; stage < Tile::kStages; ++stage) init_barrier(full + 8 * stage, 1);
        publish_barriers();
        for (int i = 0; i < first; ++i) load_w(i, i);
    }
    prefetch_channels<Tile::kColumns>(epilogue, place.column);
    wait_for_predecessor();
    let_successor_start();
    if (thread == 0) {
        for (int i = 0; i < first; ++i) load_a(i, i);
    }
    __syncthreads();  // the barriers are initialised for all

    const int warp_row = place.row + thread / kWarp * 16;
    constexpr int kAhead = Epilogue::kAddsStream ? Tile::kColumns / kGroup : 0;
    StreamRows<kAhead> stream;
    if constexpr (kAhead > 0) {
        if (warpgroup == 0) stream = decltype(stream)::load(epilogue, warp_row, place.column);
    }
    int acc[kSums];
    int stage = 0, phase = 0, previous = 0;
    for (int i = 0; i < own; ++i) {
        wait_for_barrier(full + 8 * stage, phase);
        const uint32_t a = ring + stage * Tile::kStageBytes, w = a + Tile::kBytesA;
        begin_products();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            multiply(acc, tile_descriptor(a + step * 32), tile_descriptor(w + step * 32),
                     i + step > 0);
        }
        commit_products();
        const int refill = i - 1 + Tile::kStages;
        if (i > 0 && refill < own) {
            wait_for_products<1>();
            if (thread == 0) {
                load_w(refill, previous);
                load_a(refill, previous);
            }
        }
        previous = stage;
        if (++stage == Tile::kStages) stage = 0, phase ^= 1;
    }
    wait_for_products<0>();
    hold(acc);

    // the rings are read; the others' sums take their place
    __syncthreads();
    int* sums = reinterpret_cast<int*>(shared + (base - shared_address(shared)));
    if (warpgroup > 0) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            sums[((warpgroup - 1) * kSums + i) * kWarpgroup + thread] = acc[i];
        }
    }
    __syncthreads();
    if (warpgroup > 0) return;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
#pragma unroll
        for (int other = 0; other < Tile::kWarpgroups - 1; ++other) {
            acc[i] += sums[(other * kSums + i) * kWarpgroup + thread];
        }
    }
    using Fragments = const int(&)[1][Tile::kColumns / 8][4];
    Epilogue::template run<1, Tile::kColumns / 8, kAhead>(reinterpret_cast<Fragments>(acc),
                                                          epilogue, warp_row, place.column, stream);
}

// Whether a product is short of tiles and rich in slabs.
inline bool is_split_better(const GemmArguments& g) {
    const int64_t tiles = ceil_div(g.m, SplitTile::kRows) * ceil_div(g.n, SplitTile::kColumns);
    return g.operand == Type::kInt8 && tiles <= multiprocessors() &&
           ceil_div(g.k, SplitTile::kSlab) >= SplitTile::kLeastSlabs;
}

template <typename Epilogue>
void launch_split(const GemmArguments& g, const EpilogueArguments& epilogue, unsigned tiles,
                  cudaStream_t stream) {
    const int padded_n = static_cast<int>(ceil_div(g.n, kGroup)) * kGroup;
    launch(gemm_split_kernel<Epilogue>, dim3(tiles), dim3(SplitTile::kThreads),
           SplitTile::kSharedBytes, stream, slab_map(g.a, g.m, g.k, SplitTile::kRows),
           slab_map(g.w, padded_n, g.k, SplitTile::kColumns), g.k, epilogue);
}

}  // namespace swinq

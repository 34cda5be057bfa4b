// GEMM on wgmma, sm_90 only: the copy engine fills a ring of shared memory stages (128 bytes of k
// each), warpgroups of 64 rows multiply from there, both operands read in place.
//
// Small products of Swin have few slabs and long epilogues, so blocks do not specialise warps:
// several blocks share a multiprocessor, and one block's epilogue runs beside another's products.
// Tried and lost on an H100: a warp that only loads (it takes a quarter of the registers), and
// clusters whose blocks share a's rows by multicast (they wait for each other longer than L2 would
// have taken).
#pragma once

#include <algorithm>
#include <atomic>

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
    // Groups of the stream read before the products, as the registers beside the accumulators
    // allow; without any, L1 gets the lines.
    static constexpr int kSpare = 65536 / (kThreads * kBlocksPerSm) - kColumns / 2;
    static constexpr int kAhead = kSpare < 72 ? 0 : kSpare < 80 ? 2 : std::min(3, kColumns / 32);

    // The swizzle wants stages at multiples of 1,024 bytes.
    static int shared_bytes(int stages) { return stages * kStageBytes + 1024; }
};

// A box of the map (slab_map: 128 bytes a row) from byte `k` and row `row` on; completes on
// `barrier`.
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

// Of the threads that call this for a slab, one a warpgroup, true for the last.
template <int kWarpgroups>
__device__ __forceinline__ bool is_last(uint32_t counter) {
    if constexpr (kWarpgroups == 1) return true;
    uint32_t before;
    asm volatile("atom.acq_rel.cta.shared::cta.add.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "r"(counter)
                 : "memory");
    return before % kWarpgroups == kWarpgroups - 1;
}

// A tile of a product. Those of the same rows are neighbours, so that they share a in L2; a block
// takes every gridDim.x-th.
template <typename Tile>
struct Place {
    int tile, row, column;

    __device__ __forceinline__ Place(int tile, int tiles_across)
        : tile(tile),
          row(tile / tiles_across * Tile::kRows),
          column(tile % tiles_across * Tile::kColumns) {}
};

// A slab of a tile, and on to the next, which may be the first of the block's next tile.
template <typename Tile>
struct Cursor {
    Place<Tile> place;
    int slab;

    __device__ __forceinline__ void advance(int slabs, int tiles, int tiles_across) {
        if (++slab < slabs) return;
        slab = 0;
        place.tile += static_cast<int>(gridDim.x);
        // no division where it is the last, which would delay the start of a small product
        if (place.tile < tiles) place = Place<Tile>(place.tile, tiles_across);
    }
};

// What keeps the ring full: slabs of this block's tiles, one tile's after the other's, so that a
// tile's first slabs arrive during the epilogue of the one before.
template <typename Tile>
class Pipeline {
  public:
    // Starts loading. Also orders the kernel behind its predecessor. Every thread of the block.
    __device__ __forceinline__ Pipeline(const CUtensorMap& map_a, const CUtensorMap& map_w, int m,
                                        int n, int k_bytes, int stages)
        : map_a_(map_a),
          map_w_(map_w),
          slabs_((k_bytes + Tile::kSlab - 1) / Tile::kSlab),
          stages_(stages),
          tiles_across_((n + Tile::kColumns - 1) / Tile::kColumns),
          tiles_((m + Tile::kRows - 1) / Tile::kRows * tiles_across_),
          next_{Place<Tile>(blockIdx.x, tiles_across_), 0} {
        extern __shared__ uint8_t shared[];
        __shared__ __align__(8) uint64_t s_full[Tile::kStages];
        __shared__ uint32_t s_done[Tile::kStages];  // warpgroups that are done with a stage, ever
        ring_ = (shared_address(shared) + 1023) & ~1023u;
        full_ = shared_address(s_full);
        done_ = shared_address(s_done);
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < stages_; ++stage) {
                init_barrier(full_ + 8 * stage, 1);
                s_done[stage] = 0;
            }
            publish_barriers();
        }
        // weights do not wait for the kernel before
        const Cursor<Tile> first = next_;
        for (int stage = 0; stage < stages_ && next_.place.tile < tiles_; ++stage) {
            if (threadIdx.x == 0) load_w(stage);
            next_.advance(slabs_, tiles_, tiles_across_);
        }
        wait_for_predecessor();
        let_successor_start();
        next_ = first;
        for (int stage = 0; stage < stages_ && next_.place.tile < tiles_; ++stage) {
            if (threadIdx.x == 0) load_a(stage);
            next_.advance(slabs_, tiles_, tiles_across_);
        }
        __syncthreads();  // the barriers are initialised for all
    }

    __device__ __forceinline__ int tiles() const { return tiles_; }
    __device__ __forceinline__ int tiles_across() const { return tiles_across_; }

    // acc := the products of the warpgroup's 64 rows of this block's next tile.
    template <typename Accumulator>
    __device__ __forceinline__ void multiply_tile(Accumulator (&acc)[Tile::kColumns / 2]) {
        const uint32_t own_rows = threadIdx.x / kWarpgroup * 64 * Tile::kSlab;
        int previous = 0;
        for (int slab = 0; slab < slabs_; ++slab) {
            wait_for_barrier(full_ + 8 * stage_, phase_);
            const uint32_t a = ring_ + stage_ * Tile::kStageBytes + own_rows;
            const uint32_t w = ring_ + stage_ * Tile::kStageBytes + Tile::kBytesA;
            // k beyond the matrix is zeros: a short last slab costs a few idle products, no branch
            begin_products();
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                multiply(acc, tile_descriptor(a + step * 32), tile_descriptor(w + step * 32),
                         slab + step > 0);
            }
            commit_products();
            if (slab > 0 && next_.place.tile < tiles_) {
                wait_for_products<1>();  // those of the slab before are done
                refill(previous);
            }
            previous = stage_;
            if (++stage_ == stages_) stage_ = 0, phase_ ^= 1;
        }
        wait_for_products<0>();
        hold(acc);
        refill(previous);
    }

  private:
    __device__ __forceinline__ void load_w(int stage) const {
        arrive_expecting(full_ + 8 * stage, Tile::kStageBytes);
        copy_box(ring_ + stage * Tile::kStageBytes + Tile::kBytesA, &map_w_, full_ + 8 * stage,
                 next_.slab * Tile::kSlab, next_.place.column);
    }

    __device__ __forceinline__ void load_a(int stage) const {
        copy_box(ring_ + stage * Tile::kStageBytes, &map_a_, full_ + 8 * stage,
                 next_.slab * Tile::kSlab, next_.place.row);
    }

    // Nobody waits here: the warpgroup that lets a stage go last refills it.
    __device__ __forceinline__ void refill(int stage) {
        if (next_.place.tile >= tiles_) return;
        if (threadIdx.x % kWarpgroup == 0 && is_last<Tile::kWarpgroups>(done_ + 4 * stage)) {
            load_w(stage);
            load_a(stage);
        }
        next_.advance(slabs_, tiles_, tiles_across_);
    }

    const CUtensorMap& map_a_;
    const CUtensorMap& map_w_;
    const int slabs_, stages_, tiles_across_, tiles_;
    uint32_t ring_, full_, done_;
    int stage_ = 0, phase_ = 0;
    Cursor<Tile> next_;  // what is loaded next
};

template <Type kOperand, typename Tile, typename Epilogue>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    gemm_wgmma_kernel(const __grid_constant__ CUtensorMap map_a,
                      const __grid_constant__ CUtensorMap map_w, int k_bytes, int stages,
                      EpilogueArguments epilogue) {
    using Accumulator = typename Number<kOperand>::Accumulator;
    using Fragments = const Accumulator(&)[1][Tile::kColumns / 8][4];
    constexpr int kAhead = Epilogue::kAddsStream ? Tile::kAhead : 0;
    Pipeline<Tile> pipeline(map_a, map_w, epilogue.m, epilogue.n, k_bytes, stages);
    for (int tile = blockIdx.x; tile < pipeline.tiles(); tile += static_cast<int>(gridDim.x)) {
        const Place<Tile> place(tile, pipeline.tiles_across());
        const int warp_row = place.row + static_cast<int>(threadIdx.x / kWarp) * 16;
        prefetch_channels<Tile::kColumns>(epilogue, place.column);
        StreamRows<kAhead> stream;
        if constexpr (kAhead > 0) {
            stream = decltype(stream)::load(epilogue, warp_row, place.column);
        } else if constexpr (Epilogue::kAddsStream) {
            prefetch_stream<Tile::kRows, Tile::kColumns, Tile::kThreads>(epilogue, place.row,
                                                                         place.column);
        }
        Accumulator acc[Tile::kColumns / 2];
        pipeline.multiply_tile(acc);
        Epilogue::template run<1, Tile::kColumns / 8, kAhead>(
            reinterpret_cast<Fragments>(acc), epilogue, warp_row, place.column, stream);
    }
}

// Stages for this k: a tile's slabs and the first of the next.
template <typename Tile>
int stages_for(int k_bytes) {
    return static_cast<int>(std::min<int64_t>(Tile::kStages, ceil_div(k_bytes, Tile::kSlab) + 1));
}

// Blocks of a kernel that fit into the device at once; asked once for each number of stages.
template <typename Tile>
unsigned resident_blocks(const void* kernel, int stages,
                         std::atomic<int> (&known)[Tile::kStages + 1]) {
    int blocks = known[stages].load(std::memory_order_relaxed);
    if (blocks == 0) {
        const int bytes = Tile::shared_bytes(stages);
        allow_shared_memory(kernel, Tile::shared_bytes(Tile::kStages));
        check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, Tile::kThreads,
                                                                 static_cast<size_t>(bytes)),
                   "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
        known[stages].store(blocks, std::memory_order_relaxed);
    }
    return static_cast<unsigned>(blocks * multiprocessors());
}

template <Type kOperand, typename Tile, typename Epilogue>
void launch_wgmma_tile(const GemmArguments& g, const EpilogueArguments& epilogue, unsigned tiles,
                       cudaStream_t stream) {
    static std::atomic<int> known[Tile::kStages + 1];
    const auto kernel = gemm_wgmma_kernel<kOperand, Tile, Epilogue>;
    const int k_bytes = g.k * size_of(kOperand);
    const int padded_n = static_cast<int>(ceil_div(g.n, kGroup)) * kGroup;
    const int stages = stages_for<Tile>(k_bytes);
    const unsigned resident =
        resident_blocks<Tile>(reinterpret_cast<const void*>(kernel), stages, known);
    launch(kernel, dim3(std::min(tiles, resident)), dim3(Tile::kThreads),
           Tile::shared_bytes(stages), stream, slab_map(g.a, g.m, k_bytes, Tile::kRows),
           slab_map(g.w, padded_n, k_bytes, Tile::kColumns), k_bytes, stages, epilogue);
}

}  // namespace swinq

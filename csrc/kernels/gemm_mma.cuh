// GEMM on mma.sync: every GPU from sm_75 on, and small problems on sm_90.
//
// A block computes kRows x kColumns; its warps split them. Slabs of 64 bytes of k flow through a
// ring of shared memory stages (cp.async), from there by ldmatrix into fragments. Operands are
// addressed in bytes, so int8 (k 32 a step), fp16 (16) and fp32 (8) share all of it.
#pragma once

#include "epilogue.cuh"

namespace swinq {

template <int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_, int kStages_>
struct MmaTile {
    static constexpr int kRows = kRows_, kColumns = kColumns_;
    static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
    static constexpr int kStages = kStages_;
    static constexpr int kWarpsDown = kRows / kWarpRows;
    static constexpr int kThreads = kWarpsDown * (kColumns / kWarpColumns) * kWarp;
    // what registers are allotted for; two of the largest would spill on sm_75
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    static constexpr int kBlocksPerSm = kThreads > 128 ? 1 : 2;
#else
    static constexpr int kBlocksPerSm = 2;
#endif
    static constexpr int kSlab = 64;  // bytes of k
    static constexpr int kStageBytes = (kRows + kColumns) * kSlab;
    static constexpr int kSharedBytes = kStages * kStageBytes;
    static_assert(kSharedBytes <= 64 * 1024, "sm_75 has no more");
};

// fp32 operands as three products of TF32 halves: x = big + small, small * small dropped. The error
// is that of fp32 sums: TF32 products truncate what they add to, so they start from zero. sm_75 has
// no TF32: the quad and column lanes exchange values instead.
__device__ __forceinline__ void mma_f32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    auto split = [](uint32_t bits, uint32_t& big, uint32_t& small) {
        const float x = __uint_as_float(bits);
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(big) : "f"(x));
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(small) : "f"(x - __uint_as_float(big)));
    };
    float sum[4] = {};
    auto step = [&sum](const uint32_t(&x)[4], uint32_t y0, uint32_t y1) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, "
            "%7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y0), "r"(y1));
    };
    uint32_t big[4], small[4], big0, small0, big1, small1;
#pragma unroll
    for (int i = 0; i < 4; ++i) split(a[i], big[i], small[i]);
    split(b0, big0, small0);
    split(b1, big1, small1);
    step(small, big0, big1);
    step(big, small0, small1);
    step(big, big0, big1);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += sum[i];
#else
    const int t = threadIdx.x % 4, g = threadIdx.x % kWarp / 4;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        const float low = __shfl_sync(~0u, __uint_as_float(k < 4 ? a[0] : a[2]), g * 4 + k % 4);
        const float high = __shfl_sync(~0u, __uint_as_float(k < 4 ? a[1] : a[3]), g * 4 + k % 4);
        const float b = __uint_as_float(k < 4 ? b0 : b1);
        const float left = __shfl_sync(~0u, b, 2 * t * 4 + k % 4);
        const float right = __shfl_sync(~0u, b, (2 * t + 1) * 4 + k % 4);
        c[0] = fmaf(low, left, c[0]), c[1] = fmaf(low, right, c[1]);
        c[2] = fmaf(high, left, c[2]), c[3] = fmaf(high, right, c[3]);
    }
#endif
}

template <Type kOperand, typename Accumulator>
__device__ __forceinline__ void mma(Accumulator (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
    if constexpr (kOperand == Type::kInt8) {
        mma_s8(c, a, b0, b1);
    } else if constexpr (kOperand == Type::kHalf) {
        mma_f16(c, a, b0, b1);
    } else {
        mma_f32(c, a, b0, b1);
    }
}

// Byte offset of 16-byte chunk `chunk` of a row: rows of 64 bytes, chunks permuted so that eight
// rows of one chunk lie in eight different bank groups.
__device__ __forceinline__ int slab_offset(int row, int chunk) {
    return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4);
}

// Fills kRows rows of one slab from a row-major matrix; zeros beyond its rows and its k bytes.
template <int kRows, int kThreads>
__device__ __forceinline__ void load_slab(uint32_t shared, const int8_t* matrix, int first_row,
                                          int rows, int k_bytes, int slab) {
#pragma unroll
    for (int i = 0; i < kRows * 4; i += kThreads) {
        const int index = i + threadIdx.x;
        if (kRows * 4 % kThreads != 0 && index >= kRows * 4) break;
        const int row = index / 4, chunk = index % 4, byte = slab * 64 + chunk * 16;
        const bool valid = first_row + row < rows && byte < k_bytes;
        const int64_t at = static_cast<int64_t>(first_row + row) * k_bytes + byte;
        copy_async_16(shared + slab_offset(row, chunk), matrix + (valid ? at : 0), valid);
    }
}

template <Type kOperand, typename Tile, typename Epilogue>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    gemm_mma_kernel(const int8_t* __restrict__ a, const int8_t* __restrict__ w, int k_bytes,
                    int padded_n, EpilogueArguments epilogue) {
    using Accumulator = typename Number<kOperand>::Accumulator;
    constexpr int kBlocks = Tile::kWarpRows / 16, kTiles = Tile::kWarpColumns / 8;
    extern __shared__ __align__(128) int8_t shared[];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int tiles_across = (epilogue.n + Tile::kColumns - 1) / Tile::kColumns;
    const int row = static_cast<int>(blockIdx.x / tiles_across) * Tile::kRows;
    const int column = static_cast<int>(blockIdx.x % tiles_across) * Tile::kColumns;
    const int warp_row = warp % Tile::kWarpsDown * Tile::kWarpRows;
    const int warp_column = warp / Tile::kWarpsDown * Tile::kWarpColumns;
    const uint32_t ring = shared_address(shared);
    const int slabs = (k_bytes + Tile::kSlab - 1) / Tile::kSlab;

    auto load = [&](int slab) {
        const uint32_t stage = ring + slab % Tile::kStages * Tile::kStageBytes;
        load_slab<Tile::kRows, Tile::kThreads>(stage, a, row, epilogue.m, k_bytes, slab);
        load_slab<Tile::kColumns, Tile::kThreads>(stage + Tile::kRows * Tile::kSlab, w, column,
                                                  padded_n, k_bytes, slab);
    };

    wait_for_predecessor();
    let_successor_start();
#pragma unroll
    for (int slab = 0; slab < Tile::kStages - 1; ++slab) {
        if (slab < slabs) load(slab);
        commit_copies();
    }
    Accumulator acc[kBlocks][kTiles][4] = {};
    for (int slab = 0; slab < slabs; ++slab) {
        wait_for_copies<Tile::kStages - 2>();
        __syncthreads();  // the slab is there for all, and all are done with the one before
        if (slab + Tile::kStages - 1 < slabs) load(slab + Tile::kStages - 1);
        commit_copies();
        const uint32_t stage_a = ring + slab % Tile::kStages * Tile::kStageBytes;
        const uint32_t stage_w = stage_a + Tile::kRows * Tile::kSlab;
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            uint32_t fa[kBlocks][4], fw[kTiles / 2][4];
#pragma unroll
            for (int i = 0; i < kBlocks; ++i) {
                load_matrices(fa[i], stage_a + slab_offset(warp_row + i * 16 + lane % 16,
                                                           step * 2 + lane / 16));
            }
#pragma unroll
            for (int j = 0; j < kTiles / 2; ++j) {
                const int n = warp_column + j * 16 + lane % 8 + lane / 16 * 8;
                load_matrices(fw[j], stage_w + slab_offset(n, step * 2 + lane / 8 % 2));
            }
#pragma unroll
            for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
                for (int j = 0; j < kTiles; ++j) {
                    mma<kOperand>(acc[i][j], fa[i], fw[j / 2][j % 2 * 2], fw[j / 2][j % 2 * 2 + 1]);
                }
            }
        }
    }
    Epilogue::run(acc, epilogue, row + warp_row, column + warp_column);
}

}  // namespace swinq

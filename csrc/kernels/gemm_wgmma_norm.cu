// Tiles and launch of the GEMM with a LayerNorm in its epilogue.
#include "gemm_dispatch.cuh"
#include "gemm_wgmma_norm.cuh"

namespace swinq {

namespace {

// Measured on an H100: in v2, with fp16 operands and rows of up to 512, the norm in the epilogue
// spares more than its clusters cost (batch 32: 10 %). With wider rows, with int8, whose products
// are short and whose y is written as codes, and in v1 a kernel of its own wins.
constexpr int kMostColumns = 512;

// Columns of a tile, the same for every batch; 0: no kernel.
int norm_tile_columns(int n) {
    if (n > kMostColumns) return 0;
    for (int columns : {96, 128}) {
        if (n % columns == 0 && n / columns <= kMostBlocksInCluster) return columns;
    }
    return 0;
}

template <typename Tile>
void launch_norm(const GemmArguments& g, cudaStream_t stream) {
    const int k_bytes = g.k * size_of(Type::kHalf);
    const int blocks = g.n / Tile::kColumns, stages = stages_for<Tile>(k_bytes);
    const NormArguments norm = {epilogue_arguments(g),
                                g.norm_gamma,
                                g.norm_beta,
                                g.norm_inverse,
                                g.norm_operand,
                                g.norm_eps,
                                g.output == Output::kResidual};
    launch_clusters(blocks, gemm_norm_kernel<Tile>, dim3(grid_size(g, Tile::kRows, blocks)),
                    dim3(Tile::kThreads), Tile::shared_bytes(stages), stream,
                    slab_map(g.a, g.m, k_bytes, Tile::kRows),
                    slab_map(g.w, g.n, k_bytes, Tile::kColumns), k_bytes, stages, blocks, norm);
}

}  // namespace

bool can_normalize(Type operand, int n) {
    return compute_capability() == 90 && operand == Type::kHalf && norm_tile_columns(n) != 0;
}

void gemm_norm(const GemmArguments& g, cudaStream_t stream) {
    const int columns = norm_tile_columns(g.n);
    // two warpgroups a block where that still gives every multiprocessor a block
    const bool tall = ceil_div(g.m, 128) * (g.n / columns) >= multiprocessors();
    if (columns == 96) {
        return tall ? launch_norm<WgmmaTile<2, 96, 3, 2>>(g, stream)
                    : launch_norm<WgmmaTile<1, 96, 5, 2>>(g, stream);
    }
    return tall ? launch_norm<WgmmaTile<2, 128, 3, 2>>(g, stream)
                : launch_norm<WgmmaTile<1, 128, 4, 2>>(g, stream);
}

}  // namespace swinq

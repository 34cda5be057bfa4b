// The mma.sync tiles and their launch, for one operand type a file.
#pragma once

#include "gemm_dispatch.cuh"
#include "gemm_mma.cuh"

namespace swinq {

template <Type kOperand, typename Tile>
void launch_mma(const GemmArguments& g, cudaStream_t stream) {
    with_epilogue<kOperand>(g, [&](auto epilogue) {
        const int k_bytes = g.k * size_of(kOperand);
        const int padded_n = static_cast<int>(ceil_div(g.n, kGroup)) * kGroup;
        launch(gemm_mma_kernel<kOperand, Tile, decltype(epilogue)>,
               dim3(grid_size(g, Tile::kRows, ceil_div(g.n, Tile::kColumns))), dim3(Tile::kThreads),
               Tile::kSharedBytes, stream, static_cast<const int8_t*>(g.a),
               static_cast<const int8_t*>(g.w), k_bytes, padded_n, epilogue_arguments(g));
    });
}

// Calls the launch of the tile that was asked for; gemm.cu lists them.
template <Type kOperand>
void gemm_mma(const GemmArguments& g, const GemmTile& tile, cudaStream_t stream) {
    auto is = [&tile](int rows, int columns) {
        return tile.rows == rows && tile.columns == columns;
    };
    // three products a step and their sum take registers, so fp32 warps have half the rows
    constexpr int kWarpRows = kOperand == Type::kFloat ? 16 : 32;
    if (is(64, 64)) return launch_mma<kOperand, MmaTile<64, 64, kWarpRows, 32, 6>>(g, stream);
    if (is(64, 32)) return launch_mma<kOperand, MmaTile<64, 32, 16, 32, 8>>(g, stream);
    if constexpr (kOperand != Type::kFloat) {
        if (is(128, 128)) return launch_mma<kOperand, MmaTile<128, 128, 64, 32, 4>>(g, stream);
        if (is(128, 96)) return launch_mma<kOperand, MmaTile<128, 96, 32, 96, 4>>(g, stream);
    }
    refuse_tile(g, tile);
}

}  // namespace swinq

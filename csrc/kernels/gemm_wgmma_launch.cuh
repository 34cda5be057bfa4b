// The wgmma tiles and their launch, for one operand type a file.
#pragma once

#include <algorithm>

#include "gemm_dispatch.cuh"
#include "gemm_wgmma_split.cuh"

namespace swinq {

template <Type kOperand, typename Tile>
void launch_wgmma(const GemmArguments& g, cudaStream_t stream) {
    with_epilogue<kOperand>(g, [&](auto epilogue) {
        launch_wgmma_tile<kOperand, Tile, decltype(epilogue)>(
            g, epilogue_arguments(g), grid_size(g, Tile::kRows, ceil_div(g.n, Tile::kColumns)),
            stream);
    });
}

inline void launch_wgmma_split(const GemmArguments& g, cudaStream_t stream) {
    with_epilogue<Type::kInt8>(g, [&](auto epilogue) {
        launch_split<decltype(epilogue)>(
            g, epilogue_arguments(g),
            grid_size(g, SplitTile::kRows, ceil_div(g.n, SplitTile::kColumns)), stream);
    });
}

// Calls the launch of the tile that was asked for; gemm.cu lists them.
template <Type kOperand>
void gemm_wgmma(const GemmArguments& g, const GemmTile& tile, cudaStream_t stream) {
    auto is = [&tile](int rows, int columns) {
        return tile.rows == rows && tile.columns == columns;
    };
    if (is(192, 192)) return launch_wgmma<kOperand, WgmmaTile<3, 192, 4, 1>>(g, stream);
    if (is(128, 256)) return launch_wgmma<kOperand, WgmmaTile<2, 256, 4, 1>>(g, stream);
    if (is(128, 192)) return launch_wgmma<kOperand, WgmmaTile<2, 192, 5, 1>>(g, stream);
    if (is(128, 128)) return launch_wgmma<kOperand, WgmmaTile<2, 128, 3, 2>>(g, stream);
    if (is(128, 96)) return launch_wgmma<kOperand, WgmmaTile<2, 96, 3, 2>>(g, stream);
    if (is(64, 128)) return launch_wgmma<kOperand, WgmmaTile<1, 128, 4, 2>>(g, stream);
    if (is(64, 96)) return launch_wgmma<kOperand, WgmmaTile<1, 96, 5, 2>>(g, stream);
    if constexpr (kOperand == Type::kInt8) {
        if (is(64, 64) && is_split_better(g)) return launch_wgmma_split(g, stream);
    }
    if (is(64, 64)) return launch_wgmma<kOperand, WgmmaTile<1, 64, 6, 2>>(g, stream);
    refuse_tile(g, tile);
}

}  // namespace swinq

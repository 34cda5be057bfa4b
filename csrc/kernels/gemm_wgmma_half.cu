// The wgmma GEMM of half operands.
#include "gemm_wgmma_launch.cuh"

namespace swinq {

void gemm_wgmma_half(const GemmArguments& g, const GemmTile& tile, cudaStream_t stream) {
    gemm_wgmma<Type::kHalf>(g, tile, stream);
}

}  // namespace swinq

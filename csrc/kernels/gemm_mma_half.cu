// The mma.sync GEMM of half operands.
#include "gemm_mma_launch.cuh"

namespace swinq {

void gemm_mma_half(const GemmArguments& g, const GemmTile& tile, cudaStream_t stream) {
    gemm_mma<Type::kHalf>(g, tile, stream);
}

}  // namespace swinq

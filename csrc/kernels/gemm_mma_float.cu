// The mma.sync GEMM of float operands.
#include "gemm_mma_launch.cuh"

namespace swinq {

void gemm_mma_float(const GemmArguments& g, const GemmTile& tile, cudaStream_t stream) {
    gemm_mma<Type::kFloat>(g, tile, stream);
}

}  // namespace swinq

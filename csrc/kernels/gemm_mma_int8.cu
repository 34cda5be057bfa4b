// The mma.sync GEMM of int8 operands.
#include "gemm_mma_launch.cuh"

namespace swinq {

void gemm_mma_int8(const GemmArguments& g, const GemmTile& tile, cudaStream_t stream) {
    gemm_mma<Type::kInt8>(g, tile, stream);
}

}  // namespace swinq

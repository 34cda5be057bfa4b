// The wgmma GEMM of int8 operands.
#include "gemm_wgmma_launch.cuh"

namespace swinq {

void gemm_wgmma_int8(const GemmArguments& g, const GemmTile& tile, cudaStream_t stream) {
    gemm_wgmma<Type::kInt8>(g, tile, stream);
}

}  // namespace swinq

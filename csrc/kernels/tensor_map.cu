// cuTensorMapEncodeTiled through the runtime, so that libswinq loads without a driver.
#include "tensor_map.h"

namespace swinq {

namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

Encode find_encode() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &found),
               "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
    if (found != cudaDriverEntryPointSuccess) {
        throw Error(Error::kUnsupported,
                    "the driver has no cuTensorMapEncodeTiled, which kernels of this GPU need\n"
                    "  fix: install a driver for CUDA 12.0 or later");
    }
    return reinterpret_cast<Encode>(function);
}

}  // namespace

CUtensorMap slab_map(const void* matrix, int rows, int row_bytes, int box_rows) {
    CUtensorMap map = {};
    if (launching() == Launching::kLoad) {
        return map;
    }
    static const Encode encode = find_encode();
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(row_bytes), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_bytes)};
    const cuuint32_t box[2] = {128, static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t element_strides[2] = {1, 1};
    const CUresult result =
        encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(matrix), sizes, strides,
               box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        throw Error(Error::kCuda, "cuTensorMapEncodeTiled failed with " + std::to_string(result) +
                                      " for " + std::to_string(rows) + " rows of " +
                                      std::to_string(row_bytes) +
                                      " bytes\n  fix: this is a fault of swinq, report it");
    }
    return map;
}

}  // namespace swinq

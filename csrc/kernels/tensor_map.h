// Tensor maps: what the copy engine (TMA) of sm_90 needs to know of a matrix in global memory.
#pragma once

#include <cuda.h>

#include "types.h"

namespace swinq {

// Map of a row-major byte matrix, copied in boxes of `box_rows` rows x 128 bytes with the 128-byte
// swizzle that wgmma reads; zeros beyond the matrix. Encoded on the host; enqueues nothing.
CUtensorMap slab_map(const void* matrix, int rows, int row_bytes, int box_rows);

}  // namespace swinq

// The two kernels behind patch_embed(), for halves and for floats.
#pragma once

#include "patch_embed.h"

namespace swinq {

void patch_embed_half(const PatchEmbedArguments& arguments, cudaStream_t stream);
void patch_embed_float(const PatchEmbedArguments& arguments, cudaStream_t stream);

}  // namespace swinq

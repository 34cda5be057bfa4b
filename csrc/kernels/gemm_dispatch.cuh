// From the run-time description of a GEMM to the template that computes it. Each operand type and
// instruction is compiled in a file of its own (gemm_mma_int8.cu, ...), so that they build in
// parallel.
#pragma once

#include "epilogue.cuh"

namespace swinq {

void gemm_mma_int8(const GemmArguments&, const GemmTile&, cudaStream_t);
void gemm_mma_half(const GemmArguments&, const GemmTile&, cudaStream_t);
void gemm_mma_float(const GemmArguments&, const GemmTile&, cudaStream_t);
void gemm_wgmma_int8(const GemmArguments&, const GemmTile&, cudaStream_t);
void gemm_wgmma_half(const GemmArguments&, const GemmTile&, cudaStream_t);
void gemm_norm(const GemmArguments&, cudaStream_t);

[[noreturn]] void refuse_epilogue(const GemmArguments& arguments);
[[noreturn]] void refuse_tile(const GemmArguments& arguments, const GemmTile& tile);

inline EpilogueArguments epilogue_arguments(const GemmArguments& g) {
    return {g.out, g.factor, g.bias, g.out_inverse, g.out_scale, g.m, g.n};
}

// Calls function(Epilogue<...>{}) for what the arguments ask for.
template <Type kOperand, typename Function>
void with_epilogue(const GemmArguments& g, Function function) {
    constexpr Type kStream = kOperand == Type::kFloat ? Type::kFloat : Type::kHalf;
    using A = Activation;
    using O = Output;
    const bool to_stream = g.output == O::kResidual || g.output == O::kStream;
    if (to_stream && g.stream != kStream) refuse_epilogue(g);
    auto is = [&g](A activation, O output) {
        return g.activation == activation && g.output == output;
    };
    if (is(A::kNone, O::kResidual)) {
        return function(Epilogue<kOperand, A::kNone, O::kResidual, kStream>{});
    }
    if (is(A::kNone, O::kStream)) {
        return function(Epilogue<kOperand, A::kNone, O::kStream, kStream>{});
    }
    if (is(A::kNone, O::kFloat)) {
        return function(Epilogue<kOperand, A::kNone, O::kFloat, kStream>{});
    }
    if constexpr (kOperand == Type::kFloat) {
        if (is(A::kGelu, O::kFloat)) {
            return function(Epilogue<kOperand, A::kGelu, O::kFloat, kStream>{});
        }
        if (is(A::kNormalize, O::kFloat)) {
            return function(Epilogue<kOperand, A::kNormalize, O::kFloat, kStream>{});
        }
    } else {
        if (is(A::kNone, O::kCodes)) {
            return function(Epilogue<kOperand, A::kNone, O::kCodes, kStream>{});
        }
        if (is(A::kNone, O::kHalf)) {
            return function(Epilogue<kOperand, A::kNone, O::kHalf, kStream>{});
        }
        if (is(A::kGelu, O::kCodes)) {
            return function(Epilogue<kOperand, A::kGelu, O::kCodes, kStream>{});
        }
        if (is(A::kGelu, O::kHalf)) {
            return function(Epilogue<kOperand, A::kGelu, O::kHalf, kStream>{});
        }
        if (is(A::kNormalize, O::kCodes)) {
            return function(Epilogue<kOperand, A::kNormalize, O::kCodes, kStream>{});
        }
        if (is(A::kNormalize, O::kHalf)) {
            return function(Epilogue<kOperand, A::kNormalize, O::kHalf, kStream>{});
        }
    }
    refuse_epilogue(g);
}

// Number of blocks for tiles of so many rows, so many side by side; throws where a grid cannot hold
// them.
inline unsigned grid_size(const GemmArguments& g, int rows, int64_t tiles_across) {
    const int64_t blocks = ceil_div(g.m, rows) * tiles_across;
    if (blocks > INT32_MAX) {
        throw Error(Error::kInvalidArgument,
                    "gemm: " + std::to_string(g.m) + " rows need " + std::to_string(blocks) +
                        " blocks, more than a grid holds\n  fix: use a smaller batch");
    }
    return static_cast<unsigned>(blocks);
}

}  // namespace swinq

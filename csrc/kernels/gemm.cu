// gemm(): checks the arguments, picks a tile, calls the kernel.
#include "gemm.h"

#include <limits>

#include "gemm_dispatch.cuh"

namespace swinq {

namespace {

constexpr int kMma = 0, kWgmma = 1;

// Every tile that exists, larger ones first.
constexpr GemmTile kTiles[] = {
    {kWgmma, 192, 192}, {kWgmma, 128, 256}, {kWgmma, 128, 192}, {kWgmma, 128, 128},
    {kWgmma, 128, 96},  {kWgmma, 64, 128},  {kWgmma, 64, 96},   {kWgmma, 64, 64},
    {kMma, 128, 128},   {kMma, 128, 96},    {kMma, 64, 64},     {kMma, 64, 32},
};

bool exists(const GemmTile& tile, Type operand) {
    if (tile.instruction == kWgmma) return operand != Type::kFloat && compute_capability() == 90;
    return operand != Type::kFloat || tile.rows == 64;
}

std::string text(const GemmArguments& g) {
    return "m " + std::to_string(g.m) + ", n " + std::to_string(g.n) + ", k " + std::to_string(g.k);
}

void require(bool holds, const GemmArguments& g, const std::string& what) {
    if (holds) return;
    throw Error(Error::kInvalidArgument,
                "gemm (" + text(g) + "): " + what + "\n  fix: see swinq_gemm_arguments in swinq.h");
}

bool aligned(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

void check(const GemmArguments& g) {
    require(g.m >= 0 && g.n > 0 && g.k > 0, g, "sizes must be positive");
    require(g.n % 8 == 0, g, "n must be a multiple of 8");
    require(g.k * size_of(g.operand) % 16 == 0, g,
            "rows of k must be multiples of 16 bytes; pad k with zeros");
    require(g.a && g.w && g.out && g.bias, g, "a, w, out and bias must not be null");
    require(aligned(g.a) && aligned(g.w) && aligned(g.out), g,
            "a, w and out must be aligned to 16");
    require(g.operand != Type::kInt8 || g.factor, g, "int8 operands need factor");
    require(g.output != Output::kCodes || g.out_inverse, g, "codes need out_inverse");
    require(!g.out_scale || g.out_inverse, g, "out_scale needs out_inverse");
    for (const float* vector : {g.factor, g.bias, g.out_inverse, g.out_scale}) {
        require(aligned(vector), g,
                "factor, bias, out_inverse and out_scale must be aligned to 16");
    }
    require(g.activation != Activation::kNormalize || g.n % (3 * kHeadDim) == 0, g,
            "normalized heads need n = 3 * heads * 32");
    if (!g.has_norm) return;
    require(can_normalize(g.operand, g.n), g, "no kernel with a norm for this n on this device");
    require(g.output == Output::kResidual || g.output == Output::kStream, g,
            "a norm goes with the residual stream");
    require(g.stream == Type::kHalf && g.activation == Activation::kNone && !g.out_scale, g,
            "a norm needs an fp16 stream, no activation and unrounded outputs");
    require(g.norm_gamma && g.norm_beta, g, "a norm needs gamma and beta");
    require(!g.norm_operand || g.norm_inverse, g, "norm_operand needs norm_inverse");
    require(aligned(g.norm_operand), g, "norm_operand must be aligned to 16");
    for (const float* vector : {g.norm_gamma, g.norm_beta, g.norm_inverse}) {
        require(aligned(vector), g, "norm_gamma, norm_beta and norm_inverse must be aligned to 16");
    }
}

// How long the busiest multiprocessor takes with its tiles, in no unit: of each tile a start, for
// each slab its bytes and its products, and an epilogue. Fitted on an H100 to the times of all
// layers of Swin-T, B and L at batch 32 and of Swin-T at 1 and 8 (int8). Of the 522 different INT8
// and FP16 GEMMs of all official sizes at 32 it gives 311 the best tile and 201 another, which
// take 3 % longer in the mean (swin_gemm on an H100). Short tiles hide less, wide ones leave room
// for one block a multiprocessor.
double expected_time(const GemmArguments& g, const GemmTile& tile) {
    const int64_t tiles = ceil_div(g.m, tile.rows) * ceil_div(g.n, tile.columns);
    // a resident block takes tile after tile, and its neighbour on the multiprocessor as many
    const int64_t neighbours = tile.instruction == kWgmma && tile.columns <= 128 ? 2 : 1;
    const int64_t resident = neighbours * multiprocessors();
    const auto rounds = static_cast<double>(
        tiles <= multiprocessors() ? 1 : neighbours * ceil_div(tiles, resident));
    const auto slabs = static_cast<double>(ceil_div(g.k * size_of(g.operand), 128));
    const double sides = (tile.rows + tile.columns) / 128.0;
    const double area = tile.rows * tile.columns / 8192.0;
    const double once = 10 + 43 * area, each = 20 * sides + 14 * area;
    const bool is_awkward = tile.rows < 128 || tile.columns > 128;
    return rounds * (once + slabs * each) * (is_awkward ? 1.2 : 1);
}

}  // namespace

[[noreturn]] void refuse_epilogue(const GemmArguments& g) {
    throw Error(Error::kUnsupported, "gemm (" + text(g) + "): no kernel for operand " +
                                         std::to_string(static_cast<int>(g.operand)) +
                                         ", activation " +
                                         std::to_string(static_cast<int>(g.activation)) +
                                         ", output " + std::to_string(static_cast<int>(g.output)) +
                                         ", stream " + std::to_string(static_cast<int>(g.stream)) +
                                         "\n  fix: use one that csrc/NUMERICS.md lists");
}

[[noreturn]] void refuse_tile(const GemmArguments& g, const GemmTile& tile) {
    throw Error(Error::kInvalidArgument, "gemm (" + text(g) + "): no tile " +
                                             std::to_string(tile.rows) + " x " +
                                             std::to_string(tile.columns) + " of instruction " +
                                             std::to_string(tile.instruction) +
                                             " here\n  fix: take one that swinq_gemm_tiles gives");
}

int list_tiles(const GemmArguments& g, GemmTile* tiles, int capacity) {
    int count = 0;
    for (const GemmTile& tile : kTiles) {
        if (!exists(tile, g.operand)) continue;
        if (count < capacity) tiles[count] = tile;
        ++count;
    }
    return count;
}

GemmTile default_tile(const GemmArguments& g) {
    const bool hopper = exists({kWgmma, 128, 128}, g.operand);
    GemmTile best = {kMma, 64, 32};
    double least = std::numeric_limits<double>::infinity();
    for (const GemmTile& tile : kTiles) {
        if (!exists(tile, g.operand) || (tile.instruction == kWgmma) != hopper) continue;
        if (tile.columns == 256) continue;  // seldom best, and then by little; for tuning
        const double time = expected_time(g, tile);
        if (time < least) {
            least = time;
            best = tile;
        }
    }
    return best;
}

void gemm(const GemmArguments& g, const GemmTile* wanted, cudaStream_t stream) {
    check(g);
    if (g.m == 0) return;
    if (g.has_norm) return gemm_norm(g, stream);
    const GemmTile tile = wanted ? *wanted : default_tile(g);
    if (!exists(tile, g.operand)) refuse_tile(g, tile);
    if (tile.instruction == kWgmma) {
        return (g.operand == Type::kInt8 ? gemm_wgmma_int8 : gemm_wgmma_half)(g, tile, stream);
    }
    if (tile.instruction != kMma) refuse_tile(g, tile);
    switch (g.operand) {
        case Type::kInt8:
            return gemm_mma_int8(g, tile, stream);
        case Type::kHalf:
            return gemm_mma_half(g, tile, stream);
        case Type::kFloat:
            return gemm_mma_float(g, tile, stream);
    }
}

}  // namespace swinq

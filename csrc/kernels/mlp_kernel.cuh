// The MLP of a block in one kernel, sm_90a only: v1's x := fp16(x + fc2(gelu(fc1(LayerNorm(x))))),
// or v2's x := fp16(x + LayerNorm(fc2(gelu(fc1(x))))), whose codes are read and written.
//
// A warpgroup takes 64 rows from first to last in registers, alone: of every 32
// channels, hidden channels or outputs a thread holds 8 neighbouring ones of rows g and g + 8 (lane
// = 4 g + t). What it loads is thus an A fragment of fc1, the sums of fc1 become an A fragment of
// fc2, and the sums of fc2 lie where x was loaded, if the weights' rows and columns are permuted to
// match:
//   k:    byte 16 h + 4 t + b of 32 is channel 8 t + 4 h + b
//   rows: row 8 j + 2 t + e of 32 is channel 8 t + 2 j + e
// The weights are the only operands in shared memory. Three warpgroups of a block share them and
// run freely against each other: one's GELU goes beside another's products.
#pragma once

#include "mlp_rows.cuh"

namespace swinq {

// How far unit `unit` of a pass of the loop lies behind the first unit, for move_descriptor();
// slabs of `rows` rows. What is the same for a pass's units comes first, to be computed once.
template <int kUnitsPerPass>
__device__ __forceinline__ uint32_t unit_offset(unsigned pass, unsigned unit, unsigned rows) {
    const auto offset = [rows](unsigned u) { return u / 4 * (rows * 8 - 8) + u * 2; };
    if (kUnitsPerPass % 4 == 0) return pass * offset(kUnitsPerPass) + offset(unit);
    if (4 % kUnitsPerPass == 0) return offset(pass * kUnitsPerPass) + unit * 2;
    return offset(pass * kUnitsPerPass + unit);
}

template <typename Shape, bool kRounded, bool kIsV1>
__global__ void __launch_bounds__(kThreads, 1) mlp_kernel(const __grid_constant__ MlpArguments p) {
    constexpr int kChannels = Shape::kChannels, kBlocks = Shape::kBlocks;
    constexpr int kStep = Shape::kStep, kGroups = Shape::kGroups;
    constexpr int kUnroll = Shape::kUnroll, kPasses = Shape::kHidden / kStep / kUnroll;
    constexpr int kStagePasses = Shape::kStagePasses;
    extern __shared__ uint8_t shared[];
    auto& s = *reinterpret_cast<MlpMemory<Shape>*>(shared + (-shared_address(shared) & 1023u));
    const uint64_t fc1_first = tile_descriptor(shared_address(s.fc1));
    const uint64_t fc2_first = tile_descriptor(shared_address(s.fc2));

    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);  // uniform
    const int tiles = (p.m + kRows - 1) / kRows;
    const int blocks = static_cast<int>(gridDim.x), block_index = static_cast<int>(blockIdx.x);
    const int rounds = (tiles - block_index + kWarpgroups * blocks - 1) / (kWarpgroups * blocks);
    const MlpCopies<Shape> copies = {p, s, rounds * Shape::kStages};
    if (threadIdx.x == 0) copies.start();
    __syncthreads();
    wait_for_barrier(shared_address(&s.constants_full), 0);
    wait_for_predecessor();
    let_successor_start();

    auto* const x = static_cast<__half*>(p.x);
    for (int round = 0; round < rounds; ++round) {
        const int tile = (round * kWarpgroups + warpgroup) * blocks + block_index;
        const int first_turn = Shape::kRing ? round * Shape::kStages : 0;
        if (tile >= tiles) {  // only in the last round; the others count on this warp
#pragma unroll 1
            for (int stage = 0; Shape::kRing && stage < Shape::kStages; ++stage) {
                copies.wait(first_turn + stage);
                copies.release(first_turn + stage);
            }
            break;
        }
        const int row = tile * kRows + thread / kWarp * 16 + thread % kWarp / 4;
        uint32_t input[kBlocks][4], hidden[kGroups][4];
        int sums[kStep / 2], outputs[kChannels / 2];
        auto codes_of = [&](int row) {
            return p.operand + static_cast<int64_t>(row) * kChannels + thread % 4 * kVector;
        };
        if constexpr (kIsV1) {
            MlpRows<kBlocks> rows(x, row, p.m);
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) rows.load(block);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                uint32_t codes[kBlocks][2];
                normalize<Shape>(codes, rows.bits[h], p.eps, s.constants);
#pragma unroll
                for (int block = 0; block < kBlocks; ++block) {
                    input[block][h] = codes[block][0];
                    input[block][2 + h] = codes[block][1];
                }
            }
        } else {
            load_codes<kBlocks>(input, codes_of(row), {row < p.m, row + 8 < p.m});
        }

        // Step = pass * kUnroll + i. In a ring, stages follow each other anywhere.
        auto stage_offset = [&](int pass) {
            return Shape::kRing ? MlpCopies<Shape>::slot_of(first_turn + pass / kStagePasses) *
                                      (Shape::kPartBytes / 16)
                                : 0;
        };
        auto pass_in_stage = [](int pass) { return Shape::kRing ? pass % kStagePasses : pass; };
        auto start_fc1 = [&](int pass, int i) {
            const int step = pass * kUnroll + i;
            if (Shape::kRing ? i == 0 : round == 0) {
                copies.wait(first_turn + ((step + 1) * kStep - 1) / kStageHidden);
            }
            begin_products();
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) {
                const uint32_t at =
                    unit_offset<kUnroll * kBlocks>(pass_in_stage(pass), i * kBlocks + block, kStep);
                Products<kStep>::s8(sums, input[block],
                                    move_descriptor(fc1_first, stage_offset(pass) + at), block > 0);
            }
        };
        auto start_fc2 = [&](int pass, int i) {
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
                const uint32_t at = unit_offset<kUnroll * kGroups>(pass_in_stage(pass),
                                                                   i * kGroups + group, kChannels);
                Products<kChannels>::s8(outputs, hidden[group],
                                        move_descriptor(fc2_first, stage_offset(pass) + at), 1);
            }
        };
        auto finish = [&](int next_step) {
            commit_products();
            wait_for_products<0>();
            hold(sums);
            const int channel = next_step * kStep + thread % 4 * kVector;
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
                activate<Shape>(hidden[group], sums, group, channel + group * kGroup, s.constants);
            }
        };

        start_fc1(0, 0);
        finish(0);
#pragma unroll
        for (int& output : outputs) output = 0;
#pragma unroll 1
        for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) {
                if (i + 1 < kUnroll || pass + 1 < kPasses) {
                    start_fc1(pass + (i + 1) / kUnroll, (i + 1) % kUnroll);
                    start_fc2(pass, i);
                    finish(pass * kUnroll + i + 1);
                }
            }
            if (Shape::kRing && pass % kStagePasses == kStagePasses - 1 && pass + 1 < kPasses) {
                copies.release(first_turn + pass / kStagePasses);
            }
        }
        begin_products();
        start_fc2(kPasses - 1, kUnroll - 1);
        commit_products();
        int again = row;  // else v2 keeps addresses in registers all the while, and spills
        if (!kIsV1) asm volatile("" : "+r"(again));
        MlpRows<kBlocks> rows(x, again, p.m);
#pragma unroll
        for (int block = 0; kIsV1 && block < Shape::kAhead; ++block) rows.load(block);
        wait_for_products<0>();
        hold(outputs);
        if (Shape::kRing) copies.release(first_turn + Shape::kStages - 1);
        if constexpr (kIsV1) {
            add_residual<Shape, kRounded>(outputs, rows, s.constants);
        } else {
            add_normed<Shape, kRounded>(outputs, rows, p.next_inverse ? codes_of(again) : nullptr,
                                        p.eps, s.constants);
        }
    }
}

}  // namespace swinq

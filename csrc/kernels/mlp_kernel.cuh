// The MLP of a v1 block in one kernel, sm_90a only: x := fp16(x + fc2(gelu(fc1(LayerNorm(x))))).
//
// A warpgroup takes 64 rows from LayerNorm to the residual in registers, alone: of every 32
// channels, hidden channels or outputs a thread holds 8 neighbouring ones of rows g and g + 8 (lane
// = 4 g + t). What it loads is thus an A fragment of fc1, the sums of fc1 become an A fragment of
// fc2, and the sums of fc2 lie where x was loaded, if the weights' rows and columns are permuted to
// match:
//   k:    byte 16 h + 4 t + b of 32 is channel 8 t + 4 h + b
//   rows: row 8 j + 2 t + e of 32 is channel 8 t + 2 j + e
// The weights are the only operands in shared memory. Three warpgroups of a block share them and
// run freely against each other: one's GELU goes beside another's products.
#pragma once

#include "channels.cuh"
#include "gelu.cuh"
#include "mlp_memory.cuh"

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

__device__ __forceinline__ void load_shared(float (&x)[4], const float* s_from) {
    const float4 v = *reinterpret_cast<const float4*>(s_from);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

// What a thread holds of x: 8 channels of each block, of two rows.
template <int kBlocks>
struct MlpRows {
    __half* first;  // of row g
    bool inside[2];
    Vector<__half> bits[2][kBlocks];

    __device__ __forceinline__ MlpRows(__half* x, int row, int m)
        : first(x + static_cast<int64_t>(row) * kBlocks * kGroup + threadIdx.x % 4 * kVector),
          inside{row < m, row + 8 < m} {}

    __device__ __forceinline__ __half* at(int h, int block) const {
        return first + (8 * h * kBlocks + block) * kGroup;
    }
    __device__ __forceinline__ void load(int block) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (inside[h]) bits[h][block].load(at(h, block));
        }
    }
};

// Codes of LayerNorm of what a thread holds of a row: of each block two registers of an A fragment,
// the first and last four channels.
template <typename Shape>
__device__ __forceinline__ void normalize(uint32_t (&codes)[Shape::kBlocks][2],
                                          const Vector<__half> (&bits)[Shape::kBlocks], float eps,
                                          const MlpConstants<Shape>& s) {
    const int first = static_cast<int>(threadIdx.x) % 4 * kVector;
    float v[Shape::kBlocks][kVector];
    float sum = 0;
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) {
        bits[block].unpack(v[block]);
        float part = v[block][0];
#pragma unroll
        for (int i = 1; i < kVector; ++i) part += v[block][i];
        sum += part;
    }
    const float mean = quad_sum(sum) * (1.0f / Shape::kChannels);
    float squares = 0;
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) {
        float part = 0;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            const float deviation = __fsub_rn(v[block][i], mean);
            part = __fmaf_rn(deviation, deviation, part);
        }
        squares += part;
    }
    const float rstd = rsqrtf(quad_sum(squares) * (1.0f / Shape::kChannels) + eps);
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < kVector; i += 4) {
            const int channel = block * kGroup + first + i;
            float gamma[4], beta[4], inverse[4], y[4];
            load_shared(gamma, s.gamma + channel);
            load_shared(beta, s.beta + channel);
            load_shared(inverse, s.in_inverse + channel);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                y[c] = normalized(v[block][i + c], mean, rstd, gamma[c], beta[c]) * inverse[c];
            }
            codes[block][i / 4] = pack_s8(y[0], y[1], y[2], y[3]);
        }
    }
}

// Codes of GELU of one group's sums, as an A fragment; `hidden` is the thread's first channel.
template <typename Shape, int kSums>
__device__ __forceinline__ void activate(uint32_t (&a)[4], const int (&acc)[kSums], int group,
                                         int hidden, const MlpConstants<Shape>& s) {
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
        float factor[4], bias[4], inverse[4];
        load_shared(factor, s.fc1_factor + hidden + i);
        load_shared(bias, s.fc1_bias + hidden + i);
        load_shared(inverse, s.hidden_inverse + hidden + i);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float y[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int sum = acc[(group * 4 + (i + c) / 2) * 4 + h * 2 + c % 2];
                y[c] = gelu(__fmaf_rn(__int2float_rn(sum), factor[c], bias[c])) * inverse[c];
            }
            a[i / 2 + h] = pack_s8(y[0], y[1], y[2], y[3]);
        }
    }
}

// y of channel c of four from its sum of fc2.
template <bool kRounded>
__device__ __forceinline__ float output(int sum, int c, const float (&factor)[4],
                                        const float (&bias)[4], const float (&inverse)[4],
                                        const float (&scale)[4]) {
    const float y = __fmaf_rn(__int2float_rn(sum), factor[c], bias[c]);
    if constexpr (!kRounded) return y;
    return __fmul_rn(__int2float_rn(quantize(y, inverse[c])), scale[c]);
}

// x := fp16(x + y), y from the sums of fc2. The first kAhead blocks of x are loaded.
template <typename Shape, bool kRounded>
__device__ __forceinline__ void add_residual(const int (&acc)[Shape::kChannels / 2],
                                             MlpRows<Shape::kBlocks>& rows,
                                             const MlpConstants<Shape>& s) {
    const int first = static_cast<int>(threadIdx.x) % 4 * kVector;
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) {
        const int channel = block * kGroup + first;
        float y[2][kVector];
#pragma unroll
        for (int i = 0; i < kVector; i += 4) {
            float factor[4], bias[4], inverse[4], scale[4];
            load_shared(factor, s.fc2_factor + channel + i);
            load_shared(bias, s.fc2_bias + channel + i);
            if constexpr (kRounded) {
                load_shared(inverse, s.out_inverse + channel + i);
                load_shared(scale, s.out_scale + channel + i);
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const int sum = acc[(block * 4 + (i + c) / 2) * 4 + h * 2 + c % 2];
                    y[h][i + c] = output<kRounded>(sum, c, factor, bias, inverse, scale);
                }
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float before[kVector];
            rows.bits[h][block].unpack(before);
#pragma unroll
            for (int i = 0; i < kVector; ++i) y[h][i] = __fadd_rn(before[i], y[h][i]);
            Vector<__half> after;
            after.pack(y[h]);
            if (rows.inside[h]) after.store(rows.at(h, block));
        }
        if (block + Shape::kAhead < Shape::kBlocks) rows.load(block + Shape::kAhead);
        __syncwarp();  // else the compiler loads constants for so many blocks that registers spill
    }
}

template <typename Shape, bool kRounded>
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
        {
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
        MlpRows<kBlocks> rows(x, row, p.m);
#pragma unroll
        for (int block = 0; block < Shape::kAhead; ++block) rows.load(block);
        wait_for_products<0>();
        hold(outputs);
        if (Shape::kRing) copies.release(first_turn + Shape::kStages - 1);
        add_residual<Shape, kRounded>(outputs, rows, s.constants);
    }
}

}  // namespace swinq

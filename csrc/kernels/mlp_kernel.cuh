// The MLP of a v1 block in one kernel, sm_90a only: x := fp16(x + fc2(gelu(fc1(LayerNorm(x))))).
//
// A warpgroup takes 64 rows from LayerNorm to the residual in registers, alone: of every 32 channels,
// hidden channels or outputs a thread holds 8 neighbouring ones of rows g and g + 8 (lane = 4 g + t).
// What it loads is thus an A fragment of fc1, the sums of fc1 become an A fragment of fc2, and the sums
// of fc2 lie where x was loaded, if the weights' rows and columns are permuted to match:
//   k: byte 16 h + 4 t + b of 32 is channel 8 t + 4 h + b     rows: row 8 j + 2 t + e is 8 t + 2 j + e
// The weights are the only operands in shared memory. Three warpgroups of a block share them and run
// freely against each other: one's GELU goes beside another's products.
//
// Both weights are cut into units of 32 bytes of k for kStep (fc1) or all (fc2) rows, and four units
// make a slab (wgmma.cuh). A stage is what 128 hidden channels need of both, a contiguous piece of
// each. If all stages fit they are copied once; else they go round in a ring of kSlots, and the last
// warp to be done with a stage orders the next one.
#pragma once

#include "channels.cuh"
#include "gelu.cuh"
#include "mlp.h"
#include "wgmma.cuh"

namespace swinq {

constexpr int kRows = 64;  // of a warpgroup
constexpr int kWarpgroups = 3;
constexpr int kThreads = kWarpgroups * kWarpgroup;
constexpr int kGroup = 32;  // channels that a quad of threads holds
constexpr int kStageHidden = 128;
constexpr int kExpansion = 4;  // hidden / channels

// Hidden channels of one pass of the loop: as many as the registers allow.
constexpr int step_of(int channels) { return channels == 96 ? 96 : channels == 128 ? 64 : 32; }

template <int kChannels_>
struct Shape {
    static constexpr int kChannels = kChannels_, kHidden = kExpansion * kChannels;
    static constexpr int kBlocks = kChannels / kGroup;  // products of a step of fc1
    static constexpr int kStep = step_of(kChannels);
    static constexpr int kGroups = kStep / kGroup;  // products of a step of fc2
    static constexpr int kUnroll = kStep == 32 ? 2 : 1;  // steps of a pass

    static constexpr int kAhead = 3;  // blocks of x in registers at the end

    static constexpr int kStages = kHidden / kStageHidden;
    static constexpr int kPartBytes = kStageHidden * kChannels;  // of a stage, each weight
    static constexpr int kSlots = kStages < 4 ? kStages : 4;
    static constexpr bool kRing = kSlots < kStages;
    static constexpr int kStagePasses = kStageHidden / (kStep * kUnroll);  // in a ring
};

// Vectors over channels, as they lie in shared memory.
template <typename Shape>
struct Constants {
    float fc1_factor[Shape::kHidden], fc1_bias[Shape::kHidden], hidden_inverse[Shape::kHidden];
    float gamma[Shape::kChannels], beta[Shape::kChannels], in_inverse[Shape::kChannels];
    float fc2_factor[Shape::kChannels], fc2_bias[Shape::kChannels];
    float out_inverse[Shape::kChannels], out_scale[Shape::kChannels];
};

// Shared memory of a block. The weights' slabs want multiples of 1024 bytes.
template <typename Shape>
struct Memory {
    uint8_t fc1[Shape::kSlots][Shape::kPartBytes];
    uint8_t fc2[Shape::kSlots][Shape::kPartBytes];
    Constants<Shape> constants;
    uint64_t full[Shape::kSlots];  // barriers
    uint64_t constants_full;
    uint32_t released[Shape::kSlots];  // warps that were done with the slot, from the start
};

// How far unit `unit` of a pass of the loop lies behind the first unit, in bytes; slabs of `rows` rows.
template <int kUnitsPerPass>
__device__ __forceinline__ uint32_t unit_offset(int pass, int unit, int rows) {
    const auto offset = [rows](int u) { return u / 4 * rows * 128 + u % 4 * 32; };
    if (kUnitsPerPass % 4 == 0) return pass * offset(kUnitsPerPass) + offset(unit);
    if (4 % kUnitsPerPass == 0) return offset(pass * kUnitsPerPass) + unit * 32;
    return offset(pass * kUnitsPerPass + unit);
}

__device__ __forceinline__ void load_shared(float (&x)[4], const float* s_from) {
    const float4 v = *reinterpret_cast<const float4*>(s_from);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

// What a thread holds of x: 8 channels of each block, of two rows.
template <int kBlocks>
struct Rows {
    __half* first;  // of row g
    bool inside[2];
    Vector<__half> bits[2][kBlocks];

    __device__ __forceinline__ Rows(__half* x, int row, int m)
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

// Codes of LayerNorm of the thread's two rows, as A fragments.
template <typename Shape>
__device__ __forceinline__ void normalize(uint32_t (&a)[Shape::kBlocks][4],
                                          const Rows<Shape::kBlocks>& rows, float eps,
                                          const Constants<Shape>& s) {
    const int first = static_cast<int>(threadIdx.x) % 4 * kVector;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float v[Shape::kBlocks][kVector];
        float sum = 0;
#pragma unroll
        for (int block = 0; block < Shape::kBlocks; ++block) {
            rows.bits[h][block].unpack(v[block]);
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
                a[block][i / 2 + h] = pack_s8(y[0], y[1], y[2], y[3]);
            }
        }
    }
}

// Codes of GELU of one group's sums, as an A fragment; `hidden` is the thread's first channel.
template <typename Shape>
__device__ __forceinline__ void activate(uint32_t (&a)[4], const int (&acc)[Shape::kStep / 2],
                                         int group, int hidden, const Constants<Shape>& s) {
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

// x := fp16(x + y), y from the sums of fc2. The first kAhead blocks of x are loaded.
template <typename Shape, bool kRounded>
__device__ __forceinline__ void add_residual(const int (&acc)[Shape::kChannels / 2],
                                             Rows<Shape::kBlocks>& rows,
                                             const Constants<Shape>& s) {
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
                    float value = __fmaf_rn(__int2float_rn(sum), factor[c], bias[c]);
                    if constexpr (kRounded) {
                        value = __fmul_rn(__int2float_rn(quantize(value, inverse[c])), scale[c]);
                    }
                    y[h][i + c] = value;
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

// One more of what `counter` counts; everything before is done for whoever counts later.
__device__ __forceinline__ unsigned count_up(uint32_t counter) {
    unsigned before;
    asm volatile("atom.acq_rel.cta.shared::cta.add.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "r"(counter)
                 : "memory");
    return before + 1;
}

// What a block copies to shared memory. `turn` counts stages from its first tile on.
template <typename Shape>
struct Copies {
    const MlpArguments& p;
    const Memory<Shape>& s;
    int turns;  // stages that all the block's tiles take

    static __device__ __forceinline__ int slot_of(int turn) { return turn % Shape::kSlots; }

    __device__ __forceinline__ void copy(int turn) const {
        const int stage = turn % Shape::kStages, slot = slot_of(turn);
        const uint32_t full = shared_address(&s.full[slot]);
        arrive_expecting(full, 2 * Shape::kPartBytes);
        copy_bulk(shared_address(s.fc1[slot]), p.fc1_weight + stage * Shape::kPartBytes,
                  Shape::kPartBytes, full);
        copy_bulk(shared_address(s.fc2[slot]), p.fc2_weight + stage * Shape::kPartBytes,
                  Shape::kPartBytes, full);
    }

    template <int kCount>
    __device__ __forceinline__ void copy(const float (&s_to)[kCount], const float* from) const {
        if (from != nullptr) {
            const uint32_t full = shared_address(&s.constants_full);
            expect_bytes(full, sizeof(s_to));
            copy_bulk(shared_address(s_to), from, sizeof(s_to), full);
        }
    }

    // By one thread, before the block's barrier.
    __device__ __forceinline__ void start() const {
        for (int slot = 0; slot < Shape::kSlots; ++slot) {
            init_barrier(shared_address(&s.full[slot]), 1);
            asm volatile("st.shared.u32 [%0], 0;" ::"r"(shared_address(&s.released[slot])));
        }
        init_barrier(shared_address(&s.constants_full), 1);
        publish_barriers();
        copy(s.constants.gamma, p.gamma);
        copy(s.constants.beta, p.beta);
        copy(s.constants.in_inverse, p.in_inverse);
        copy(s.constants.fc1_factor, p.fc1_factor);
        copy(s.constants.fc1_bias, p.fc1_bias);
        copy(s.constants.hidden_inverse, p.hidden_inverse);
        copy(s.constants.fc2_factor, p.fc2_factor);
        copy(s.constants.fc2_bias, p.fc2_bias);
        copy(s.constants.out_inverse, p.out_inverse);
        copy(s.constants.out_scale, p.out_scale);
        arrive(shared_address(&s.constants_full));
        for (int turn = 0; turn < Shape::kSlots; ++turn) copy(turn);
    }

    __device__ __forceinline__ void wait(int turn) const {
        wait_for_barrier(shared_address(&s.full[slot_of(turn)]),
                         Shape::kRing ? turn / Shape::kSlots % 2 : 0);
    }

    // By every warp of the block, once a turn, when products no longer read the stage.
    __device__ __forceinline__ void release(int turn) const {
        if (threadIdx.x % kWarp == 0 &&
            count_up(shared_address(&s.released[slot_of(turn)])) % (kThreads / kWarp) == 0 &&
            turn + Shape::kSlots < turns) {
            copy(turn + Shape::kSlots);
        }
        __syncwarp();
    }
};

template <typename Shape, bool kRounded>
__global__ void __launch_bounds__(kThreads, 1) mlp_kernel(const __grid_constant__ MlpArguments p) {
    constexpr int kChannels = Shape::kChannels, kBlocks = Shape::kBlocks;
    constexpr int kStep = Shape::kStep, kGroups = Shape::kGroups;
    constexpr int kUnroll = Shape::kUnroll, kPasses = Shape::kHidden / kStep / kUnroll;
    constexpr int kStagePasses = Shape::kStagePasses;
    extern __shared__ uint8_t shared[];
    auto& s = *reinterpret_cast<Memory<Shape>*>(shared + (-shared_address(shared) & 1023u));
    const uint64_t fc1_first = tile_descriptor(shared_address(s.fc1));
    const uint64_t fc2_first = tile_descriptor(shared_address(s.fc2));

    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);  // uniform
    const int tiles = (p.m + kRows - 1) / kRows;
    const int blocks = static_cast<int>(gridDim.x), block_index = static_cast<int>(blockIdx.x);
    const int rounds = (tiles - block_index + kWarpgroups * blocks - 1) / (kWarpgroups * blocks);
    const Copies<Shape> copies = {p, s, rounds * Shape::kStages};
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
            Rows<kBlocks> rows(x, row, p.m);
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) rows.load(block);
            normalize<Shape>(input, rows, p.eps, s.constants);
        }

        // Step = pass * kUnroll + i. In a ring, stages follow each other anywhere.
        auto stage_offset = [&](int pass) {
            return Shape::kRing ? Copies<Shape>::slot_of(first_turn + pass / kStagePasses) *
                                      Shape::kPartBytes
                                : 0;
        };
        auto pass_in_stage = [](int pass) { return Shape::kRing ? pass % kStagePasses : pass; };
        auto start_fc1 = [&](int pass, int i) {
            const int step = pass * kUnroll + i;
            if (i == 0 || !Shape::kRing) {
                copies.wait(first_turn + ((step + 1) * kStep - 1) / kStageHidden);
            }
            begin_products();
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) {
                const uint32_t at = unit_offset<kUnroll * kBlocks>(
                    pass_in_stage(pass), i * kBlocks + block, kStep);
                Products<kStep>::s8(sums, input[block],
                                    move_descriptor(fc1_first, stage_offset(pass) + at), block > 0);
            }
        };
        auto start_fc2 = [&](int pass, int i) {
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
                const uint32_t at = unit_offset<kUnroll * kGroups>(
                    pass_in_stage(pass), i * kGroups + group, kChannels);
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
        Rows<kBlocks> rows(x, row, p.m);
#pragma unroll
        for (int block = 0; block < Shape::kAhead; ++block) rows.load(block);
        wait_for_products<0>();
        hold(outputs);
        if (Shape::kRing) copies.release(first_turn + Shape::kStages - 1);
        add_residual<Shape, kRounded>(outputs, rows, s.constants);
    }
}

}  // namespace swinq

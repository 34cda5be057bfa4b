// Shared memory of the fused MLP: sizes, the weights' pieces, and the copies that fill it.
//
// Both weights are cut into units of 32 bytes of k for kStep (fc1) or all (fc2) rows, and four
// units make a slab (wgmma.cuh). A stage is what 128 hidden channels need of both, a contiguous
// piece of each. If all stages fit they are copied once; else they go round in a ring of kSlots,
// and the last warp to be done with a stage orders the next one.
#pragma once

#include "device.cuh"
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
constexpr int step_of(int channels) {
    return channels == 96 ? 96 : channels == 128 ? 64 : 32;
}

template <int kChannels_>
struct MlpShape {
    static constexpr int kChannels = kChannels_, kHidden = kExpansion * kChannels;
    static constexpr int kBlocks = kChannels / kGroup;  // products of a step of fc1
    static constexpr int kStep = step_of(kChannels);
    static constexpr int kGroups = kStep / kGroup;       // products of a step of fc2
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
struct MlpConstants {
    float fc1_factor[Shape::kHidden], fc1_bias[Shape::kHidden], hidden_inverse[Shape::kHidden];
    float gamma[Shape::kChannels], beta[Shape::kChannels];
    float x_inverse[Shape::kChannels];  // of LayerNorm(x) in v1, of the new x in v2
    float fc2_factor[Shape::kChannels], fc2_bias[Shape::kChannels];
    float out_inverse[Shape::kChannels], out_scale[Shape::kChannels];
};

template <int kCount>
__device__ __forceinline__ void copy_vector(const float (&s_to)[kCount], const float* from,
                                            uint32_t barrier) {
    if (from == nullptr) return;
    expect_bytes(barrier, sizeof(s_to));
    copy_bulk(shared_address(s_to), from, sizeof(s_to), barrier);
}

// By one thread; completes on `barrier`, at which it arrives.
template <typename Shape>
__device__ __forceinline__ void copy_constants(const MlpConstants<Shape>& s, const MlpArguments& p,
                                               uint32_t barrier) {
    copy_vector(s.gamma, p.gamma, barrier);
    copy_vector(s.beta, p.beta, barrier);
    copy_vector(s.x_inverse, p.operand != nullptr ? p.next_inverse : p.in_inverse, barrier);
    copy_vector(s.fc1_factor, p.fc1_factor, barrier);
    copy_vector(s.fc1_bias, p.fc1_bias, barrier);
    copy_vector(s.hidden_inverse, p.hidden_inverse, barrier);
    copy_vector(s.fc2_factor, p.fc2_factor, barrier);
    copy_vector(s.fc2_bias, p.fc2_bias, barrier);
    copy_vector(s.out_inverse, p.out_inverse, barrier);
    copy_vector(s.out_scale, p.out_scale, barrier);
    arrive(barrier);
}

// Shared memory of a block. The weights' slabs want multiples of 1024 bytes.
template <typename Shape>
struct MlpMemory {
    uint8_t fc1[Shape::kSlots][Shape::kPartBytes];
    uint8_t fc2[Shape::kSlots][Shape::kPartBytes];
    MlpConstants<Shape> constants;
    uint64_t full[Shape::kSlots];  // barriers
    uint64_t constants_full;
    uint32_t released[Shape::kSlots];  // warps that were done with the slot, from the start
};

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
struct MlpCopies {
    const MlpArguments& p;
    const MlpMemory<Shape>& s;
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

    // By one thread, before the block's barrier.
    __device__ __forceinline__ void start() const {
        for (int slot = 0; slot < Shape::kSlots; ++slot) {
            init_barrier(shared_address(&s.full[slot]), 1);
            asm volatile("st.shared.u32 [%0], 0;" ::"r"(shared_address(&s.released[slot])));
        }
        init_barrier(shared_address(&s.constants_full), 1);
        publish_barriers();
        copy_constants(s.constants, p, shared_address(&s.constants_full));
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

}  // namespace swinq

// The C ABI of each kernel alone: arguments are checked and handed on.
#include "engine/c_arguments.h"
#include "engine/error.h"
#include "engine/weights.h"
#include "include/swinq.h"
#include "kernels/attention.h"
#include "kernels/gemm.h"
#include "kernels/layernorm.h"
#include "kernels/patch_embed.h"

namespace {

using namespace swinq;

constexpr uintptr_t kAligned = 16;  // the widest load of a kernel
constexpr int64_t kMost = 1 << 30;  // of anything that is counted

cudaStream_t stream_of(void* stream) {
    return static_cast<cudaStream_t>(stream);
}

Type type_of(const char* name, int32_t type) {
    return enum_of(name, type, Type::kFloat);
}

// Half or float: what the residual stream can be.
Type stream_type(int32_t type) {
    require_range("stream", type, SWINQ_HALF, SWINQ_FLOAT);
    return static_cast<Type>(type);
}

// A vector that is wanted under some condition, and aligned if it is given.
void require_vector(const char* name, const float* vector, bool wanted) {
    if (wanted) {
        require_pointer(name, vector, kAligned);
    }
    require_alignment(name, vector, kAligned);
}

GemmArguments gemm_arguments(const swinq_gemm_arguments& c) {
    GemmArguments g = {};
    g.operand = type_of("operand", c.operand);
    g.stream = stream_type(c.stream);
    g.activation = enum_of("activation", c.activation, Activation::kNormalize);
    g.output = enum_of("output", c.output, Output::kStream);
    require_range("m", c.m, 0, kMost);
    require_range("n", c.n, 1, kMost);
    require_range("k", c.k, 1, kMost);
    if (c.n % 8 != 0) {
        refuse(text("n is ", c.n, ", wanted a multiple of 8"), "pad the weight with zero rows");
    }
    if (c.k * int64_t{size_of(g.operand)} % 16 != 0) {
        refuse(text("k is ", c.k, ", whose rows of ", c.k * int64_t{size_of(g.operand)},
                    " bytes are no multiple of 16"),
               "pad a and w with zero columns");
    }
    g.a = c.a;
    g.w = c.w;
    g.out = c.out;
    g.factor = c.factor;
    g.bias = c.bias;
    g.out_inverse = c.out_inverse;
    g.out_scale = c.out_scale;
    g.m = c.m;
    g.n = c.n;
    g.k = c.k;
    return g;
}

AttentionArguments attention_arguments(const swinq_attention_arguments& c) {
    AttentionArguments a = {};
    a.type = type_of("type", c.type);
    a.out_type = type_of("out_type", c.out_type);
    require_range("batch", c.batch, 0, kMost);
    require_range("resolution", c.resolution, 1, 1 << 15);
    require_range("window", c.window, 1, c.resolution);
    require_range("shift", c.shift, 0, c.window - 1);
    require_range("heads", c.heads, 1, kMost / (3 * kHeadDim));
    require_range("batch * resolution^2",
                  static_cast<int64_t>(c.batch) * c.resolution * c.resolution, 0, kMost);
    if (c.resolution % c.window != 0) {
        refuse(text("window ", c.window, " does not divide resolution ", c.resolution),
               "use windows that tile the map");
    }
    require_pointer("qkv", c.qkv, kAligned);
    require_pointer("out", c.out, kAligned);
    require_vector("bias_table", c.bias_table, true);
    require_vector("bias", c.bias, expanded_bias_size(c.window, c.heads) != 0);
    require_vector("factor", c.factor, true);
    require_vector("out_inverse", c.out_inverse, a.out_type == Type::kInt8);
    a.qkv = c.qkv;
    a.out = c.out;
    a.bias_table = c.bias_table;
    a.bias = c.bias;
    a.factor = c.factor;
    a.v_scale = c.v_scale;
    a.out_inverse = c.out_inverse;
    a.batch = c.batch;
    a.resolution = c.resolution;
    a.window = c.window;
    a.shift = c.shift;
    a.heads = c.heads;
    return a;
}

// Launches a kernel alone: in order, for the kernel before it may write its weights, too.
template <typename Work>
swinq_status launched(Work&& work) {
    return guarded([&] {
        const LaunchingScope in_order(Launching::kInOrder);
        work();
    });
}

void require_windows(int window, int heads) {
    require_range("window", window, 1, 1 << 10);
    require_range("heads", heads, 1, 1 << 16);
}

}  // namespace

swinq_status swinq_gemm_layout(swinq_type type, const void* weight, int n, int k, void* laid_out) {
    return guarded([&] {
        require_pointer("weight", weight);
        require_pointer("laid_out", laid_out);
        require_range("n", n, 1, kMost);
        require_range("k", k, 1, kMost);
        gemm_layout(type_of("type", type), weight, n, k, laid_out);
    });
}

swinq_status swinq_gemm(const swinq_gemm_arguments* arguments, void* stream) {
    return launched([&] {
        require_pointer("arguments", arguments);
        const GemmArguments g = gemm_arguments(*arguments);
        require_pointer("a", g.a, kAligned);
        require_pointer("w", g.w, kAligned);
        require_pointer("out", g.out, kAligned);
        require_vector("bias", g.bias, true);
        require_vector("factor", g.factor, g.operand == Type::kInt8);
        require_vector("out_inverse", g.out_inverse,
                       g.output == Output::kCodes || g.out_scale != nullptr);
        require_vector("out_scale", g.out_scale, false);
        const int32_t* tile = arguments->tile;
        const GemmTile wanted = {tile[0], tile[1], tile[2]};
        gemm(g, wanted.rows == 0 ? nullptr : &wanted, stream_of(stream));
    });
}

swinq_status swinq_gemm_tiles(const swinq_gemm_arguments* arguments, int32_t* tiles, int* count) {
    return guarded([&] {
        require_pointer("arguments", arguments);
        require_pointer("count", count);
        const int capacity = tiles == nullptr ? 0 : *count;
        require_range("*count", capacity, 0, kMost);
        std::vector<GemmTile> found(static_cast<size_t>(capacity));
        *count = list_tiles(gemm_arguments(*arguments), found.data(), capacity);
        for (int i = 0; i < *count && i < capacity; ++i) {
            const GemmTile& tile = found[static_cast<size_t>(i)];
            tiles[3 * i] = tile.instruction;
            tiles[3 * i + 1] = tile.rows;
            tiles[3 * i + 2] = tile.columns;
        }
    });
}

swinq_status swinq_attention_bias_size(int window, int heads, int64_t* floats) {
    return guarded([&] {
        require_pointer("floats", floats);
        require_windows(window, heads);
        *floats = expanded_bias_size(window, heads);
    });
}

swinq_status swinq_attention_bias(const float* table, int window, int heads, float* expanded) {
    return guarded([&] {
        require_pointer("table", table);
        require_pointer("expanded", expanded);
        require_windows(window, heads);
        if (expanded_bias_size(window, heads) != 0) {
            expand_bias(table, window, heads, expanded);
        }
    });
}

swinq_status swinq_attention(const swinq_attention_arguments* arguments, void* stream) {
    return launched([&] {
        require_pointer("arguments", arguments);
        const AttentionArguments a = attention_arguments(*arguments);
        if (a.batch != 0) {
            attention(a, stream_of(stream));
        }
    });
}

swinq_status swinq_prenorm(const swinq_prenorm_arguments* arguments, void* stream) {
    return launched([&] {
        require_pointer("arguments", arguments);
        const swinq_prenorm_arguments& c = *arguments;
        require_range("batch", c.batch, 0, kMost);
        require_range("resolution", c.resolution, 1, 1 << 15);
        require_range("channels", c.channels, 1, kMost / 4);
        require_pointer("x", c.x, kAligned);
        require_pointer("out", c.out, kAligned);
        require_vector("gamma", c.gamma, false);
        require_vector("beta", c.beta, c.gamma != nullptr);
        require_vector("inverse", c.inverse, c.operand == SWINQ_INT8);
        require_alignment("status", c.status, alignof(int32_t));
        const PrenormArguments a = {stream_type(c.stream),
                                    type_of("operand", c.operand),
                                    c.x,
                                    c.out,
                                    c.gamma,
                                    c.beta,
                                    c.inverse,
                                    c.status,
                                    c.eps,
                                    c.batch,
                                    c.resolution,
                                    c.channels,
                                    c.merge != 0};
        if (a.batch != 0) {
            prenorm(a, stream_of(stream));
        }
    });
}

swinq_status swinq_postnorm(const swinq_postnorm_arguments* arguments, void* stream) {
    return launched([&] {
        require_pointer("arguments", arguments);
        const swinq_postnorm_arguments& c = *arguments;
        const Type y_type = type_of("y_type", c.y_type);
        require_range("rows", c.rows, 0, kMost);
        require_range("channels", c.channels, 1, kMost);
        require_pointer("y", c.y, kAligned);
        require_pointer("x", c.x, kAligned);
        require_alignment("operand", c.operand, kAligned);
        require_vector("y_scale", c.y_scale, y_type == Type::kInt8);
        require_vector("inverse", c.inverse, c.operand != nullptr);
        require_vector("gamma", c.gamma, true);
        require_vector("beta", c.beta, true);
        const PostnormArguments a = {y_type,
                                     stream_type(c.stream),
                                     c.y,
                                     c.y_scale,
                                     c.x,
                                     c.operand,
                                     c.inverse,
                                     c.gamma,
                                     c.beta,
                                     c.eps,
                                     c.rows,
                                     c.channels,
                                     c.residual != 0};
        if (a.rows != 0) {
            postnorm(a, stream_of(stream));
        }
    });
}

swinq_status swinq_pool(const swinq_pool_arguments* arguments, void* stream) {
    return launched([&] {
        require_pointer("arguments", arguments);
        const swinq_pool_arguments& c = *arguments;
        require_range("batch", c.batch, 0, kMost);
        require_range("tokens", c.tokens, 1, kMost);
        require_range("channels", c.channels, 1, kMost);
        require_pointer("x", c.x, kAligned);
        require_pointer("pooled", c.pooled, kAligned);
        require_vector("gamma", c.gamma, true);
        require_vector("beta", c.beta, true);
        require_alignment("status", c.status, alignof(int32_t));
        const PoolArguments a = {stream_type(c.stream),
                                 c.x,
                                 c.pooled,
                                 c.gamma,
                                 c.beta,
                                 c.status,
                                 c.eps,
                                 c.batch,
                                 c.tokens,
                                 c.channels};
        if (a.batch != 0) {
            pool(a, stream_of(stream));
        }
    });
}

swinq_status swinq_patch_embed(const swinq_patch_embed_arguments* arguments, void* stream) {
    return launched([&] {
        require_pointer("arguments", arguments);
        const swinq_patch_embed_arguments& c = *arguments;
        require_range("image_type", c.image_type, SWINQ_HALF, SWINQ_FLOAT);
        require_range("batch", c.batch, 0, kMost);
        require_range("in_chans", c.in_chans, 1, 1 << 20);
        require_range("patch_size", c.patch_size, 1, 1 << 20);
        require_range("img_size", c.img_size, c.patch_size, 1 << 20);
        require_range("channels", c.channels, 1, 1 << 20);
        if (c.img_size % c.patch_size != 0) {
            refuse(text("img_size ", c.img_size, " is not a multiple of patch_size ", c.patch_size),
                   "change img_size");
        }
        require_pointer("images", c.images, kAligned);
        require_pointer("weight", c.weight, kAligned);
        require_pointer("x", c.x, kAligned);
        require_alignment("operand", c.operand, kAligned);
        require_vector("bias", c.bias, true);
        require_vector("gamma", c.gamma, true);
        require_vector("beta", c.beta, true);
        require_vector("inverse", c.inverse, c.operand != nullptr);
        require_alignment("status", c.status, alignof(int32_t));
        const PatchEmbedArguments a = {static_cast<Type>(c.image_type),
                                       stream_type(c.stream),
                                       c.images,
                                       c.weight,
                                       c.bias,
                                       c.gamma,
                                       c.beta,
                                       c.x,
                                       c.operand,
                                       c.inverse,
                                       c.status,
                                       c.eps,
                                       c.batch,
                                       c.in_chans,
                                       c.img_size,
                                       c.patch_size,
                                       c.channels};
        if (a.batch != 0) {
            patch_embed(a, stream_of(stream));
        }
    });
}

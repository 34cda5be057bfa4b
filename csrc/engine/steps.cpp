// What a forward does, step by step: the counterpart of swinq/int8/block_v1.py and block_v2.py. Who
// reads a tensor decides its form: codes with the reader's input scale, or floats.
#include <algorithm>
#include <cstring>
#include <string>

#include "engine/error.h"
#include "engine/linears.h"
#include "engine/plan.h"
#include "engine/weights.h"

namespace swinq {
namespace {

class StepBuilder {
  public:
    StepBuilder(const Model& model, const swinq_plan_options& options, Arena& arena, Plan& plan)
        : model_(model),
          is_v1_(model.architecture().version == 1),
          fuse_mlp_(options.fuse_mlp != 0),
          fuse_norm_(options.fuse_norm != 0),
          eps_(model.architecture().norm_eps),
          stream_(model.stream()),
          arena_(arena),
          plan_(plan),
          linears_(add_linears(model, fuse_mlp_, arena)) {}

    void build() {
        add_patch_embed();
        for (const Stage& stage : model_.stages()) {
            for (int block = 0; block < stage.depth; ++block) {
                add_attention_branch(stage, block);
                add_mlp_branch(stage, block);
            }
            if (stage.merges) {
                add_merge(stage);
            }
        }
        add_head(model_.stages().back());
    }

  private:
    // ---- blocks ----

    void add_patch_embed() {
        const swinq_architecture& a = model_.architecture();
        const swinq_tensor& weight = model_.tensor("patch_embed.proj.weight");
        const int64_t bytes = element_count(weight) * size_of(stream_);
        PatchEmbedArguments p = {};
        p.stream = stream_;
        p.weight = arena_.add<uint8_t>(bytes, [&](uint8_t* out) {
            std::memcpy(out, weight.data, static_cast<size_t>(bytes));
        });
        p.bias = add_vector("patch_embed.proj.bias");
        p.gamma = add_vector("patch_embed.norm.weight");
        p.beta = add_vector("patch_embed.norm.bias");
        p.inverse = stream_inverse(qkv_name(0, 0));
        p.eps = eps_;
        p.in_chans = a.in_chans;
        p.img_size = a.img_size;
        p.patch_size = a.patch_size;
        p.channels = a.embed_dim;
        require_shared_memory(patch_embed_shared_bytes(p),
                              text("patch_size ", a.patch_size, " with embed_dim ", a.embed_dim),
                              "use smaller patches or a narrower model");
        const int64_t values = model_.stages().front().tokens() * a.embed_dim;
        need(Buffer::kStatus, sizeof(int32_t));
        need(Buffer::kStream, values * size_of(stream_));
        need(Buffer::kOperand, p.inverse != nullptr ? values : 0);
        add(PatchEmbedStep{p});
    }

    void add_attention_branch(const Stage& stage, int block) {
        const std::string name = block_name(stage.index, block);
        const Linear& qkv = linears_.at(name + ".attn.qkv");
        const Linear& proj = linears_.at(name + ".attn.proj");
        const Type type = model_.type(name + ".attn");
        if (is_v1_) {
            add_prenorm(stage, name + ".norm1", qkv);
        }
        add_gemm(qkv, stage, operand_of(qkv), is_v1_ ? Activation::kNone : Activation::kNormalize,
                 type, type == Type::kInt8 ? qkv_inverse(name + ".attn", stage.heads) : nullptr);
        add_attention(stage, block, type, proj);
        if (is_v1_) {
            add_stream_gemm(proj, stage, Buffer::kNarrow, Output::kResidual);
        } else {
            add_normed_gemm(proj, stage, Buffer::kNarrow, Buffer::kWide, name + ".norm1", true,
                            stream_inverse(name + ".mlp.fc1"));
        }
    }

    void add_mlp_branch(const Stage& stage, int block) {
        const std::string name = block_name(stage.index, block);
        const Linear& fc1 = linears_.at(name + ".mlp.fc1");
        const Linear& fc2 = linears_.at(name + ".mlp.fc2");
        const bool is_last = block + 1 == stage.depth;  // merge and head read x itself
        const float* next = is_last ? nullptr : stream_inverse(qkv_name(stage.index, block + 1));
        const int separate = most_for_separate_mlp(model_, stage, name, fuse_mlp_);
        if (separate < kAnyBatch) {
            least_batch_ = separate + 1;
            add_fused_mlp(stage, name + ".norm2", fc1, fc2, next);
            least_batch_ = 1;
        }
        if (separate > 0) {
            most_batch_ = separate;
            add_separate_mlp(stage, name + ".norm2", fc1, fc2, next);
            most_batch_ = kAnyBatch;
        }
    }

    void add_merge(const Stage& stage) {
        const Stage& next = model_.stages()[static_cast<size_t>(stage.index) + 1];
        const std::string norm = merge_name(stage.index) + ".norm";
        const Linear& reduction = linears_.at(merge_name(stage.index) + ".reduction");
        // not through kOperand: v2's reduction may write there while it reads
        add_prenorm(stage, is_v1_ ? norm : "", reduction, true, Buffer::kWide);
        if (is_v1_) {
            add_stream_gemm(reduction, next, Buffer::kWide, Output::kStream);
        } else {
            add_normed_gemm(reduction, next, Buffer::kWide, Buffer::kNarrow, norm, false,
                            stream_inverse(qkv_name(next.index, 0)));
        }
    }

    void add_head(const Stage& stage) {
        PoolArguments p = {};
        p.stream = stream_;
        p.gamma = add_vector("norm.weight");
        p.beta = add_vector("norm.bias");
        p.eps = eps_;
        p.tokens = static_cast<int>(stage.tokens());
        p.channels = stage.dim;
        need(Buffer::kPooled, static_cast<int64_t>(stage.dim) * size_of(stream_));
        add(PoolStep{p});

        const Linear head = add_head_linear(model_, arena_);
        GemmArguments g = gemm_arguments(head, Activation::kNone, Output::kFloat);
        if (head.n != model_.architecture().num_classes) {
            need(Buffer::kLogits, head.n * static_cast<int64_t>(sizeof(float)));
        }
        add(GemmStep{g, Buffer::kPooled, Buffer::kLogits, 1});
    }

    // ---- steps ----

    // x, its norm (unless the name is empty) or that of four neighbours, as `reader` wants it.
    void add_prenorm(const Stage& stage, const std::string& norm, const Linear& reader,
                     bool merge = false, Buffer out = Buffer::kOperand) {
        PrenormArguments p = {};
        p.stream = stream_;
        p.operand = reader.type;
        if (!norm.empty()) {
            p.gamma = add_vector(norm + ".weight");
            p.beta = add_vector(norm + ".bias");
        }
        p.inverse = reader.in_inverse;
        p.eps = eps_;
        p.resolution = stage.resolution;
        p.channels = stage.dim;
        p.merge = merge;
        need(out, stage.tokens() * stage.dim * size_of(reader.type));
        add(PrenormStep{p, out});
    }

    GemmArguments gemm_arguments(const Linear& linear, Activation activation, Output output) const {
        GemmArguments g = {};
        g.operand = linear.type;
        g.stream = stream_;
        g.activation = activation;
        g.output = output;
        g.w = linear.weight;
        g.factor = linear.factor;
        g.bias = linear.bias;
        g.n = linear.n;
        g.k = linear.k;
        return g;
    }

    // Into kWide, in the form that the next kernel reads; `inverse` makes its codes.
    void add_gemm(const Linear& linear, const Stage& stage, Buffer a, Activation activation,
                  Type reader, const float* inverse) {
        const Output output = reader == Type::kInt8   ? Output::kCodes
                              : reader == Type::kHalf ? Output::kHalf
                                                      : Output::kFloat;
        GemmArguments g = gemm_arguments(linear, activation, output);
        g.out_inverse = inverse;
        need(Buffer::kWide, stage.tokens() * linear.n * size_of(reader));
        add(GemmStep{g, a, Buffer::kWide, static_cast<int>(stage.tokens())});
    }

    // v1: into the residual stream, on the way rounded to int8 where the file says so.
    void add_stream_gemm(const Linear& linear, const Stage& stage, Buffer a, Output output) {
        GemmArguments g = gemm_arguments(linear, Activation::kNone, output);
        g.out_inverse = linear.out_inverse;
        g.out_scale = linear.out_scale;
        add(GemmStep{g, a, Buffer::kStream, static_cast<int>(stage.tokens())});
    }

    // v2: by its norm into the residual stream, on the way to the norm rounded to int8 where the
    // file says so; and, where `inverse` is not null, into the codes that the next layer reads. `y`
    // lies between where the GEMM has no norm of its own.
    void add_normed_gemm(const Linear& linear, const Stage& stage, Buffer a, Buffer y,
                         const std::string& norm, bool residual, const float* inverse) {
        const int rows = static_cast<int>(stage.tokens());
        need(Buffer::kOperand, inverse != nullptr ? stage.tokens() * linear.n : 0);
        if (has_norm_kernel(linear)) {
            GemmArguments g = gemm_arguments(linear, Activation::kNone,
                                             residual ? Output::kResidual : Output::kStream);
            g.out_inverse = linear.out_inverse;
            g.out_scale = linear.out_scale;
            g.has_norm = true;
            g.norm_gamma = add_vector(norm + ".weight");
            g.norm_beta = add_vector(norm + ".bias");
            g.norm_eps = eps_;
            g.norm_inverse = inverse;
            add(GemmStep{g, a, Buffer::kStream, rows});
            return;
        }
        const bool rounded = linear.out_inverse != nullptr;
        GemmArguments g =
            gemm_arguments(linear, Activation::kNone, rounded ? Output::kCodes : Output::kFloat);
        g.out_inverse = linear.out_inverse;
        PostnormArguments p = {};
        p.y_type = rounded ? Type::kInt8 : Type::kFloat;
        p.stream = stream_;
        p.y_scale = linear.out_scale;
        p.inverse = inverse;
        p.gamma = add_vector(norm + ".weight");
        p.beta = add_vector(norm + ".bias");
        p.eps = eps_;
        p.channels = linear.n;
        p.residual = residual;
        need(y, stage.tokens() * linear.n * size_of(p.y_type));
        add(GemmStep{g, a, y, rows});
        add(PostnormStep{p, y, rows});
    }

    // Whether the GEMM that writes the residual stream can take a norm with it on this device.
    bool has_norm_kernel(const Linear& linear) const {
        return fuse_norm_ && stream_ == Type::kHalf && can_normalize(linear.type, linear.n);
    }

    void add_attention(const Stage& stage, int block, Type type, const Linear& proj) {
        const std::string name = block_name(stage.index, block) + ".attn";
        const float* softmax_scale = model_.floats(name + ".softmax_scale");
        const int64_t side = 2 * stage.window - 1;
        const std::vector<float> table = transposed(
            model_.floats(name + ".relative_position_bias_table"), side * side, stage.heads);
        AttentionArguments a = {};
        a.type = type;
        a.out_type = proj.type;
        a.bias_table = arena_.add(table);
        if (const int64_t size = expanded_bias_size(stage.window, stage.heads)) {
            a.bias = arena_.add<float>(size, [&](float* out) {
                expand_bias(table.data(), stage.window, stage.heads, out);
            });
        }
        if (type == Type::kInt8) {
            a.factor = arena_.add(attention_factor(model_.floats(name + ".q_scale"),
                                                   model_.floats(name + ".k_scale"), softmax_scale,
                                                   stage.heads));
            a.v_scale = *model_.floats(name + ".v_scale");
        } else {
            a.factor = arena_.add(std::vector<float>(softmax_scale, softmax_scale + stage.heads));
        }
        a.out_inverse = proj.in_inverse;
        a.resolution = stage.resolution;
        a.window = stage.window;
        a.shift = block % 2 != 0 ? stage.shift : 0;
        a.heads = stage.heads;
        require_shared_memory(attention_shared_bytes(a), text("window_size ", stage.window),
                              "use a smaller window, or fp32 throughout");
        need(Buffer::kNarrow, stage.tokens() * proj.k * size_of(proj.type));
        add(AttentionStep{a});
    }

    // `next` makes the codes that the next layer reads of v2's stream, if it reads codes.
    void add_separate_mlp(const Stage& stage, const std::string& norm, const Linear& fc1,
                          const Linear& fc2, const float* next) {
        if (is_v1_) {
            add_prenorm(stage, norm, fc1);
        }
        add_gemm(fc1, stage, operand_of(fc1), Activation::kGelu, fc2.type, fc2.in_inverse);
        if (is_v1_) {
            add_stream_gemm(fc2, stage, Buffer::kWide, Output::kResidual);
        } else {
            add_normed_gemm(fc2, stage, Buffer::kWide, Buffer::kNarrow, norm, true, next);
        }
    }

    void add_fused_mlp(const Stage& stage, const std::string& norm, const Linear& fc1,
                       const Linear& fc2, const float* next) {
        MlpArguments m = {};
        m.gamma = add_vector(norm + ".weight");
        m.beta = add_vector(norm + ".bias");
        m.in_inverse = is_v1_ ? fc1.in_inverse : nullptr;
        m.next_inverse = next;
        m.fc1_weight = fc1.mlp_weight;
        m.fc1_factor = fc1.factor;
        m.fc1_bias = fc1.bias;
        m.hidden_inverse = fc2.in_inverse;
        m.fc2_weight = fc2.mlp_weight;
        m.fc2_factor = fc2.factor;
        m.fc2_bias = fc2.bias;
        m.out_inverse = fc2.out_inverse;
        m.out_scale = fc2.out_scale;
        m.eps = eps_;
        m.channels = stage.dim;
        m.hidden = stage.hidden;
        add(MlpStep{m, static_cast<int>(stage.tokens())});
    }

    // ---- parts ----

    void add(const Kernel& kernel) { plan_.steps.push_back({kernel, least_batch_, most_batch_}); }

    // A plan is refused here, before a forward has begun that could not end.
    static void require_shared_memory(int64_t bytes, const std::string& what,
                                      const std::string& fix) {
        const int limit = shared_memory_limit();
        if (bytes > limit) {
            fail(Error::kUnsupported,
                 text(what, " wants ", bytes, " bytes of shared memory a block, the GPU has ",
                      limit),
                 fix + ", or run it on the CPU");
        }
    }

    static std::string qkv_name(int stage, int block) {
        return block_name(stage, block) + ".attn.qkv";
    }

    const float* add_vector(const std::string& name) {
        const float* data = model_.floats(name);
        return arena_.add(std::vector<float>(data, data + element_count(model_.tensor(name))));
    }

    const float* qkv_inverse(const std::string& attention, int heads) {
        return arena_.add(inverses(qkv_scales(model_.floats(attention + ".q_scale"),
                                              model_.floats(attention + ".k_scale"),
                                              *model_.floats(attention + ".v_scale"), heads)));
    }

    // What makes the codes that a v2 layer reads of the residual stream, by who writes that; null
    // where the layer reads none of x itself.
    const float* stream_inverse(const std::string& layer) const {
        return is_v1_ ? nullptr : linears_.at(layer).in_inverse;
    }

    // v1's layers read a norm of x, v2's its codes or x itself.
    Buffer operand_of(const Linear& linear) const {
        return is_v1_ || linear.type == Type::kInt8 ? Buffer::kOperand : Buffer::kStream;
    }

    void need(Buffer buffer, int64_t bytes) {
        int64_t& most = plan_.image_bytes[static_cast<size_t>(buffer)];
        most = std::max(most, bytes);
    }

    const Model& model_;
    const bool is_v1_;
    const bool fuse_mlp_;
    const bool fuse_norm_;
    const float eps_;
    const Type stream_;
    Arena& arena_;
    Plan& plan_;
    const Linears linears_;
    int least_batch_ = 1, most_batch_ = kAnyBatch;  // of the steps that are added
};

}  // namespace

void build_steps(const Model& model, const swinq_plan_options& options, Arena& arena, Plan& plan) {
    plan.steps.clear();
    plan.image_bytes = {};
    StepBuilder(model, options, arena, plan).build();
}

}  // namespace swinq

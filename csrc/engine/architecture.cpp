// What a Swin Transformer is: see architecture.h. Same checks and words as architecture.py.
#include "engine/architecture.h"

#include <cmath>

#include "engine/error.h"

namespace swinq {
namespace {

constexpr int kMostOfAnything = 1 << 20;  // so that no product below leaves 64 bits
constexpr int kChannelStep = 16;          // 16 bytes of int8 codes: what kernels load at once
constexpr int kMostChannels = 1536;       // of a stage: what the rows of norms hold
constexpr float kSmallestEps = 1.17549435e-38f;  // 2^-126: fp32 holds it with all its digits
constexpr int kLargestMlpRatio = 1024;
constexpr int kMostEmbedDim = 256;  // what patch embedding holds
constexpr int kMostPatchPixels = 1 << 16;
constexpr int kMostWindowsAcross = 255;  // of an image: their square is a limit of the grid

void require_between(const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low) {
        refuse(text(name, " is ", value, "; it must be at least ", low), text("correct ", name));
    }
    if (value > high) {
        refuse(text(name, " is ", value, "; it must be at most ", high), text("correct ", name));
    }
}

// Without overflow: dimensions of a coarse stage double with its index.
int64_t dim_of(const swinq_architecture& a, int stage) {
    return static_cast<int64_t>(a.embed_dim) << stage;
}

int64_t hidden_of(const swinq_architecture& a, int stage) {
    return static_cast<int64_t>(static_cast<double>(dim_of(a, stage)) * a.mlp_ratio);
}

std::string img_size_fix(const swinq_architecture& a) {
    const int64_t step = (static_cast<int64_t>(a.patch_size) * a.window_size) << (a.stages - 1);
    return text("use an img_size that is a multiple of ", step);
}

void validate_fields(const swinq_architecture& a) {
    if (a.version != 1 && a.version != 2) {
        refuse(text("version is ", a.version, "; Swin has versions 1 and 2"),
               "set version to 1 or 2");
    }
    require_between("img_size", a.img_size, 1, kMostOfAnything);
    require_between("patch_size", a.patch_size, 1, kMostOfAnything);
    require_between("in_chans", a.in_chans, 1, kMostOfAnything);
    require_between("num_classes", a.num_classes, 1, kMostOfAnything);
    require_between("embed_dim", a.embed_dim, 1, kMostOfAnything);
    require_between("window_size", a.window_size, 1, kMostOfAnything);
    require_between("stages", a.stages, 1, SWINQ_MAX_STAGES);
    for (int i = 0; i < a.stages; ++i) {
        require_between("depths", a.depths[i], 1, kMostOfAnything);
        require_between("num_heads", a.num_heads[i], 1, kMostOfAnything);
    }
    if (!(a.norm_eps >= kSmallestEps && a.norm_eps <= 1) ||
        !(a.mlp_ratio > 0 && a.mlp_ratio <= kLargestMlpRatio)) {
        refuse(text("norm_eps is ", a.norm_eps, ", wanted ", kSmallestEps, " to 1, and mlp_ratio ",
                    a.mlp_ratio, ", wanted more than 0 and at most ", kLargestMlpRatio),
               "the official models use norm_eps 1e-5 and mlp_ratio 4");
    }
    const int64_t patch = static_cast<int64_t>(a.in_chans) * a.patch_size;
    if (a.embed_dim > kMostEmbedDim || patch * a.patch_size > kMostPatchPixels) {
        fail(Error::kUnsupported,
             text("embed_dim ", a.embed_dim, ", patch_size ", a.patch_size, " and in_chans ",
                  a.in_chans, "; kernels exist for up to ", kMostEmbedDim, " channels and ",
                  kMostPatchPixels, " values of a patch"),
             "use a narrower model or smaller patches, or run it on the CPU");
    }
    if (a.img_size % a.patch_size != 0) {
        refuse(text("img_size ", a.img_size, " is not a multiple of patch_size ", a.patch_size),
               "change img_size");
    }
}

void validate_stage(const swinq_architecture& a, int index) {
    const std::string where = text("stage ", index);
    const int resolution = (a.img_size / a.patch_size) >> index;
    const int window = resolution <= a.window_size ? resolution : a.window_size;
    const int64_t dim = dim_of(a, index);
    const int heads = a.num_heads[index];
    if (resolution < 1 || resolution % window != 0) {
        refuse(text("window_size ", a.window_size, " does not divide the resolution ", resolution,
                    " of ", where, " (img_size ", a.img_size, ")"),
               img_size_fix(a));
    }
    if (resolution / window > kMostWindowsAcross) {
        fail(Error::kUnsupported,
             text(where, " has ", resolution / window, " windows across; kernels exist for up to ",
                  kMostWindowsAcross),
             "use smaller images or larger windows, or run it on the CPU");
    }
    if (index + 1 < a.stages && resolution % 2 != 0) {
        refuse(text(where, " has resolution ", resolution,
                    ", which patch merging cannot halve (img_size ", a.img_size, ")"),
               img_size_fix(a));
    }
    if (dim % heads != 0) {
        refuse(text("num_heads: ", heads, " heads do not divide the ", dim, " channels of ", where),
               text("the official models have 32 channels a head, so ", dim < 32 ? 1 : dim / 32,
                    " here"));
    }
    if (dim / heads > kHeadDim) {
        fail(Error::kUnsupported,
             text("num_heads: ", heads, " heads leave ", dim / heads, " channels a head in ", where,
                  "; kernels exist for up to ", kHeadDim),
             text("use at least ", ceil_div(dim, kHeadDim), " heads, or run it on the CPU"));
    }
    const int64_t hidden = hidden_of(a, index);
    if (hidden < 1) {
        refuse(text("mlp_ratio ", a.mlp_ratio, " leaves ", where, " without hidden channels"),
               "the official models use mlp_ratio 4");
    }
    if (dim % kChannelStep != 0 || hidden % kChannelStep != 0) {
        fail(Error::kUnsupported,
             text(where, " has ", dim, " channels and ", hidden, " hidden ones; kernels exist for ",
                  "multiples of ", kChannelStep),
             "use an embed_dim and an mlp_ratio that give such, or run it on the CPU");
    }
    if (dim > kMostChannels) {
        fail(Error::kUnsupported,
             text(where, " has ", dim, " channels; kernels exist for up to ", kMostChannels),
             "use a narrower model, or run it on the CPU");
    }
    require_between("hidden channels of a stage", hidden, 1, kMostOfAnything);
    require_between("tokens of an image", static_cast<int64_t>(resolution) * resolution, 1,
                    1 << 30);
}

}  // namespace

int Stage::padded_dim() const {
    return heads * kHeadDim;
}

std::vector<Stage> stages(const swinq_architecture& a) {
    std::vector<Stage> found;
    for (int i = 0; i < a.stages; ++i) {
        const int resolution = (a.img_size / a.patch_size) >> i;
        const bool whole = resolution <= a.window_size;
        Stage stage = {};
        stage.index = i;
        stage.dim = static_cast<int>(dim_of(a, i));
        stage.depth = a.depths[i];
        stage.heads = a.num_heads[i];
        stage.resolution = resolution;
        stage.window = whole ? resolution : a.window_size;
        stage.shift = whole ? 0 : a.window_size / 2;
        stage.hidden = static_cast<int>(hidden_of(a, i));
        stage.merges = i + 1 < a.stages;
        found.push_back(stage);
    }
    return found;
}

void validate(const swinq_architecture& architecture) {
    validate_fields(architecture);
    for (int i = 0; i < architecture.stages; ++i) {
        validate_stage(architecture, i);
    }
}

}  // namespace swinq

// patch_embed(): checks the arguments, clears the status, calls the kernel for the stream's type.
#include "patch_embed.h"

#include "arguments.h"
#include "device.cuh"
#include "patch_embed_kernels.h"

namespace swinq {

namespace {

constexpr int kMostChannels = 256;
constexpr double kMostDepth = 1 << 16;  // pixels of a patch
constexpr int kClearThreads = 256;

__global__ void clear_status_kernel(int* status, int batch) {
    wait_for_predecessor();
    let_successor_start();
    const int image = blockIdx.x * kClearThreads + threadIdx.x;
    if (image < batch) status[image] = 0;
}

void check_sizes(const PatchEmbedArguments& a) {
    const std::string sizes =
        "batch " + std::to_string(a.batch) + ", in_chans " + std::to_string(a.in_chans) +
        ", img_size " + std::to_string(a.img_size) + ", patch_size " + std::to_string(a.patch_size);
    if (a.batch < 0 || a.in_chans <= 0 || a.img_size <= 0 || a.patch_size <= 0) {
        refuse_argument("patch_embed", sizes, "all but batch must be positive");
    }
    if (a.img_size % a.patch_size != 0) {
        refuse_argument("patch_embed", sizes, "img_size must be a multiple of patch_size");
    }
    if (static_cast<double>(a.in_chans) * a.patch_size * a.patch_size > kMostDepth) {
        refuse_argument("patch_embed", sizes, "a patch may have at most 65536 pixels");
    }
    const double pixels = static_cast<double>(a.in_chans) * a.img_size * a.img_size;
    const int side = a.img_size / a.patch_size;
    if (pixels > INT32_MAX || static_cast<double>(a.batch) * side * side > (1 << 30)) {
        refuse_argument("patch_embed", sizes, "use a smaller batch or smaller images");
    }
    require_matrix("patch_embed", static_cast<int64_t>(a.batch) * side * side, a.channels);
    if (a.channels > kMostChannels) {
        throw Error(Error::kUnsupported, "patch_embed: channels is " + std::to_string(a.channels) +
                                             ", the kernel has at most 256\n  fix: use a smaller "
                                             "embed_dim, or run it on the CPU");
    }
}

void check(const PatchEmbedArguments& a) {
    check_sizes(a);
    if (a.image_type != Type::kHalf && a.image_type != Type::kFloat) {
        refuse_type("patch_embed", "image_type", a.image_type, "half or float");
    }
    if (a.stream != Type::kHalf && a.stream != Type::kFloat) {
        refuse_type("patch_embed", "stream", a.stream, "half or float");
    }
    require_pointer("patch_embed", "images", a.images);
    require_pointer("patch_embed", "weight", a.weight);
    require_pointer("patch_embed", "bias", a.bias);
    require_pointer("patch_embed", "gamma", a.gamma);
    require_pointer("patch_embed", "beta", a.beta);
    require_pointer("patch_embed", "x", a.x);
    if (a.operand) {
        require_pointer("patch_embed", "operand", a.operand);
        require_pointer("patch_embed", "inverse", a.inverse);
    }
}

}  // namespace

void patch_embed(const PatchEmbedArguments& a, cudaStream_t stream) {
    if (a.batch == 0) return;
    check(a);
    if (a.status) {
        const auto blocks = static_cast<unsigned>(ceil_div(a.batch, kClearThreads));
        launch(clear_status_kernel, blocks, kClearThreads, 0, stream, a.status, a.batch);
    }
    (a.stream == Type::kHalf ? patch_embed_half : patch_embed_float)(a, stream);
}

}  // namespace swinq

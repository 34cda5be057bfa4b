// Checks what attention() is given and picks its kernel.
#include "attention.h"

#include <string>

#include "arguments.h"
#include "attention_kernels.h"

namespace swinq {
namespace {

const char kKernel[] = "attention";

void require_at_least(const char* name, int value, int least) {
    if (value >= least) return;
    refuse_argument(kKernel, std::string(name) + " is " + std::to_string(value),
                    "pass at least " + std::to_string(least));
}

void require_present(const char* name, const void* pointer) {
    if (pointer == nullptr) refuse_argument(kKernel, std::string(name) + " is null", "pass it");
}

void require_type(const char* name, Type type) {
    if (type == Type::kInt8 || type == Type::kHalf || type == Type::kFloat) return;
    refuse_type(kKernel, name, type, "one of the three");
}

void check(const AttentionArguments& a) {
    require_type("type", a.type);
    require_type("out_type", a.out_type);
    require_at_least("batch", a.batch, 0);
    require_at_least("heads", a.heads, 1);
    require_at_least("window", a.window, 1);
    require_at_least("resolution", a.resolution, 1);
    if (a.resolution % a.window != 0) {
        refuse_argument(kKernel,
                        "resolution " + std::to_string(a.resolution) +
                            " is no multiple of window " + std::to_string(a.window),
                        "pass a window that divides the resolution");
    }
    if (a.shift < 0 || a.shift >= a.window) {
        refuse_argument(
            kKernel, "shift is " + std::to_string(a.shift) + ", window " + std::to_string(a.window),
            "pass a shift from 0 to window - 1");
    }
    // limits of the grid and of 32-bit indices
    const int64_t across = a.resolution / a.window;
    const int64_t tokens = static_cast<int64_t>(a.resolution) * a.resolution * a.batch;
    if (across * across > 65535 || a.heads > 65535 || tokens > (int64_t{1} << 30) ||
        static_cast<int64_t>(a.batch) * a.heads > INT32_MAX) {
        refuse_argument(kKernel,
                        "batch " + std::to_string(a.batch) + ", resolution " +
                            std::to_string(a.resolution) + ", heads " + std::to_string(a.heads) +
                            " are too many; there can be 2^30 tokens, 65535 windows of an image "
                            "and 2^31 heads of the batch",
                        "use a smaller batch");
    }
    require_pointer(kKernel, "qkv", a.qkv);
    require_pointer(kKernel, "out", a.out);
    require_present("factor", a.factor);
    require_present("bias_table", a.bias_table);
    if (a.type != Type::kFloat && is_small_window(a.window)) {
        require_pointer(kKernel, "bias (from expand_bias(), for this window)", a.bias);
    }
    if (a.out_type == Type::kInt8) require_pointer(kKernel, "out_inverse", a.out_inverse);
}

}  // namespace

void attention(const AttentionArguments& a, cudaStream_t stream) {
    check(a);
    if (a.batch == 0) return;
    if (a.type == Type::kFloat) {
        attention_float(a, stream);
    } else if (is_small_window(a.window)) {
        attention_small(a, stream);
    } else if (!attention_large(a, stream)) {
        attention_generic(a, stream);
    }
}

}  // namespace swinq

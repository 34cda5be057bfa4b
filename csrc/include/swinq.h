/* libswinq: Swin Transformers v1 and v2 in INT8, FP16 and FP32 on NVIDIA GPUs, behind a C ABI.
 *
 *     swinq_plan* plan;
 *     swinq_plan_create(&model, device, &plan);            copies and lays out the weights
 *     swinq_workspace_size(plan, batch, &bytes);
 *     swinq_prepare(plan, batch);
 *     swinq_forward(plan, images, ..., workspace, bytes, stream);
 *     swinq_plan_destroy(plan);
 *
 * Every function returns a swinq_status; where it is not SWINQ_OK, swinq_last_error() is the reason
 * in words. Arguments are refused before anything is enqueued; after SWINQ_CUDA_ERROR a part of a
 * forward may have been. The caller owns all memory but the plan's weights. Forwards enqueue on the
 * given stream and can be captured in a CUDA graph; of a batch that is prepared they allocate
 * nothing and never synchronise. A plan is read-only after creation: several streams may use it at
 * once, each with its own workspace.
 */
#ifndef SWINQ_H
#define SWINQ_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(SWINQ_BUILD)
#define SWINQ_API __attribute__((visibility("default")))
#else
#define SWINQ_API
#endif

#define SWINQ_ABI_VERSION 3
#define SWINQ_MAX_STAGES 8

typedef enum {
    SWINQ_OK = 0,
    SWINQ_INVALID_ARGUMENT = 1,
    SWINQ_UNSUPPORTED = 2, /* this GPU, or a size no kernel exists for */
    SWINQ_OUT_OF_MEMORY = 3,
    SWINQ_CUDA_ERROR = 4, /* the CUDA runtime failed */
    SWINQ_INTERNAL_ERROR = 5
} swinq_status;

typedef enum { SWINQ_INT8 = 0, SWINQ_HALF = 1, SWINQ_FLOAT = 2 } swinq_type;

/* Precision of a linear layer or an attention; words as in docs/checkpoint-format.md. */
typedef enum {
    SWINQ_PRECISION_INT8 = 0,
    SWINQ_PRECISION_INT8_UNROUNDED = 1,
    SWINQ_PRECISION_FP16 = 2,
    SWINQ_PRECISION_FP32 = 3 /* all layers or none: the residual stream is then fp32 too */
} swinq_precision;

typedef struct {
    const char* name; /* as in docs/checkpoint-format.md */
    swinq_type type;
    int32_t rank;
    int64_t shape[4];
    const void* data; /* host memory, row-major, read during the call only */
} swinq_tensor;

typedef struct {
    const char* name; /* layers.S.blocks.B.attn, .attn.qkv, .attn.proj, .mlp.fc1, .mlp.fc2,
                         layers.S.downsample.reduction */
    swinq_precision precision;
} swinq_layer;

typedef struct {
    int32_t version; /* 1 or 2 */
    int32_t img_size, patch_size, in_chans, num_classes, embed_dim;
    int32_t stages;
    int32_t depths[SWINQ_MAX_STAGES];
    int32_t num_heads[SWINQ_MAX_STAGES];
    int32_t window_size; /* nominal; a stage no larger than it is one unshifted window */
    double mlp_ratio; /* hidden channels of a stage: its channels times this, cut to an integer */
    float norm_eps;
} swinq_architecture;

typedef struct {
    swinq_architecture architecture;
    const swinq_tensor* tensors;
    size_t tensor_count;
    const swinq_layer* layers;
    size_t layer_count;
} swinq_model;

typedef struct swinq_plan swinq_plan;

SWINQ_API int swinq_abi_version(void);
SWINQ_API const char* swinq_version(void);

/* The last failure on this thread; "" if there was none. Valid until the thread's next call. */
SWINQ_API const char* swinq_last_error(void);

/* SWINQ_OK if kernels exist for the device: compute capability 7.5 or later. */
SWINQ_API swinq_status swinq_check_device(int device);

/* SWINQ_OK if a plan of such a model could be made, given its tensors: before they are. */
SWINQ_API swinq_status swinq_check_architecture(const swinq_architecture* architecture);

/* Everything is checked before anything is copied: names, types, shapes, sizes that kernels exist
 * for. Allocates the weights on `device`. */
SWINQ_API swinq_status swinq_plan_create(const swinq_model* model, int device, swinq_plan** plan);
SWINQ_API void swinq_plan_destroy(swinq_plan* plan);

/* The same with choices that change how long a forward takes and not what it computes. */
typedef struct {
    int32_t fuse_mlp;  /* fc1, fc2 and norm2 in one kernel where there is one; default 1 */
    int32_t fuse_norm; /* norms within the GEMM that comes before, where they can be; default 1 */
    int32_t use_tile_cache; /* tiles that swin_gemm measured on such a GPU; default 1 */
} swinq_plan_options;
SWINQ_API swinq_status swinq_plan_create_with_options(const swinq_model* model,
                                                      const swinq_plan_options* options, int device,
                                                      swinq_plan** plan);

/* The plan of an INT8 checkpoint, docs/checkpoint-format.md. int8_mode 1 or 2 refuses a file of the
 * other mode, 0 takes either. Everything that can be wrong with a file is refused in words. */
SWINQ_API swinq_status swinq_plan_create_from_file(const char* path, int int8_mode, int device,
                                                   swinq_plan** plan);

/* The plan of such a file in fp32 throughout, its int8 layers dequantized (weight = scale * code)
 * and its fp16 ones widened: the same function but for the rounding of activations, computed by
 * other kernels. For checking a plan of the file; its weights take four times the memory. */
SWINQ_API swinq_status swinq_plan_create_dequantized(const char* path, int device,
                                                     swinq_plan** plan);

SWINQ_API swinq_status swinq_plan_architecture(const swinq_plan* plan,
                                               swinq_architecture* architecture);
SWINQ_API swinq_status swinq_workspace_size(const swinq_plan* plan, int batch, size_t* bytes);
/* Loads the kernels of a forward of `batch` images. CUDA else does so at a kernel's first launch,
 * which may allocate and wait. */
SWINQ_API swinq_status swinq_prepare(const swinq_plan* plan, int batch);
SWINQ_API swinq_status swinq_weight_bytes(const swinq_plan* plan, size_t* bytes);
/* Kernels that a forward of `batch` images launches. */
SWINQ_API swinq_status swinq_launch_count(const swinq_plan* plan, int batch, int* launches);
/* Linear layers and attentions that compute with int8 codes. */
SWINQ_API swinq_status swinq_int8_layer_count(const swinq_plan* plan, int* layers);

/* Logits of a batch. Device memory: images (batch, in_chans, img_size, img_size) of image_type half
 * or float and logits (batch, num_classes) fp32, both 16-byte aligned; workspace 256-byte aligned.
 * An image on which anything but a finite number appeared gets NaN logits. Batch 0 is allowed and
 * does nothing. */
SWINQ_API swinq_status swinq_forward(const swinq_plan* plan, const void* images,
                                     swinq_type image_type, int batch, float* logits,
                                     void* workspace, size_t workspace_bytes, void* stream);

/* ---- each kernel alone ---- device pointers; see csrc/kernels for what the arguments mean; starts
 * when the work before it on the stream has ended ---- */

typedef struct {
    int32_t operand, stream, activation, output; /* enums of kernels/types.h, kernels/gemm.h */
    const void* a;
    const void* w; /* laid out by swinq_gemm_layout */
    void* out;
    const float *factor, *bias, *out_inverse, *out_scale;
    int32_t m, n, k;
    int32_t tile[3]; /* instruction, rows, columns; rows 0: the default */
} swinq_gemm_arguments;

/* Host memory: (n, k) of `type` into (n padded to 32, k), rows in the order the kernel wants. */
SWINQ_API swinq_status swinq_gemm_layout(swinq_type type, const void* weight, int n, int k,
                                         void* laid_out);
SWINQ_API swinq_status swinq_gemm(const swinq_gemm_arguments* arguments, void* stream);
/* Tiles that exist for these arguments, as triples; *count is the capacity in, the number out. */
SWINQ_API swinq_status swinq_gemm_tiles(const swinq_gemm_arguments* arguments, int32_t* tiles,
                                        int* count);

/* The GEMMs of a forward whose tile can be chosen, in order, with the plan's weights; a and out are
 * null. *count is the capacity in, the number out. */
SWINQ_API swinq_status swinq_plan_gemms(const swinq_plan* plan, int batch,
                                        swinq_gemm_arguments* gemms, int* count);

/* A tile that was found to be the fastest for a GEMM. */
typedef struct {
    int32_t operand, activation, output, m, n, k;
    int32_t tile[3]; /* as in swinq_gemm_arguments */
} swinq_tuned_gemm;

/* Adds to the device's tile cache, which plans made from then on read: a file for GPUs of this name
 * and this build of the library under $SWINQ_CACHE_DIR, $XDG_CACHE_HOME/swinq or ~/.cache/swinq. */
SWINQ_API swinq_status swinq_tile_cache_add(int device, const swinq_tuned_gemm* gemms,
                                            size_t count);
/* The name of that file, with its final 0 in at most `capacity` characters. */
SWINQ_API swinq_status swinq_tile_cache_path(int device, char* path, size_t capacity);

typedef struct {
    int32_t type, out_type;
    const void* qkv;
    void* out;
    const float *bias_table, *bias, *factor;
    float v_scale;
    const float* out_inverse;
    int32_t batch, resolution, window, shift, heads;
} swinq_attention_arguments;

/* Host memory: floats needed (0: the kernel reads the table itself), and the expanded table. */
SWINQ_API swinq_status swinq_attention_bias_size(int window, int heads, int64_t* floats);
SWINQ_API swinq_status swinq_attention_bias(const float* table, int window, int heads,
                                            float* expanded);
SWINQ_API swinq_status swinq_attention(const swinq_attention_arguments* arguments, void* stream);

typedef struct {
    int32_t stream, operand;
    const void* x;
    void* out;
    const float *gamma, *beta, *inverse;
    int32_t* status;
    float eps;
    int32_t batch, resolution, channels, merge;
} swinq_prenorm_arguments;
SWINQ_API swinq_status swinq_prenorm(const swinq_prenorm_arguments* arguments, void* stream);

typedef struct {
    int32_t y_type, stream;
    const void* y;
    const float* y_scale;
    void* x;
    int8_t* operand;
    const float *inverse, *gamma, *beta;
    float eps;
    int32_t rows, channels, residual;
} swinq_postnorm_arguments;
SWINQ_API swinq_status swinq_postnorm(const swinq_postnorm_arguments* arguments, void* stream);

typedef struct {
    int32_t stream;
    const void* x;
    void* pooled;
    const float *gamma, *beta;
    const int32_t* status;
    float eps;
    int32_t batch, tokens, channels;
} swinq_pool_arguments;
SWINQ_API swinq_status swinq_pool(const swinq_pool_arguments* arguments, void* stream);

typedef struct {
    int32_t image_type, stream;
    const void* images;
    const void* weight;
    const float *bias, *gamma, *beta;
    void* x;
    int8_t* operand;
    const float* inverse;
    int32_t* status;
    float eps;
    int32_t batch, in_chans, img_size, patch_size, channels;
} swinq_patch_embed_arguments;
SWINQ_API swinq_status swinq_patch_embed(const swinq_patch_embed_arguments* arguments,
                                         void* stream);

#ifdef __cplusplus
}
#endif

#endif

/* A stand-in for libswinq that tests build with a C compiler: the C ABI on host memory, and for a
 * model the sum of an image's pixels plus the class's number. An image with a NaN gets NaN. */
#define SWINQ_BUILD
#include "swinq.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_IMAGES 1000

struct swinq_plan {
    int pixels, classes;
    char prepared[MOST_IMAGES + 1];
};

static _Thread_local char error[512];
static int live_plans;

#define REFUSE(status, ...) return snprintf(error, sizeof error, __VA_ARGS__), (status)

#ifndef FAKE_ABI_VERSION
#define FAKE_ABI_VERSION SWINQ_ABI_VERSION
#endif

SWINQ_API int fake_live_plans(void) { return live_plans; }
SWINQ_API int swinq_abi_version(void) { return FAKE_ABI_VERSION; }
SWINQ_API const char* swinq_version(void) { return "fake"; }
SWINQ_API const char* swinq_last_error(void) { return error; }

SWINQ_API swinq_status swinq_check_device(int device) {
    if (device) REFUSE(SWINQ_UNSUPPORTED, "device %d has compute capability 6.1", device);
    return SWINQ_OK;
}

static const swinq_tensor* find(const swinq_model* model, const char* name) {
    for (size_t i = 0; i < model->tensor_count; ++i) {
        if (!strcmp(model->tensors[i].name, name)) return &model->tensors[i];
    }
    return NULL;
}

SWINQ_API swinq_status swinq_plan_create(const swinq_model* model, int device, swinq_plan** plan) {
    const swinq_architecture* a = &model->architecture;
    const swinq_tensor* head = find(model, "head.weight");
    (void)device;
    if (!head) REFUSE(SWINQ_INVALID_ARGUMENT, "head.weight is missing\n  fix: export again");
    if (head->rank != 2 || head->shape[0] != a->num_classes || head->type == SWINQ_INT8) {
        REFUSE(SWINQ_INVALID_ARGUMENT, "head.weight has %lld rows", (long long)head->shape[0]);
    }
    for (size_t i = 0; i < model->layer_count; ++i) {
        if (strncmp(model->layers[i].name, "layers.", 7) || model->layers[i].precision > 3) {
            REFUSE(SWINQ_INVALID_ARGUMENT, "layer %s", model->layers[i].name);
        }
    }
    *plan = calloc(1, sizeof **plan);
    (*plan)->pixels = a->in_chans * a->img_size * a->img_size;
    (*plan)->classes = a->num_classes;
    ++live_plans;
    return SWINQ_OK;
}

SWINQ_API void swinq_plan_destroy(swinq_plan* plan) {
    free(plan);
    --live_plans;
}

SWINQ_API swinq_status swinq_workspace_size(const swinq_plan* plan, int batch, size_t* bytes) {
    (void)plan;
    if (batch > MOST_IMAGES) REFUSE(SWINQ_OUT_OF_MEMORY, "a batch of %d images", batch);
    *bytes = 64 * (size_t)batch;
    return SWINQ_OK;
}

SWINQ_API swinq_status swinq_prepare(const swinq_plan* plan, int batch) {
    ((swinq_plan*)plan)->prepared[batch] = 1;
    return SWINQ_OK;
}

SWINQ_API swinq_status swinq_weight_bytes(const swinq_plan* plan, size_t* bytes) {
    *bytes = sizeof *plan;
    return SWINQ_OK;
}

SWINQ_API swinq_status swinq_launch_count(const swinq_plan* plan, int batch, int* launches) {
    (void)batch;
    *launches = plan->classes;
    return SWINQ_OK;
}

static float value(const void* images, swinq_type type, size_t i) {
    if (type == SWINQ_FLOAT) return ((const float*)images)[i];
    uint16_t half = ((const uint16_t*)images)[i];
    float magnitude = half & 0x7c00 ? ldexpf(1024 + (half & 0x3ff), ((half >> 10) & 31) - 25)
                                    : ldexpf(half & 0x3ff, -24);
    if ((half & 0x7c00) == 0x7c00) magnitude = NAN;
    return half & 0x8000 ? -magnitude : magnitude;
}

SWINQ_API swinq_status swinq_forward(const swinq_plan* plan, const void* images,
                                     swinq_type image_type, int batch, float* logits,
                                     void* workspace, size_t workspace_bytes, void* stream) {
    (void)stream;
    if ((uintptr_t)images % 16) REFUSE(SWINQ_INVALID_ARGUMENT, "images are not aligned");
    if (!plan->prepared[batch]) REFUSE(SWINQ_INVALID_ARGUMENT, "the batch is not prepared");
    if (workspace_bytes < 64 * (size_t)batch) REFUSE(SWINQ_INVALID_ARGUMENT, "workspace");
    memset(workspace, 0xff, 64 * (size_t)batch);
    for (int b = 0; b < batch; ++b) {
        float sum = 0;
        for (int i = 0; i < plan->pixels; ++i) {
            float x = value(images, image_type, (size_t)b * plan->pixels + i);
            sum += fabsf(x) <= 65504.f ? x : NAN;
        }
        if (sum > 1e6f) sum = NAN; /* stands for an overflow of the residual stream */
        for (int c = 0; c < plan->classes; ++c) logits[b * plan->classes + c] = sum + c;
    }
    return SWINQ_OK;
}

/* Rows in their own order, zero rows behind. */
SWINQ_API swinq_status swinq_gemm_layout(swinq_type type, const void* weight, int n, int k,
                                         void* laid_out) {
    if (type != SWINQ_INT8) REFUSE(SWINQ_UNSUPPORTED, "type %d", type);
    memset(laid_out, 0, (size_t)(n + 31) / 32 * 32 * k);
    memcpy(laid_out, weight, (size_t)n * k);
    return SWINQ_OK;
}

/* Without an activation, to codes or fp32. */
SWINQ_API swinq_status swinq_gemm(const swinq_gemm_arguments* g, void* stream) {
    (void)stream;
    if (g->operand != SWINQ_INT8 || g->stream != SWINQ_HALF || g->activation || g->tile[1]) {
        REFUSE(SWINQ_UNSUPPORTED, "operand %d, activation %d", g->operand, g->activation);
    }
    for (int row = 0; row < g->m; ++row) {
        for (int c = 0; c < g->n; ++c) {
            int sum = 0;
            for (int i = 0; i < g->k; ++i) {
                sum += ((const int8_t*)g->a)[row * g->k + i] * ((const int8_t*)g->w)[c * g->k + i];
            }
            float y = fmaf(sum, g->factor[c], g->bias[c]);
            int at = row * g->n + c;
            if (g->output == 2) {
                ((float*)g->out)[at] = y;
            } else if (g->output == 0) {
                ((int8_t*)g->out)[at] = fminf(127, fmaxf(-128, rintf(y * g->out_inverse[c])));
            } else {
                REFUSE(SWINQ_UNSUPPORTED, "output %d", g->output);
            }
        }
    }
    return SWINQ_OK;
}

/* A table of windows of 4 x 4 is expanded: as a copy. */
SWINQ_API swinq_status swinq_attention_bias_size(int window, int heads, int64_t* floats) {
    *floats = window == 4 ? 49 * heads : 0;
    return SWINQ_OK;
}

SWINQ_API swinq_status swinq_attention_bias(const float* table, int window, int heads,
                                            float* expanded) {
    if (window == 4) memcpy(expanded, table, sizeof(float) * 49 * (size_t)heads);
    return SWINQ_OK;
}

#define ABSENT(name, ...) \
    SWINQ_API swinq_status name(__VA_ARGS__) { REFUSE(SWINQ_UNSUPPORTED, #name " is absent"); }

ABSENT(swinq_gemm_tiles, const swinq_gemm_arguments* a, int32_t* tiles, int* count)
ABSENT(swinq_attention, const swinq_attention_arguments* a, void* stream)
ABSENT(swinq_prenorm, const swinq_prenorm_arguments* a, void* stream)
ABSENT(swinq_postnorm, const swinq_postnorm_arguments* a, void* stream)
ABSENT(swinq_pool, const swinq_pool_arguments* a, void* stream)
ABSENT(swinq_patch_embed, const swinq_patch_embed_arguments* a, void* stream)

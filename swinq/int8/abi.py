"""The C ABI of libswinq as ctypes: csrc/include/swinq.h, struct by struct, function by function."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p

import torch

VERSION = 3  # of the ABI
MAX_STAGES = 8  # that swinq_architecture holds
LARGEST_INT = 2**31 - 1  # what an int of C holds; ctypes cuts the rest off in silence

OK, INVALID_ARGUMENT, UNSUPPORTED, OUT_OF_MEMORY, CUDA_ERROR, INTERNAL_ERROR = range(6)

INT8, HALF, FLOAT = range(3)  # swinq_type
TYPES = {torch.int8: INT8, torch.float16: HALF, torch.float32: FLOAT}

# swinq_precision, by the words of docs/checkpoint-format.md
PRECISIONS = {"int8": 0, "int8-unrounded": 1, "fp16": 2, "fp32": 3}

ACTIVATIONS = {"none": 0, "gelu": 1, "normalize": 2}  # Activation of csrc/kernels/gemm.h
CODES, HALVES, FLOATS, RESIDUAL, STREAM = range(5)  # Output of csrc/kernels/gemm.h


class TensorStruct(ctypes.Structure):
    """swinq_tensor."""

    _fields_ = [
        ("name", c_char_p),
        ("type", c_int),
        ("rank", c_int32),
        ("shape", c_int64 * 4),
        ("data", c_void_p),
    ]


class LayerStruct(ctypes.Structure):
    """swinq_layer."""

    _fields_ = [("name", c_char_p), ("precision", c_int)]


class ArchitectureStruct(ctypes.Structure):
    """swinq_architecture."""

    _fields_ = [
        ("version", c_int32),
        ("img_size", c_int32),
        ("patch_size", c_int32),
        ("in_chans", c_int32),
        ("num_classes", c_int32),
        ("embed_dim", c_int32),
        ("stages", c_int32),
        ("depths", c_int32 * MAX_STAGES),
        ("num_heads", c_int32 * MAX_STAGES),
        ("window_size", c_int32),
        ("mlp_ratio", c_double),
        ("norm_eps", c_float),
    ]


class ModelStruct(ctypes.Structure):
    """swinq_model."""

    _fields_ = [
        ("architecture", ArchitectureStruct),
        ("tensors", POINTER(TensorStruct)),
        ("tensor_count", c_size_t),
        ("layers", POINTER(LayerStruct)),
        ("layer_count", c_size_t),
    ]


class GemmArguments(ctypes.Structure):
    """swinq_gemm_arguments."""

    _fields_ = [
        ("operand", c_int32),
        ("stream", c_int32),
        ("activation", c_int32),
        ("output", c_int32),
        ("a", c_void_p),
        ("w", c_void_p),
        ("out", c_void_p),
        ("factor", c_void_p),
        ("bias", c_void_p),
        ("out_inverse", c_void_p),
        ("out_scale", c_void_p),
        ("m", c_int32),
        ("n", c_int32),
        ("k", c_int32),
        ("tile", c_int32 * 3),
    ]


class AttentionArguments(ctypes.Structure):
    """swinq_attention_arguments."""

    _fields_ = [
        ("type", c_int32),
        ("out_type", c_int32),
        ("qkv", c_void_p),
        ("out", c_void_p),
        ("bias_table", c_void_p),
        ("bias", c_void_p),
        ("factor", c_void_p),
        ("v_scale", c_float),
        ("out_inverse", c_void_p),
        ("batch", c_int32),
        ("resolution", c_int32),
        ("window", c_int32),
        ("shift", c_int32),
        ("heads", c_int32),
    ]


class PrenormArguments(ctypes.Structure):
    """swinq_prenorm_arguments."""

    _fields_ = [
        ("stream", c_int32),
        ("operand", c_int32),
        ("x", c_void_p),
        ("out", c_void_p),
        ("gamma", c_void_p),
        ("beta", c_void_p),
        ("inverse", c_void_p),
        ("status", c_void_p),
        ("eps", c_float),
        ("batch", c_int32),
        ("resolution", c_int32),
        ("channels", c_int32),
        ("merge", c_int32),
    ]


class PostnormArguments(ctypes.Structure):
    """swinq_postnorm_arguments."""

    _fields_ = [
        ("y_type", c_int32),
        ("stream", c_int32),
        ("y", c_void_p),
        ("y_scale", c_void_p),
        ("x", c_void_p),
        ("operand", c_void_p),
        ("inverse", c_void_p),
        ("gamma", c_void_p),
        ("beta", c_void_p),
        ("eps", c_float),
        ("rows", c_int32),
        ("channels", c_int32),
        ("residual", c_int32),
    ]


class PoolArguments(ctypes.Structure):
    """swinq_pool_arguments."""

    _fields_ = [
        ("stream", c_int32),
        ("x", c_void_p),
        ("pooled", c_void_p),
        ("gamma", c_void_p),
        ("beta", c_void_p),
        ("status", c_void_p),
        ("eps", c_float),
        ("batch", c_int32),
        ("tokens", c_int32),
        ("channels", c_int32),
    ]


class PatchEmbedArguments(ctypes.Structure):
    """swinq_patch_embed_arguments."""

    _fields_ = [
        ("image_type", c_int32),
        ("stream", c_int32),
        ("images", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("gamma", c_void_p),
        ("beta", c_void_p),
        ("x", c_void_p),
        ("operand", c_void_p),
        ("inverse", c_void_p),
        ("status", c_void_p),
        ("eps", c_float),
        ("batch", c_int32),
        ("in_chans", c_int32),
        ("img_size", c_int32),
        ("patch_size", c_int32),
        ("channels", c_int32),
    ]


STRUCTS = {
    "swinq_tensor": TensorStruct,
    "swinq_layer": LayerStruct,
    "swinq_architecture": ArchitectureStruct,
    "swinq_model": ModelStruct,
    "swinq_gemm_arguments": GemmArguments,
    "swinq_attention_arguments": AttentionArguments,
    "swinq_prenorm_arguments": PrenormArguments,
    "swinq_postnorm_arguments": PostnormArguments,
    "swinq_pool_arguments": PoolArguments,
    "swinq_patch_embed_arguments": PatchEmbedArguments,
}

# Functions that return a status: name -> argument types.
CALLS: dict[str, list[type]] = {
    "swinq_check_device": [c_int],
    "swinq_plan_create": [POINTER(ModelStruct), c_int, POINTER(c_void_p)],
    "swinq_workspace_size": [c_void_p, c_int, POINTER(c_size_t)],
    "swinq_prepare": [c_void_p, c_int],
    "swinq_weight_bytes": [c_void_p, POINTER(c_size_t)],
    "swinq_launch_count": [c_void_p, c_int, POINTER(c_int)],
    "swinq_forward": [
        c_void_p,  # plan
        c_void_p,  # images
        c_int,
        c_int,
        c_void_p,  # logits
        c_void_p,  # workspace
        c_size_t,
        c_void_p,  # stream
    ],
    "swinq_gemm_layout": [c_int, c_void_p, c_int, c_int, c_void_p],
    "swinq_gemm": [POINTER(GemmArguments), c_void_p],
    "swinq_gemm_tiles": [POINTER(GemmArguments), POINTER(c_int32), POINTER(c_int)],
    "swinq_attention_bias_size": [c_int, c_int, POINTER(c_int64)],
    "swinq_attention_bias": [c_void_p, c_int, c_int, c_void_p],
    "swinq_attention": [POINTER(AttentionArguments), c_void_p],
    "swinq_prenorm": [POINTER(PrenormArguments), c_void_p],
    "swinq_postnorm": [POINTER(PostnormArguments), c_void_p],
    "swinq_pool": [POINTER(PoolArguments), c_void_p],
    "swinq_patch_embed": [POINTER(PatchEmbedArguments), c_void_p],
}

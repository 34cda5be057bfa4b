"""The INT8 operators on a CPU: the equations of reference.py; see ops.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from swinq.int8 import op_checks as checks
from swinq.int8 import reference
from swinq.int8.matmul import IntegerMatrix
from swinq.int8.windows import Windows


def pack_gemm_weight(weight: Tensor) -> Tensor:
    """Weight codes (n, k) int8 as `gemm_int8` reads them: (n padded to 32, k) int8."""
    checks.require("weight", weight, torch.int8, (None, None))
    return F.pad(weight, (0, 0, 0, checks.padded(len(weight)) - len(weight))).clone()


def gemm_int8(
    a: Tensor,
    weight: Tensor,
    factor: Tensor,
    bias: Tensor,
    out_inverse: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """y = activation(fma(a w^T, factor, bias)), then codes if `out_inverse` is given.

    Args:
        a: codes (m, k) int8, k a multiple of 16.
        weight: from `pack_gemm_weight`.
        factor, bias: (n,) fp32, n a multiple of 8.
        out_inverse: (n,) fp32, one over the scale of y.
        activation: none, gelu or normalize (each head's 32 channels of the first two thirds of y,
            by their norm); the latter two with `out_inverse` only.

    Returns:
        (m, n) int8, or fp32 without `out_inverse`.
    """
    checks.require_gemm(a, weight, factor, bias)
    checks.require_activation(activation, out_inverse, len(bias))
    checks.require_vectors(len(bias), a.device, out_inverse=out_inverse)
    y = _product(a, weight, factor, bias)
    if activation == "gelu":
        y = reference.gelu(y)
    elif activation == "normalize":
        heads = y.view(len(y), 3, -1, checks.HEAD_DIM)
        heads[:, :2] = reference.normalise(heads[:, :2])
    return y if out_inverse is None else reference.quantize(y, out_inverse).to(torch.int8)


def gemm_int8_residual(
    a: Tensor,
    weight: Tensor,
    factor: Tensor,
    bias: Tensor,
    stream: Tensor,
    out_inverse: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> None:
    """stream := fp16(stream + y), y as of `gemm_int8`, rounded to int8 on the way if asked.

    Args:
        stream: (m, n) fp16, written.
        out_inverse, out_scale: (n,) fp32, both or neither: the rounding of y.
    """
    checks.require_gemm(a, weight, factor, bias)
    checks.require("stream", stream, torch.float16, (len(a), len(bias)), a.device)
    checks.require_vectors(len(bias), a.device, out_inverse=out_inverse, out_scale=out_scale)
    checks.require_both(out_inverse=out_inverse, out_scale=out_scale)
    y = _product(a, weight, factor, bias)
    if out_inverse is not None and out_scale is not None:
        y = reference.dequantize(reference.quantize(y, out_inverse), out_scale)
    stream.copy_(stream.float() + y)


def pack_attention_bias(table: Tensor, window: int) -> Tensor:
    """A relative position bias table ((2W-1)^2, heads) fp32 as `window_attention_int8` reads it."""
    checks.require_table(table, window)
    return table.t().contiguous().view(-1).clone()


def window_attention_int8(
    qkv: Tensor,
    bias: Tensor,
    factor: Tensor,
    v_scale: float,
    resolution: int,
    window: int,
    shift: int,
    out_inverse: Tensor | None = None,
) -> Tensor:
    """Attention within (shifted) windows on codes; tokens stay in the order of the image.

    Args:
        qkv: codes (B * resolution^2, 3, heads, 32) int8.
        bias: from `pack_attention_bias`.
        factor: (heads,) fp32, q_scale * k_scale * softmax_scale.
        v_scale: what a unit of v's codes is worth.
        resolution, window, shift: tokens along one side; shift 0 for unshifted windows.
        out_inverse: (heads * 32,) fp32, one over the scale of what reads the output.

    Returns:
        (B * resolution^2, heads, 32) int8, or fp16 without `out_inverse`.
    """
    checks.require_attention(qkv, bias, factor, resolution, window, shift)
    checks.require_vectors(len(factor) * checks.HEAD_DIM, qkv.device, out_inverse=out_inverse)
    heads = len(factor)
    checks.require_vectors(heads * (2 * window - 1) ** 2, qkv.device, bias=bias)
    windows = Windows(resolution, window, shift, bias.view(heads, -1).t())
    images = qkv.float().view(-1, resolution**2, 3 * heads * checks.HEAD_DIM)
    q, k, v = reference.split_heads(windows.gather(images), heads)
    o = reference.integer_attention(
        q,
        k,
        v,
        factor.view(-1, 1, 1),
        windows.bias(0, len(q)),
        torch.tensor(v_scale, dtype=torch.float32),
    )
    o = windows.scatter(reference.join_heads(o)).view(len(qkv), heads, checks.HEAD_DIM)
    if out_inverse is None:
        return o.half()
    return reference.quantize(o, out_inverse.view(heads, checks.HEAD_DIM)).to(torch.int8)


def layernorm_quantize(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    inverse: Tensor,
    eps: float,
    resolution: int,
    merge: bool = False,
) -> Tensor:
    """Codes of LayerNorm(x), of four neighbours at once if `merge`; of x itself without gamma.

    Args:
        x: (B, resolution^2, C) fp16.
        gamma, beta: (C,) or, with merge, (4C,) fp32; both or neither.
        inverse: the same shape, one over the scale of the layer that reads the codes.

    Returns:
        (B, resolution^2, C) or, with merge, (B, resolution^2 / 4, 4C) int8.
    """
    checks.require_norm(x, gamma, beta, inverse, resolution, merge)
    if merge:
        x = reference.merge_neighbours(x, resolution)
    y = x.float()
    if gamma is not None and beta is not None:
        y = reference.layernorm(y, gamma, beta, eps)
    return reference.quantize(y, inverse).to(torch.int8)


def add_layernorm_quantize(
    y: Tensor,
    y_scale: Tensor | None,
    stream: Tensor,
    gamma: Tensor,
    beta: Tensor,
    inverse: Tensor,
    eps: float,
) -> Tensor:
    """stream := fp16(stream + LayerNorm(y)), and its codes for the layer that reads it next.

    Args:
        y: (rows, C) fp32, or int8 codes with their y_scale (C,).
        stream: (rows, C) fp16, written.
        gamma, beta, inverse: (C,) fp32.

    Returns:
        (rows, C) int8.
    """
    checks.require_add_norm(y, y_scale, stream, gamma, beta, inverse)
    values = y if y_scale is None else reference.dequantize(y.float(), y_scale)
    stream.copy_(stream.float() + reference.layernorm(values, gamma, beta, eps))
    return reference.quantize(stream.float(), inverse).to(torch.int8)


def _product(a: Tensor, weight: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
    """fma(a w^T, factor, bias), (m, n) fp32."""
    acc = IntegerMatrix(weight[: len(bias)]).product(a)
    return reference.gemm_epilogue(acc, factor, bias)

"""The arithmetic of the integer model, one small function an equation: THE specification.

docs/numerics.md says the same in words and says where each step rounds; the CUDA kernels are
judged against this file. Unless a comment says otherwise a tensor is fp32, and every named
operation rounds once, to nearest, ties to even. Codes travel as fp32 where floats multiply them and
as int8 where integers do; both hold the same integers.

Each function works on whatever rows it is given, and a row's result never depends on the others:
callers cut batches as they like. Sums of floats (fp16 GEMMs, patch embedding, mean and head) are
the exception: their order may follow the shape, so callers give these one fixed piece of an image
at a time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from swinq.int8.matmul import SLICE_S8, SLICE_U8, float_product

PROBABILITY_LEVELS = 255.0  # of a u8 code: the row's largest probability
SMALLEST_NORM = 1e-12  # of a v2 query or key, before it divides them
_SURELY_ZERO = -80.0  # of s - m: exp() of it is no u8 and no fp16 number


def half(x: Tensor) -> Tensor:
    """x rounded to fp16, as fp32."""
    return x.half().float()


def inverse_of(scale: Tensor) -> Tensor:
    """fp32(1 / scale); 0 where the scale is 0, so that everything gets code 0."""
    return torch.where(scale == 0, torch.zeros_like(scale), 1.0 / scale)


def quantize(x: Tensor, inverse: Tensor) -> Tensor:
    """Codes clamp(rint(x * inverse), -128, 127), as fp32. One multiply, round half to even."""
    return torch.mul(x, inverse).round_().clamp_(-128, 127)


def gemm_factor(input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """What one unit of an accumulator is worth, (out,).

    Args:
        input_scale: (), or (in,): then its values are already in the weight's columns.
        weight_scale: (out,).
    """
    return weight_scale if input_scale.ndim else input_scale * weight_scale


def gemm_epilogue(acc: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
    """fma(fp32(acc), factor, bias).

    The product of two fp32 is exact in double, so one double addition and one rounding to fp32
    stand for the fused multiply-add.

    Args:
        acc: (rows, out) int32.
        factor, bias: (out,) fp32, or already converted to double.
    """
    exact = acc.float().double()  # beyond 2**24 the accumulator itself is rounded to fp32
    return torch.addcmul(bias.double(), exact, factor.double()).float()


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """codes * scale, the value that a rounded output passes on."""
    return codes * scale


def half_gemm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The GEMM of an fp16 layer: x (rows, in) and weight (in, out) hold fp16 values, sums fp32."""
    return torch.mm(x, weight).add_(bias)


def layernorm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """(x - mean) * rsqrt(var + eps) * gamma + beta over the last axis, population variance."""
    return F.layer_norm(x, (x.shape[-1],), gamma, beta, eps)


def gelu(y: Tensor) -> Tensor:
    """0.5 y (1 + erf(y / sqrt 2)), of fp32.

    Not `F.gelu`: that uses another erf for the last few elements of a tensor than for the others,
    so that a value's bits depend on where it lies.
    """
    cdf = torch.mul(y, math.sqrt(0.5)).erf_().add_(1.0)
    return torch.mul(y, 0.5).mul_(cdf)


def normalise(x: Tensor) -> Tensor:
    """v2's queries and keys: x / max(||x||, 1e-12) over the last axis, one head's channels."""
    return F.normalize(x, dim=-1, eps=SMALLEST_NORM)


def attention_factor(q_scale: Tensor, k_scale: Tensor, softmax_scale: Tensor) -> Tensor:
    """What one unit of q.k is worth before the bias, (heads,): two products, rounded each."""
    return (q_scale * k_scale) * softmax_scale


def integer_attention(
    q: Tensor, k: Tensor, v: Tensor, factor: Tensor, bias: Tensor, v_scale: Tensor
) -> Tensor:
    """Attention on codes.

        s = fp32(q k^T) * factor + bias         m = row maximum of s
        p = rint(255 exp(s - m)) u8             o = fp32(p v) * fp32(v_scale / fp32(sum of p))

    Args:
        q, k, v: codes (W, heads, N, d) as fp32.
        factor: (heads, 1, 1), from `attention_factor`.
        bias: (W or 1, heads, N, N), the shift mask added to it already.
        v_scale: ().

    Returns:
        o (W, heads, N, d).
    """
    return weighted_values(probabilities(q, k, factor, bias), v, v_scale)


def probabilities(q: Tensor, k: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
    """The u8 codes p of `integer_attention`, (W, heads, N, N), as fp32."""
    s = float_product(q, k.transpose(-2, -1), SLICE_S8)
    s.mul_(factor).add_(bias)
    return _below_maximum(s).exp_().mul_(PROBABILITY_LEVELS).round_()


def _below_maximum(s: Tensor) -> Tensor:
    """s - m in place, m the row's maximum; at least -80, where every probability is 0 anyway.

    A masked entry's exp(-100) would be subnormal, which takes a CPU 200 times as long.
    """
    return s.sub_(s.amax(-1, keepdim=True)).clamp_(min=_SURELY_ZERO)


def weighted_values(p: Tensor, v: Tensor, v_scale: Tensor) -> Tensor:
    """o of `integer_attention` from the codes p and v."""
    total = p.sum(-1, keepdim=True)  # an integer below 2**24: exact in any order
    return float_product(p, v, SLICE_U8).mul_(v_scale / total)


def half_attention(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Attention of an fp16 layer: fp16 operands, fp32 sums.

        s = (q k^T) * scale + bias      p = fp16(exp(s - m))      o = (p v) / sum of p

    Args:
        q, k, v: (W, heads, N, d), holding fp16 values.
        scale: (heads, 1, 1).
        bias: (W or 1, heads, N, N).

    Returns:
        o (W, heads, N, d).
    """
    s = torch.matmul(q, k.transpose(-2, -1)).mul_(scale).add_(bias)
    p = half(_below_maximum(s).exp_())
    return torch.matmul(p, v).div_(p.sum(-1, keepdim=True))


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(W, N, 3C) -> q, k, v, each (W, heads, N, d), contiguous."""
    windows, tokens, width = qkv.shape
    parts = qkv.view(windows, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    q, k, v = parts.contiguous().unbind(0)
    return q, k, v


def join_heads(x: Tensor) -> Tensor:
    """(W, heads, N, d) -> (W, N, heads * d)."""
    return x.transpose(1, 2).flatten(2)


def patches(image: Tensor, size: int) -> Tensor:
    """Cut an image (channels, S, S) into rows for a GEMM: (tokens, channels * size * size)."""
    channels, side, _ = image.shape
    count = side // size
    x = image.view(channels, count, size, count, size).permute(1, 3, 0, 2, 4)
    return x.reshape(count * count, channels * size * size)


def merge_neighbours(x: Tensor, resolution: int) -> Tensor:
    """Stack each 2x2 square: (B, H*W, C) -> (B, H*W/4, 4C), the left column's two first."""
    b, _, c = x.shape
    x = x.view(b, resolution // 2, 2, resolution // 2, 2, c)  # (B, H/2, dy, W/2, dx, C)
    return x.permute(0, 1, 3, 4, 2, 5).reshape(b, -1, 4 * c)  # channels ordered dx, dy, C


def head(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One image's logits: normalised tokens (N, C), weight (C, classes) of fp16 values."""
    mean = half(tokens.mean(0, keepdim=True))  # (1, C)
    return half_gemm(mean, weight, bias)[0]

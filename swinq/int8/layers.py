"""The parts of a block, each in the precision that the file gives it, ready to run.

A linear layer takes fp32 and brings it into its own form (codes, or fp16): the consumer of a tensor
decides how it is rounded. Preparations (reciprocals, factors, transposes) happen once, here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from swinq.errors import SwinqError
from swinq.export.format import FP16
from swinq.int8 import reference
from swinq.int8.matmul import IntegerMatrix

# Shown every int8 tensor: name, codes. Tests and op-by-op comparisons listen.
Tap = Callable[[str, Tensor], None]

OVERFLOW_FIX = (
    "look at the images; if they are ordinary, calibrate on more of them and export again, which "
    "checks the largest residual"
)


class Norm:
    """LayerNorm in fp32."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str, eps: float) -> None:
        self._gamma, self._beta = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C) fp32."""
        return reference.layernorm(x, self._gamma, self._beta, self._eps)


class IntegerLinear:
    """int8 codes in, exact int32 sums, fp32 out; rounded to int8 on the way if the file says so."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        input_scale = tensors[f"{name}.input_scale"]
        factor = reference.gemm_factor(input_scale, tensors[f"{name}.weight_scale"])
        self.name = name
        self._inverse = reference.inverse_of(input_scale)
        self._weight = IntegerMatrix(tensors[f"{name}.weight"])
        self._factor = factor.double()  # exact; the epilogue's sums are double
        self._bias = tensors[f"{name}.bias"].double()
        self._output_scale = tensors.get(f"{name}.output_scale")
        if self._output_scale is not None:
            self._output_inverse = reference.inverse_of(self._output_scale)

    def __call__(self, x: Tensor, unit: int, tap: Tap | None = None) -> Tensor:
        """x (..., in) fp32 -> (..., out) fp32. Integer sums need no unit."""
        codes = reference.quantize(x, self._inverse).to(torch.int8)
        acc = self._weight.product(codes.view(-1, codes.shape[-1]))
        y = reference.gemm_epilogue(acc, self._factor, self._bias)
        y = y.view(*x.shape[:-1], y.shape[-1])
        if tap is not None:
            tap(f"{self.name}.input", codes)
        if self._output_scale is None:
            return y
        rounded = reference.quantize(y, self._output_inverse)
        if tap is not None:
            tap(f"{self.name}.output", rounded.to(torch.int8))
        return reference.dequantize(rounded, self._output_scale)


class HalfLinear:
    """fp16 operands, fp32 sums, fp32 out: a layer that the file leaves out of quantization."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        self.name = name
        self._weight = tensors[f"{name}.weight"].float().t().contiguous()  # (in, out)
        self._bias = tensors[f"{name}.bias"]

    def __call__(self, x: Tensor, unit: int, tap: Tap | None = None) -> Tensor:
        """x (..., in) fp32 -> (..., out) fp32, `unit` rows at a time so that sums keep an order."""
        rows = reference.half(x).view(-1, x.shape[-1])
        parts = [reference.half_gemm(part, self._weight, self._bias) for part in rows.split(unit)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y.view(*x.shape[:-1], y.shape[-1])


class IntegerAttention:
    """q, k, v as int8 codes, probabilities as u8 codes, int32 sums."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str, width: int) -> None:
        q, k, v = (tensors[f"{name}.{part}_scale"] for part in "qkv")
        self.name, self._heads = name, len(q)
        head_dim = width // self._heads
        scales = torch.cat([q.repeat_interleave(head_dim), k.repeat_interleave(head_dim)])
        self._inverse = reference.inverse_of(torch.cat([scales, v.expand(width)]))  # (3C,)
        factor = reference.attention_factor(q, k, tensors[f"{name}.softmax_scale"])
        self._factor = factor.view(-1, 1, 1)
        self._v_scale = v

    def __call__(self, qkv: Tensor, bias: Tensor, unit: int, tap: Tap | None = None) -> Tensor:
        """qkv (W, N, 3C) fp32, bias (W or 1, heads, N, N) -> (W, N, C) fp32."""
        codes = reference.quantize(qkv, self._inverse)
        q, k, v = reference.split_heads(codes, self._heads)
        if tap is None:
            o = reference.integer_attention(q, k, v, self._factor, bias, self._v_scale)
            return reference.join_heads(o)
        p = reference.probabilities(q, k, self._factor, bias)
        for part, tensor in (("q", q), ("k", k), ("v", v)):
            tap(f"{self.name}.{part}", tensor.to(torch.int8))
        tap(f"{self.name}.probabilities", p.to(torch.uint8))
        return reference.join_heads(reference.weighted_values(p, v, self._v_scale))


class HalfAttention:
    """q, k, v and probabilities in fp16, fp32 sums."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        self.name = name
        self._scale = tensors[f"{name}.softmax_scale"].view(-1, 1, 1)

    def __call__(self, qkv: Tensor, bias: Tensor, unit: int, tap: Tap | None = None) -> Tensor:
        """qkv (W, N, 3C) fp32 -> (W, N, C) fp32, `unit` windows at a time.

        Raises:
            SwinqError: q, k or v left the range of fp16. proj's codes would hide it.
        """
        rounded = reference.half(qkv)
        if not bool(rounded.isfinite().all()):
            raise SwinqError(f"q, k or v of {self.name} overflowed on these images", OVERFLOW_FIX)
        q, k, v = reference.split_heads(rounded, len(self._scale))
        outputs = []
        for start in range(0, len(q), unit):
            part = slice(start, start + unit)
            own = bias if len(bias) == 1 else bias[part]
            outputs.append(reference.half_attention(q[part], k[part], v[part], self._scale, own))
        return reference.join_heads(torch.cat(outputs))


def linear(
    tensors: Mapping[str, Tensor], precision: Mapping[str, str], name: str
) -> IntegerLinear | HalfLinear:
    """The linear layer of that name in its precision."""
    return HalfLinear(tensors, name) if precision[name] == FP16 else IntegerLinear(tensors, name)


def attention(
    tensors: Mapping[str, Tensor], precision: Mapping[str, str], name: str, width: int
) -> IntegerAttention | HalfAttention:
    """The attention arithmetic of that name in its precision; width is C."""
    if precision[name] == FP16:
        return HalfAttention(tensors, name)
    return IntegerAttention(tensors, name, width)

"""The only rounding code in Python: symmetric INT8 scales and codes.

    scale = fp32(amax / 127)      inverse = fp32(1 / scale)
    code  = clamp(rint(x * inverse), -128, 127)          one fp32 multiply, round half to even

Weights use codes in [-127, 127]. The CPU reference and the CUDA kernels use the same two numbers,
so a file that holds scales alone says everything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

QMAX = 127
ACTIVATION_RANGE = (-128, 127)
WEIGHT_RANGE = (-127, 127)

# Below this amax the scale would be subnormal and its inverse could overflow to infinity.
SMALLEST_AMAX = 2.0**-119

# How a learned range keeps rounding errors in int8: in 252nds of a step, or as one of the ends.
ERROR_STEPS = 252
BEYOND_LOW, BEYOND_HIGH = -128, 127


def scale_and_inverse(amax: Tensor) -> tuple[Tensor, Tensor]:
    """Return the fp32 scale and its fp32 inverse, both of amax's shape.

    Where amax is below ``SMALLEST_AMAX`` (a dead tensor or channel) both are 0, so its codes are 0.
    NaN (uncalibrated) stays NaN.
    """
    amax = amax.float()
    scale = amax / torch.full_like(amax, QMAX)  # CUDA multiplies by 1/127 if given the number
    inverse = 1.0 / scale
    dead = amax < SMALLEST_AMAX
    zero = torch.zeros_like(scale)
    return torch.where(dead, zero, scale), torch.where(dead, zero, inverse)


class _RoundStraightThrough(torch.autograd.Function):
    """Round half to even; the gradient passes unchanged (straight-through estimator)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return grad[0]


def round_half_even(x: Tensor) -> Tensor:
    """Round to integers, half to even, with a straight-through gradient."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _RoundStraightThrough.apply(x)
    return x.round()


def quantize(
    x: Tensor, inverse: Tensor, low: int = -128, high: int = 127, log_amax: Tensor | None = None
) -> Tensor:
    """Return integer codes, as an fp32 tensor of x's shape.

    Codes stay in fp32 because products of codes summed in fp32 are exact integers below 2**24.
    The gradient of x is ``inverse`` inside the range and 0 outside it.

    Args:
        x: any float type; the multiply is fp32 whatever it is, so that halves round once.
        inverse: fp32, broadcasts against x; no gradient goes to it.
        log_amax: of inverse's shape, takes the gradient of a learned range as in LSQ (Esser et al.
            2020), for the logarithm as in TQT (Jain et al. 2019). It is that of codes * scale, so
            what the codes meet next must be linear and treat the scale as a constant.
    """
    if torch.is_grad_enabled():
        if log_amax is not None and log_amax.requires_grad:
            return _QuantizeInLearnedRange.apply(x, inverse, log_amax, low, high)
        if x.requires_grad:
            return _QuantizeStraightThrough.apply(x, inverse, low, high)
    return _round_and_clamp(x.float() * inverse, low, high)


def _round_and_clamp(scaled: Tensor, low: int, high: int) -> Tensor:
    return scaled.clamp(low, high).round()


class _QuantizeStraightThrough(torch.autograd.Function):
    """Codes of x; keeps one byte an element for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor, low: int, high: int) -> Tensor:
        scaled = x.float() * inverse
        ctx.save_for_backward((scaled >= low) & (scaled <= high), inverse)
        ctx.dtype = x.dtype
        return _round_and_clamp(scaled, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        inside, inverse = ctx.saved_tensors
        grad_x = torch.where(inside, grads[0] * inverse, 0.0)
        return grad_x.to(ctx.dtype), None, None, None


class _QuantizeInLearnedRange(torch.autograd.Function):
    """Codes of x, and LSQ's gradient for log amax: code - x/s inside, the code outside.

    It, too, keeps one byte an element: code - x/s, at most a half, in steps of 1/252 (which costs
    the gradient of a whole range nothing that counts), or which end of the range x is beyond.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, inverse: Tensor, log_amax: Tensor, low: int, high: int
    ) -> Tensor:
        scaled = x.float() * inverse
        codes = _round_and_clamp(scaled, low, high)
        error = ((codes - scaled) * ERROR_STEPS).round()
        error = torch.where(
            scaled > high, BEYOND_HIGH, torch.where(scaled < low, BEYOND_LOW, error)
        )
        ctx.save_for_backward(error.to(torch.int8), inverse)
        ctx.low, ctx.high, ctx.dtype, ctx.range_shape = low, high, x.dtype, log_amax.shape
        return codes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
        kept, inverse = ctx.saved_tensors
        above, below = kept == BEYOND_HIGH, kept == BEYOND_LOW
        error = kept.float() / ERROR_STEPS
        error = torch.where(above, ctx.high, torch.where(below, ctx.low, error))
        grad_x = torch.where(above | below, 0.0, grads[0] * inverse)
        grad_range = (grads[0] * error).sum_to_size(ctx.range_shape)
        return grad_x.to(ctx.dtype), None, grad_range, None, None


def at_most(x: Tensor, limit: float) -> Tensor:
    """Clamp x to a limit; beyond it only gradients that lead back pass, so nothing gets stuck."""
    return _AtMost.apply(x, limit)


class _AtMost(torch.autograd.Function):
    """A clamp from above whose far side can be left by gradient descent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x < limit)
        return x.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return torch.where(inside | (grads[0] > 0), grads[0], 0.0), None

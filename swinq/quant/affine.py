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


def quantize(x: Tensor, inverse: Tensor, low: int = -128, high: int = 127) -> Tensor:
    """Return integer codes, as an fp32 tensor of x's shape.

    Codes stay in fp32 because products of codes summed in fp32 are exact integers below 2**24.
    The gradient is ``inverse`` inside the range and 0 outside it.

    Args:
        x: any float type; the multiply is fp32 whatever it is, so that halves round once.
        inverse: fp32, broadcasts against x.
    """
    return round_half_even((x.float() * inverse).clamp(low, high))

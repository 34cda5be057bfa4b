"""QuantLinear: a Linear that computes on INT8 codes, fake-quantized.

Codes stay floats: integers summed in fp32 are exact below 2**24, so with the ranges that occur
the accumulator is the very integer that the INT8 kernels compute. One multiply then scales it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinq.quant.affine import WEIGHT_RANGE
from swinq.quant.quantizer import QuantDescriptor, TensorQuantizer
from swinq.quant.spec import UNROUNDED_IN_MODE_2, QuantSpec

# On one operand's codes under autocast: exact in bf16 and fp16, and the sum of as many products as
# a Swin has (8192 at most) stays within fp16's range.
AMP_SHIFT = 2.0**-11


def product_type(device: torch.device) -> torch.dtype:
    """The type in which matrix products run: fp32, or that of autocast."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32


def multiply_codes(a: Tensor, b: Tensor, factor: Tensor) -> Tensor:
    """Return (a @ b) * factor in fp32, where a and b hold integer codes of at most 256.

    Under autocast the product runs in its type, in which the codes are exact; the sums, exact in
    fp32, are rounded once to that type.

    Args:
        factor: fp32, broadcasts against the product.
    """
    if product_type(a.device) != torch.float32:
        return (a @ (b * AMP_SHIFT)).float() * (factor / AMP_SHIFT)
    return (a @ b) * factor


class _TrainedLinear(torch.autograd.Function):
    """multiply_codes(codes, weight_codes.T, factor) + bias, with the backward of an AMP linear.

    The output's gradient is rounded to the product's type once, for input, weight and bias alike;
    left to autograd it would be kept in fp32, and once more times the factor.
    """

    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, weight_codes: Tensor, factor: Tensor, bias: Tensor | None
    ) -> Tensor:
        dtype = product_type(codes.device)
        a, w = (codes * AMP_SHIFT).to(dtype), weight_codes.to(dtype)
        ctx.save_for_backward(a, w, factor)
        y = (a @ w.T).float() * (factor / AMP_SHIFT)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
        a, w, factor = ctx.saved_tensors
        per_row = factor.unsqueeze(-1)
        grad = grads[0].to(a.dtype)
        rows = grad.flatten(0, -2)  # (tokens, out)
        grad_codes = grad @ (w.float() * per_row).to(a.dtype)
        grad_weight = (rows.T @ a.flatten(0, -2)).float() * (per_row / AMP_SHIFT)
        grad_bias = rows.sum(0, dtype=torch.float32) if ctx.needs_input_grad[3] else None
        return grad_codes.float(), grad_weight, None, grad_bias


class _HalfStraightThrough(torch.autograd.Function):
    """Rounds to fp16; the gradient passes unchanged, as most of it would be 0 in fp16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return x.half().float()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return grad[0].to(ctx.dtype)


def round_to_half(x: Tensor) -> Tensor:
    """Round to fp16 and back, as a tensor that the engine keeps in half precision."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _HalfStraightThrough.apply(x)
    return x.half().float()


class QuantLinear(nn.Module):
    """A Linear with input, weight and output quantizers.

    Attributes:
        weight: (out, in) fp32; bias: (out,) fp32 or None.
        bias_correction: (out,) fp32, added to the bias when the layer is quantized.
        precision: "int8" or "fp16". The output is rounded if ``output_quantizer.enabled``.
        active: False computes in float (calibration, sensitivity), observers still see tensors.
    """

    bias_correction: Tensor

    def __init__(self, linear: nn.Linear, kind: str, spec: QuantSpec, precision: str) -> None:
        """Take over a float Linear's parameters; ``kind`` is its role, such as "fc2"."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("bias_correction", torch.zeros(linear.out_features))
        self.kind = kind
        self.precision = "fp16" if precision == "fp16" else "int8"
        self.active = True
        self.before_bias = spec.output_position == "before_bias"
        self.rounds_output = kind in spec.output_layers and precision == "int8"
        self.input_quantizer = TensorQuantizer(QuantDescriptor(axis=-1))
        rows = self.out_features if spec.weight_granularity == "per_channel" else None
        low, high = WEIGHT_RANGE
        weight = QuantDescriptor(
            axis=None if rows is None else 0, calib_method="max", low=low, high=high
        )
        self.weight_quantizer = TensorQuantizer(weight, rows)
        columns = self.out_features if spec.output_granularity == "per_channel" else None
        self.output_quantizer = TensorQuantizer(
            QuantDescriptor(
                axis=None if columns is None else -1,
                calib_method="max" if spec.output_method == "max" else "histogram",
                headroom=spec.output_headroom if spec.output_method == "max" else 1.0,
            ),
            columns,
        )
        self.set_int8_mode(1)
        self._cached_codes: tuple[tuple[int, ...], tuple[Tensor, ...], Tensor] | None = None

    def set_int8_mode(self, mode: int) -> None:
        """Mode 1 rounds every output that the recipe names, mode 2 not those of fc2, reduction."""
        unrounded = mode == 2 and self.kind in UNROUNDED_IN_MODE_2
        self.output_quantizer.enabled = self.rounds_output and not unrounded

    def folded_weight(self) -> Tensor:
        """The weight (out, in) with an input-scale vector multiplied into its columns."""
        if self.input_quantizer.per_tensor:
            return self.weight
        return self.weight * self.input_quantizer.scale()[0]

    def calibrate_weight(self) -> None:
        """Set the weight's range to the largest magnitude of each row, or of the tensor."""
        magnitude = self.folded_weight().detach().abs()
        per_row = self.weight_quantizer.descriptor.axis == 0
        self.weight_quantizer.load_calib_amax(magnitude.amax(1) if per_row else magnitude.max())

    def _weight_codes(self) -> Tensor:
        """Codes of the folded weight, (out, in) fp32; kept while weight and ranges stay."""
        learns = self.weight.requires_grad or self.weight_quantizer.log_amax is not None
        if (torch.is_grad_enabled() and learns) or torch.compiler.is_compiling():
            return self._round_weight()
        sources = (self.weight, self.weight_quantizer.amax, self.input_quantizer.amax)
        # a weight keeps its identity when .to() gives it other memory, a range never does
        key = (self.weight.data_ptr(), *(source._version for source in sources))
        cached = self._cached_codes
        if cached is None or cached[0] != key or any(map(operator.is_not, cached[1], sources)):
            with torch.inference_mode(False), torch.no_grad():
                cached = self._cached_codes = (key, sources, self._round_weight())
        return cached[2]

    def _round_weight(self) -> Tensor:
        return self.weight_quantizer.codes(self.folded_weight())[0]

    def _factor(self) -> Tensor:
        """What one unit of the accumulator is worth: s_in * s_w, fp32, () or (out,)."""
        weight_scale, _ = self.weight_quantizer.scale()
        if not self.input_quantizer.per_tensor:  # the vector is folded into the weight
            return weight_scale
        return self.input_quantizer.scale()[0] * weight_scale

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out) in the layer's precision."""
        self.input_quantizer.observe(x)
        if not self.active:
            bias = self.full_bias()
            y = F.linear(x, self.weight, None if self.before_bias else bias)
            self.output_quantizer.observe(y)
            return y + bias if self.before_bias and bias is not None else y
        if self.precision == "fp16":
            return F.linear(round_to_half(x), round_to_half(self.weight), self.full_bias())
        codes, _ = self.input_quantizer.codes(x)
        if self.before_bias:
            return self.output_quantizer(self._product(codes, None)) + self.export_bias()
        return self.output_quantizer(self._product(codes, self.export_bias()))

    def _product(self, codes: Tensor, bias: Tensor | None) -> Tensor:
        weight_codes, factor = self._weight_codes(), self._factor()
        if torch.is_grad_enabled() and (codes.requires_grad or weight_codes.requires_grad):
            return _TrainedLinear.apply(codes, weight_codes, factor, bias)
        y = multiply_codes(codes, weight_codes.T, factor)
        return y if bias is None else y + bias

    def integer_weight(self) -> tuple[Tensor, Tensor]:
        """Return int8 codes (out, in) in [-127, 127] and their fp32 scale (out,).

        Raises:
            CalibrationError: the weight has no range yet.
        """
        with torch.no_grad():
            codes = self._weight_codes()
            scale, _ = self.weight_quantizer.scale()
        return codes.to(torch.int8), scale.expand(self.out_features).clone()

    def full_bias(self) -> Tensor | None:
        """The bias of the float layer, (out,) fp32 or None."""
        return self.bias

    def export_bias(self) -> Tensor:
        """The bias (out,) fp32 that the layer adds: zeros if it has none, int8 with correction."""
        bias = self.full_bias()
        if self.precision == "fp16":
            return torch.zeros_like(self.bias_correction) if bias is None else bias
        return self.bias_correction if bias is None else bias + self.bias_correction

    def extra_repr(self) -> str:
        """Show sizes and precision in a printed model."""
        return f"{self.in_features}, {self.out_features}, {self.precision}"


class QuantQkv(QuantLinear):
    """Swin v2's qkv, whose keys have no bias: the bias is [q_bias, 0, v_bias]."""

    def __init__(
        self, linear: nn.Linear, q_bias: nn.Parameter, v_bias: nn.Parameter, **kwargs: Any
    ) -> None:
        """See QuantLinear; q_bias and v_bias are (out / 3,) fp32."""
        super().__init__(linear, **kwargs)
        self.q_bias, self.v_bias = q_bias, v_bias

    def full_bias(self) -> Tensor:
        """[q_bias, 0, v_bias], (out,) fp32."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

"""Window attention with INT8 q, k, v and row-maximum u8 probabilities, fake-quantized.

    S = q k^T          s = S * (s_q s_k softmax_scale) + bias + mask        m = row maximum of s
    p = rint(255 exp(s - m))        out = (p v) * (s_v / sum p)

The probabilities need no calibrated range: their largest code is always 255, and dividing by the
sum of the very codes that were used removes the rounding error's mean.

``QuantWindowAttention`` is Swin's, ``QuantCosineAttention`` Swin v2's (q and k normalised).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinq.quant.affine import round_half_even
from swinq.quant.linear import QuantLinear, multiply_codes, product_type, round_to_half
from swinq.quant.quantizer import QuantDescriptor, TensorQuantizer
from swinq.quant.spec import QuantSpec

PROBABILITY_LEVELS = 255


def row_max_codes(s: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes rint(255 exp(s - row maximum)) of s (..., N) fp32, and their sums (..., 1) fp32.

    Args:
        dtype: of the codes; 0..255 are exact in any float type.
    """
    if torch.is_grad_enabled() and s.requires_grad:
        return _RowMaxCodes.apply(s, dtype)
    p = round_half_even((s - s.amax(-1, keepdim=True)).exp() * PROBABILITY_LEVELS)
    return p.to(dtype), p.sum(-1, keepdim=True)


class _RowMaxCodes(torch.autograd.Function):
    """`row_max_codes`, straight through: the gradient of s is the softmax's at the rounded codes.

    None flows through the row maximum: (p v) / sum p does not change when p is scaled.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        p, total = row_max_codes(s, dtype)
        ctx.save_for_backward(p)
        return p, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        return (grads[0] + grads[1]) * p, None


class QuantAttention(nn.Module):
    """What both versions share: from q, k, v to the attention's output.

    Attributes:
        precision: "int8" or "fp16", of the two matrix products (the Linears have their own).
        active: False computes in float, observers still see tensors.
    """

    qkv: QuantLinear
    proj: QuantLinear
    q_quantizer: TensorQuantizer
    k_quantizer: TensorQuantizer
    relative_position_index: Tensor

    def __init__(self, attention: nn.Module, spec: QuantSpec, precision: str) -> None:
        """Take over a float attention's children, parameters and buffers under the same names."""
        super().__init__()
        self.dim, self.num_heads = int(attention.dim), int(attention.num_heads)  # type: ignore[arg-type]
        for name, child in attention.named_children():
            self.add_module(name, child)
        for name, parameter in attention.named_parameters(recurse=False):
            if name not in ("q_bias", "v_bias"):  # QuantQkv holds them
                self.register_parameter(name, parameter)
        for name, buffer in attention.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=False)
        self.precision = precision
        self.active = True
        self.static_probabilities = spec.probabilities == "static"
        self.v_quantizer = TensorQuantizer(QuantDescriptor())
        if self.static_probabilities:
            self.a_quantizer = TensorQuantizer(QuantDescriptor())

    def softmax_scale(self) -> Tensor:
        """What a unit of q k^T is multiplied by, (heads,) fp32."""
        raise NotImplementedError

    def compact_relative_position_bias(self) -> Tensor:
        """The bias by relative offset, ((2W-1)^2, heads) fp32."""
        raise NotImplementedError

    def relative_position_bias(self) -> Tensor:
        """The bias by pair of tokens, (heads, N, N) fp32."""
        n = self.relative_position_index.shape[0]
        table = self.compact_relative_position_bias()
        return table[self.relative_position_index.reshape(-1)].view(n, n, -1).permute(2, 0, 1)

    def _split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        windows, tokens, _ = qkv.shape
        head_dim = self.dim // self.num_heads
        qkv = qkv.reshape(windows, tokens, 3, self.num_heads, head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (B*nW, heads, N, head_dim)
        return q, k, v

    def _add_bias_and_mask(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        bias = self.relative_position_bias()  # (heads, N, N)
        if mask is None:
            return scores + bias
        windows, heads, tokens, _ = scores.shape
        count = mask.shape[0]  # windows of one image
        grouped = scores.view(windows // count, count, heads, tokens, tokens)
        return (grouped + (bias + mask.unsqueeze(1))).view(windows, heads, tokens, tokens)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention in the layer's precision; q, k, v (B*nW, heads, N, d) -> (B*nW, N, dim)."""
        operands = ((self.q_quantizer, q), (self.k_quantizer, k), (self.v_quantizer, v))
        for quantizer, tensor in operands:
            quantizer.observe(tensor)
        if not self.active:
            return self.attend_float(q, k, v, mask)
        if self.precision == "fp16":
            return self.attend_half(q, k, v, mask)
        q_pair, k_pair, v_pair = (quantizer.codes(tensor) for quantizer, tensor in operands)
        return self.attend_codes(q_pair, k_pair, v_pair, mask, self.softmax_scale())

    def attend_float(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax attention in float; q, k, v (B*nW, heads, N, d) -> (B*nW, N, dim)."""
        scale = self.softmax_scale().view(-1, 1, 1)
        p = self._add_bias_and_mask((q * scale) @ k.transpose(-2, -1), mask).softmax(-1)
        if self.static_probabilities:
            self.a_quantizer.observe(p)
        return _merge_heads(p @ v)

    def attend_half(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The same with fp16 operands and fp32 sums, as the engine computes an fp16 layer."""
        q, k, v = round_to_half(q), round_to_half(k), round_to_half(v)
        scale = self.softmax_scale().view(-1, 1, 1)
        s = self._add_bias_and_mask((q @ k.transpose(-2, -1)) * scale, mask)
        p = round_to_half((s - s.amax(-1, keepdim=True)).exp())
        return _merge_heads((p @ v) / p.sum(-1, keepdim=True))

    def attend_codes(
        self,
        q: tuple[Tensor, Tensor],
        k: tuple[Tensor, Tensor],
        v: tuple[Tensor, Tensor],
        mask: Tensor | None,
        softmax_scale: Tensor,
    ) -> Tensor:
        """Attention on (codes, scale) pairs, codes (B*nW, heads, N, d) -> (B*nW, N, dim).

        A scale broadcasts against its codes; softmax_scale is (heads,) fp32.
        """
        factor = (q[1] * k[1]) * softmax_scale.view(-1, 1, 1)
        s = multiply_codes(q[0], k[0].transpose(-2, -1), factor)
        s = self._add_bias_and_mask(s, mask)
        if self.static_probabilities:
            p, p_scale = self.a_quantizer.codes(s.softmax(-1))
            return _merge_heads(multiply_codes(p, v[0], p_scale * v[1]))
        p, total = row_max_codes(s, product_type(s.device))
        return _merge_heads(multiply_codes(p, v[0], v[1] / total))


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B*nW, heads, N, d) -> (B*nW, N, heads*d)


class QuantWindowAttention(QuantAttention):
    """Swin's attention: q, k, v quantized after the bias, before 1/sqrt(d)."""

    relative_position_bias_table: Tensor

    def __init__(self, attention: nn.Module, spec: QuantSpec, precision: str) -> None:
        """See QuantAttention; q and k have one scale per tensor."""
        super().__init__(attention, spec, precision)
        self.q_quantizer = TensorQuantizer(QuantDescriptor())
        self.k_quantizer = TensorQuantizer(QuantDescriptor())

    def softmax_scale(self) -> Tensor:
        """1/sqrt(head dimension) for each head."""
        scale = (self.dim // self.num_heads) ** -0.5
        return self.relative_position_bias_table.new_full((self.num_heads,), scale)

    def compact_relative_position_bias(self) -> Tensor:
        """The trained table, ((2W-1)^2, heads)."""
        return self.relative_position_bias_table

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map windows x (B*nW, N, dim), mask (nW, N, N) to (B*nW, N, dim)."""
        q, k, v = self._split_heads(self.qkv(x))
        return self.proj(self.attend(q, k, v, mask))


class QuantCosineAttention(QuantAttention):
    """Swin v2's attention: q and k normalised, then quantized with a scale per head.

    With static probabilities it follows FasterTransformer instead: q and k are rounded before
    they are normalised, and again, for all heads alike, after q took up the logit scale.
    """

    logit_scale: Tensor
    relative_coords_table: Tensor
    cpb_mlp: nn.Sequential

    def __init__(self, attention: nn.Module, spec: QuantSpec, precision: str) -> None:
        """See QuantAttention; a normalised component is at most 1, so no scale exceeds 1/127."""
        super().__init__(attention, spec, precision)
        if self.static_probabilities:
            self.q_quantizer = TensorQuantizer(QuantDescriptor())
            self.k_quantizer = TensorQuantizer(QuantDescriptor())
            self.mha_q_quantizer = TensorQuantizer(QuantDescriptor())
            self.mha_k_quantizer = TensorQuantizer(QuantDescriptor())
        else:
            unit = QuantDescriptor(axis=1, calib_method="max", headroom=1.05, limit=1.0)
            self.q_quantizer = TensorQuantizer(unit, self.num_heads)
            self.k_quantizer = TensorQuantizer(unit, self.num_heads)

    def softmax_scale(self) -> Tensor:
        """exp(logit_scale) of each head, at most 100."""
        return self.logit_scale.clamp(max=math.log(100.0)).exp().view(-1)

    def compact_relative_position_bias(self) -> Tensor:
        """16 sigmoid(MLP(log-spaced offsets)), ((2W-1)^2, heads) fp32, whatever the AMP type."""
        with torch.autocast(self.relative_coords_table.device.type, enabled=False):
            table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return 16 * torch.sigmoid(table)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map windows x (B*nW, N, dim), mask (nW, N, N) to (B*nW, N, dim)."""
        q, k, v = self._split_heads(self.qkv(x))
        if self.static_probabilities:
            return self.proj(self._attend_static(q, k, v, mask))
        q, k = F.normalize(q, dim=-1, eps=1e-12), F.normalize(k, dim=-1, eps=1e-12)
        return self.proj(self.attend(q, k, v, mask))

    def _attend_static(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        for quantizer, tensor in ((self.q_quantizer, q), (self.k_quantizer, k)):
            quantizer.observe(tensor)
        self.v_quantizer.observe(v)
        rounded = self.active and self.precision == "int8"
        if rounded:
            q, k = self.q_quantizer(q), self.k_quantizer(k)
        q = F.normalize(q, dim=-1, eps=1e-12)
        k = F.normalize(k, dim=-1, eps=1e-12)
        scaled = q * self.softmax_scale().view(-1, 1, 1)
        self.mha_q_quantizer.observe(scaled)
        self.mha_k_quantizer.observe(k)
        if not rounded:
            attend = self.attend_half if self.active else self.attend_float
            return attend(q, k, v, mask)
        return self.attend_codes(
            self.mha_q_quantizer.codes(scaled),
            self.mha_k_quantizer.codes(k),
            self.v_quantizer.codes(v),
            mask=mask,
            softmax_scale=torch.ones_like(self.logit_scale),
        )

"""Swin Transformer V2 (Liu et al. 2022, arXiv 2111.09883): post-norm, cosine, bias by an MLP.

block: x = x + norm1(attn(x)); x = x + norm2(mlp(x))       merge: norm(reduction(4C))
attention: softmax(cos(q, k) * exp(min(logit_scale, ln 100)) + bias[index] + mask) v
bias: 16 * sigmoid(mlp(log-spaced relative coordinates)), so a model can change its window
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 (the field's spelling)
from torch import Tensor, nn

from swinq.models.architecture import Architecture, Stage
from swinq.models.layers import (
    SwinBase,
    WindowBlock,
    add_bias,
    merge_neighbours,
    relative_position_index,
)

LARGEST_LOG_SCALE = math.log(100.0)
SMALLEST_NORM = 1e-12  # of a query or key, before it divides them
BIAS_RANGE = 16.0  # the learned bias lies in (0, 16)
COORDINATE_HIDDEN = 512  # hidden channels of the MLP over coordinates


def relative_coords_table(window: int, pretrained_window: int) -> Tensor:
    """Log-spaced offsets of all relative positions: (1, 2W-1, 2W-1, 2) fp32, last axis (dy, dx).

    Offsets are scaled so that the window the model was pretrained with spans [-8, 8], then
    sign(t) * log2(1 + |t|) / 3 (equations 4 and 5 of the paper).
    """
    offsets = torch.arange(-(window - 1), window, dtype=torch.float32)  # (2W-1,)
    span = max((pretrained_window or window) - 1, 1)
    t = offsets * (8.0 / span)
    t = t.sign() * (t.abs() + 1.0).log2() / 3.0  # 3 = log2(8)
    return torch.stack(torch.meshgrid(t, t, indexing="ij"), dim=-1)[None]


class CosineWindowAttention(nn.Module):
    """Multi-head attention inside windows by cosine similarity, a learned temperature per head."""

    relative_position_index: Tensor
    relative_coords_table: Tensor

    def __init__(
        self, dim: int, num_heads: int, window: int, pretrained_window: int, qkv_bias: bool
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.window = window
        self.scale = (dim // num_heads) ** -0.5  # of v1; here logit_scale has its place
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, COORDINATE_HIDDEN),
            nn.ReLU(),
            nn.Linear(COORDINATE_HIDDEN, num_heads, bias=False),
        )
        self.register_buffer(
            "relative_coords_table",
            relative_coords_table(window, pretrained_window),
            persistent=False,
        )
        self.register_buffer(
            "relative_position_index", relative_position_index(window), persistent=False
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)  # its bias is q_bias, 0, v_bias
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.proj = nn.Linear(dim, dim)

    def qkv_bias(self) -> Tensor | None:
        """(3C,): [q_bias, 0, v_bias]; None for a model without. Keys never have one."""
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])

    def compact_relative_position_bias(self) -> Tensor:
        """((2W-1)^2, heads): 16 * sigmoid of the MLP, one row for each relative position."""
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return BIAS_RANGE * torch.sigmoid(table)

    def relative_position_bias(self) -> Tensor:
        """(heads, N, N): the compact table spread over all pairs of tokens."""
        return self.compact_relative_position_bias()[self.relative_position_index].permute(2, 0, 1)

    def softmax_scale(self) -> Tensor:
        """(heads,) fp32: what the cosines are multiplied by, at most 100."""
        return self.logit_scale.float().clamp(max=LARGEST_LOG_SCALE).exp().view(-1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within each window.

        Args:
            x: (B*nW, N, C), the windows of one image next to each other.
            mask: (nW, N, N), 0 or -100, or None for unshifted windows.

        Returns:
            (B*nW, N, C)
        """
        windows, n, c = x.shape
        qkv = self.qkv(x)
        bias = self.qkv_bias()
        if bias is not None:
            qkv = qkv + bias
        qkv = qkv.view(windows, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B*nW, heads, N, d) each
        q = F.normalize(q, dim=-1, eps=SMALLEST_NORM)
        k = F.normalize(k, dim=-1, eps=SMALLEST_NORM)
        logits = q @ k.transpose(-2, -1)  # (B*nW, heads, N, N)
        logits = logits * self.softmax_scale().to(logits.dtype).view(-1, 1, 1)
        logits = add_bias(logits, self.relative_position_bias(), mask)
        x = logits.softmax(dim=-1) @ v  # (B*nW, heads, N, d)
        return self.proj(x.transpose(1, 2).reshape(windows, n, c))


class SwinTransformerV2Block(WindowBlock):
    """Window attention and MLP, each normalised before it joins the residual stream."""

    def __init__(self, arch: Architecture, stage: Stage, index: int) -> None:
        attn = CosineWindowAttention(
            stage.dim, stage.heads, stage.window, stage.pretrained_window, arch.qkv_bias
        )
        super().__init__(arch, stage, index, attn)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H*W, C) -> (B, H*W, C)."""
        x = self.stream(x + self.drop_path(self.norm1(self.attend(x))))
        return self.stream(x + self.drop_path(self.norm2(self.mlp(x))))


class PatchMergingV2(nn.Module):
    """Half the resolution, twice the channels: a linear over a 2x2 square, then norm over 2C."""

    def __init__(self, arch: Architecture, stage: Stage) -> None:
        super().__init__()
        self.resolution = stage.resolution
        self.reduction = nn.Linear(4 * stage.dim, 2 * stage.dim, bias=False)
        self.norm = nn.LayerNorm(2 * stage.dim, eps=arch.norm_eps)
        self.stream = nn.Identity()  # the residual stream as it enters the next stage

    def forward(self, x: Tensor) -> Tensor:
        """(B, H*W, C) -> (B, H/2*W/2, 2C)."""
        return self.stream(self.norm(self.reduction(merge_neighbours(x, self.resolution))))


class SwinTransformerV2(SwinBase):
    """Swin v2: (B, 3, S, S) -> logits (B, num_classes)."""

    def __init__(self, arch: Architecture, drop_path_rate: float = 0.0) -> None:
        super().__init__(arch, drop_path_rate, SwinTransformerV2Block, PatchMergingV2)
        self._init_post_norms()

    def _init_post_norms(self) -> None:
        """Norms of the residual branches start at 0, so that every block starts as identity."""
        for module in self.modules():
            if isinstance(module, SwinTransformerV2Block):
                for norm in (module.norm1, module.norm2):
                    nn.init.zeros_(norm.weight)
                    nn.init.zeros_(norm.bias)

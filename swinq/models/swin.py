"""Swin Transformer, version 1 (Liu et al. 2021, arXiv 2103.14030): pre-norm, learned bias table.

block: x = x + attn(norm1(x)); x = x + mlp(norm2(x))       merge: reduction(norm(4C))
attention: softmax(q k^T / sqrt(d) + table[index] + mask) v
"""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from swinq.models.architecture import Architecture, Stage
from swinq.models.layers import (
    SwinBase,
    WindowBlock,
    add_bias,
    merge_neighbours,
    relative_position_index,
)


class WindowAttention(nn.Module):
    """Multi-head attention inside windows, with a learned bias for each relative position."""

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, window: int, qkv_bias: bool) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.window = window
        self.scale = (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(
            torch.empty((2 * window - 1) ** 2, num_heads)
        )
        self.register_buffer(
            "relative_position_index", relative_position_index(window), persistent=False
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def compact_relative_position_bias(self) -> Tensor:
        """((2W-1)^2, heads): one row for each relative position."""
        return self.relative_position_bias_table

    def relative_position_bias(self) -> Tensor:
        """(heads, N, N): the compact table spread over all pairs of tokens."""
        return self.compact_relative_position_bias()[self.relative_position_index].permute(2, 0, 1)

    def softmax_scale(self) -> Tensor:
        """(heads,) fp32: what the product q k^T is multiplied by."""
        device = self.relative_position_bias_table.device
        return torch.full((self.num_heads,), self.scale, dtype=torch.float32, device=device)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within each window.

        Args:
            x: (B*nW, N, C), the windows of one image next to each other.
            mask: (nW, N, N), 0 or -100, or None for unshifted windows.

        Returns:
            (B*nW, N, C)
        """
        windows, n, c = x.shape
        qkv = self.qkv(x).view(windows, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B*nW, heads, N, d) each
        logits = (q * self.scale) @ k.transpose(-2, -1)  # (B*nW, heads, N, N)
        logits = add_bias(logits, self.relative_position_bias(), mask)
        x = logits.softmax(dim=-1) @ v  # (B*nW, heads, N, d)
        return self.proj(x.transpose(1, 2).reshape(windows, n, c))


class SwinTransformerBlock(WindowBlock):
    """Pre-norm window attention and MLP; odd blocks attend over windows shifted by half."""

    def __init__(self, arch: Architecture, stage: Stage, index: int) -> None:
        attn = WindowAttention(stage.dim, stage.heads, stage.window, arch.qkv_bias)
        super().__init__(arch, stage, index, attn)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H*W, C) -> (B, H*W, C)."""
        x = self.stream(x + self.drop_path(self.attend(self.norm1(x))))
        return self.stream(x + self.drop_path(self.mlp(self.norm2(x))))


class PatchMerging(nn.Module):
    """Half the resolution, twice the channels: norm over the 4C of a 2x2 square, then a linear."""

    def __init__(self, arch: Architecture, stage: Stage) -> None:
        super().__init__()
        self.resolution = stage.resolution
        self.reduction = nn.Linear(4 * stage.dim, 2 * stage.dim, bias=False)
        self.norm = nn.LayerNorm(4 * stage.dim, eps=arch.norm_eps)
        self.stream = nn.Identity()  # the residual stream as it enters the next stage

    def forward(self, x: Tensor) -> Tensor:
        """(B, H*W, C) -> (B, H/2*W/2, 2C)."""
        return self.stream(self.reduction(self.norm(merge_neighbours(x, self.resolution))))


class SwinTransformer(SwinBase):
    """Swin v1: (B, 3, S, S) -> logits (B, num_classes)."""

    def __init__(self, arch: Architecture, drop_path_rate: float = 0.0) -> None:
        super().__init__(arch, drop_path_rate, SwinTransformerBlock, PatchMerging)

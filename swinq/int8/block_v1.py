"""Swin v1 on integers: normalise first, then the branch.

x = fp16(x + attn(norm1(x)))     x = fp16(x + mlp(norm2(x)))     merge: fp16(reduction(norm(4C)))
"""

from __future__ import annotations

from torch import Tensor

from swinq.int8.block import Block, Merge
from swinq.int8.layers import Tap


class BlockV1(Block):
    """Pre-norm; q and k as they come out of qkv."""

    def attention_branch(self, x: Tensor, bias: Tensor, unit: int, tap: Tap | None) -> Tensor:
        """x (W, N, C), bias (W or 1, heads, N, N) -> (W, N, C)."""
        rows = unit * self.windows.tokens
        qkv = self.qkv(self.norm1(x), rows, tap)  # (W, N, 3C)
        return self.proj(self.attention(qkv, bias, unit, tap), rows, tap)

    def mlp_branch(self, x: Tensor, unit: int, tap: Tap | None) -> Tensor:
        """(pieces, N, C) -> (pieces, N, C)."""
        return self.mlp(self.norm2(x), unit, tap)


class MergeV1(Merge):
    """Norm over the four tokens' 4C, then the linear."""

    def merged(self, x: Tensor, unit: int, tap: Tap | None) -> Tensor:
        """(rows, 4C) -> (rows, 2C)."""
        return self.reduction(self.norm(x), unit, tap)

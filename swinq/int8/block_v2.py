"""Swin v2 on integers: the branch first, then normalise; cosine attention.

x = fp16(x + norm1(attn(x)))     x = fp16(x + norm2(mlp(x)))     merge: fp16(norm(reduction(4C)))
"""

from __future__ import annotations

from torch import Tensor

from swinq.int8 import reference
from swinq.int8.block import Block, Merge
from swinq.int8.layers import Tap


class BlockV2(Block):
    """Post-norm; queries and keys normalised head by head before they become codes."""

    def attention_branch(self, x: Tensor, bias: Tensor, unit: int, tap: Tap | None) -> Tensor:
        """x (W, N, C), bias (W or 1, heads, N, N) -> (W, N, C)."""
        rows = unit * self.windows.tokens
        qkv = self.qkv(x, rows, tap)  # (W, N, 3C)
        q_and_k = qkv.view(*x.shape[:2], 3, self.heads, -1)[:, :, :2]  # (W, N, 2, heads, d)
        q_and_k.copy_(reference.normalise(q_and_k))
        return self.norm1(self.proj(self.attention(qkv, bias, unit, tap), rows, tap))

    def mlp_branch(self, x: Tensor, unit: int, tap: Tap | None) -> Tensor:
        """(pieces, N, C) -> (pieces, N, C)."""
        return self.norm2(self.mlp(x, unit, tap))


class MergeV2(Merge):
    """The linear over the four tokens' 4C, then norm over 2C."""

    def merged(self, x: Tensor, unit: int, tap: Tap | None) -> Tensor:
        """(rows, 4C) -> (rows, 2C)."""
        return self.norm(self.reduction(x, unit, tap))

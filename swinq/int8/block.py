"""What the blocks and merges of both versions share: parts by name, windows, pieces of work.

The residual stream is fp16 and is updated in place. A batch is worked through in pieces that stay
in cache; block_v1.py and block_v2.py say what happens to a piece.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from swinq.export.reader import Int8Checkpoint
from swinq.int8 import reference
from swinq.int8.layers import Norm, Tap, attention, linear
from swinq.int8.windows import Cut, Windows, cut
from swinq.models.architecture import Stage


class Block:
    """Attention within windows and an MLP, each added to the residual stream."""

    def __init__(self, checkpoint: Int8Checkpoint, stage: Stage, index: int) -> None:
        tensors, precision = checkpoint.tensors, checkpoint.precision
        eps = checkpoint.architecture.norm_eps
        self.name = f"layers.{stage.index}.blocks.{index}"
        self.heads = stage.heads
        self.norm1 = Norm(tensors, f"{self.name}.norm1", eps)
        self.norm2 = Norm(tensors, f"{self.name}.norm2", eps)
        self.qkv = linear(tensors, precision, f"{self.name}.attn.qkv")
        self.attention = attention(tensors, precision, f"{self.name}.attn", stage.dim)
        self.proj = linear(tensors, precision, f"{self.name}.attn.proj")
        self.fc1 = linear(tensors, precision, f"{self.name}.mlp.fc1")
        self.fc2 = linear(tensors, precision, f"{self.name}.mlp.fc2")
        self.windows = Windows(
            stage.resolution,
            stage.window,
            stage.shift if index % 2 else 0,
            tensors[f"{self.name}.attn.relative_position_bias_table"],
        )
        tokens = self.windows.tokens
        hidden = len(tensors[f"{self.name}.mlp.fc1.bias"])
        widest = max(tokens * hidden, tokens * 3 * stage.dim, stage.heads * tokens**2)
        self._cut = cut(self.windows.count, widest, tensors[f"{self.name}.norm1.weight"].device)

    def __call__(self, x: Tensor, tap: Tap | None = None) -> Tensor:
        """(B, H*W, C) fp16 -> the same, a new tensor."""
        unit = self._cut.unit
        x = self.windows.gather(x)  # (B*nW, N, C) fp16
        for start, stop in _pieces(len(x), self._cut):
            bias = self.windows.bias(start, stop)
            _add(x[start:stop], self.attention_branch(x[start:stop].float(), bias, unit, tap))
        x = self.windows.scatter(x)  # (B, H*W, C) fp16
        if tap is not None:
            tap(f"{self.name}.attn.stream", x.clone())
        rows = x.view(-1, self.windows.tokens, x.shape[-1])  # in pieces as large as windows
        for start, stop in _pieces(len(rows), self._cut):
            _add(rows[start:stop], self.mlp_branch(rows[start:stop].float(), unit, tap))
        if tap is not None:
            tap(f"{self.name}.mlp.stream", x.clone())
        return x

    def attention_branch(self, x: Tensor, bias: Tensor, unit: int, tap: Tap | None) -> Tensor:
        """What attention adds to windows x (W, N, C); bias (W or 1, heads, N, N); all fp32.

        Args:
            unit: windows whose float sums may run together.
        """
        raise NotImplementedError

    def mlp_branch(self, x: Tensor, unit: int, tap: Tap | None) -> Tensor:
        """What the MLP adds to tokens x (pieces, N, C) fp32."""
        raise NotImplementedError

    def mlp(self, x: Tensor, unit: int, tap: Tap | None) -> Tensor:
        """fc2(gelu(fc1(x))), (pieces, N, C) fp32."""
        rows = unit * self.windows.tokens
        return self.fc2(reference.gelu(self.fc1(x, rows, tap)), rows, tap)


class Merge:
    """Half the resolution, twice the channels; a linear and a norm, in the version's order."""

    def __init__(self, checkpoint: Int8Checkpoint, stage: Stage) -> None:
        tensors, precision = checkpoint.tensors, checkpoint.precision
        self.name = f"layers.{stage.index}.downsample"
        self.norm = Norm(tensors, f"{self.name}.norm", checkpoint.architecture.norm_eps)
        self.reduction = linear(tensors, precision, f"{self.name}.reduction")
        self.resolution = stage.resolution
        self._width = 2 * stage.dim  # of the output
        device = tensors[f"{self.name}.norm.weight"].device
        self._cut = cut((stage.resolution // 2) ** 2, 4 * stage.dim, device)

    def __call__(self, x: Tensor, tap: Tap | None = None) -> Tensor:
        """(B, H*W, C) fp16 -> (B, H*W/4, 2C) fp16."""
        x = reference.merge_neighbours(x, self.resolution)  # (B, H*W/4, 4C) fp16
        out = x.new_empty(*x.shape[:-1], self._width)
        rows, written = x.flatten(0, 1), out.flatten(0, 1)
        for start, stop in _pieces(len(rows), self._cut):
            written[start:stop] = self.merged(rows[start:stop].float(), self._cut.unit, tap)
        if tap is not None:
            tap(f"{self.name}.stream", out)
        return out

    def merged(self, x: Tensor, unit: int, tap: Tap | None) -> Tensor:
        """Squares of tokens x (rows, 4C) -> (rows, 2C), fp32."""
        raise NotImplementedError


def _pieces(total: int, pieces: Cut) -> Iterator[tuple[int, int]]:
    """Start and stop of each piece of work."""
    for start in range(0, total, pieces.step):
        yield start, min(start + pieces.step, total)


def _add(stream: Tensor, y: Tensor) -> None:
    """stream := fp16(stream + y), the sum in fp32."""
    stream.copy_(torch.add(stream.float(), y))

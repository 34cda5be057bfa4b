"""What both versions of Swin share: windows, shift mask, patch embedding, MLP, stages, the whole.

swin.py and swin_v2.py hold what differs: the attention, the order of norm and residual, the merge.
Module and parameter names are those of microsoft/Swin-Transformer, so its files load unchanged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swinq.errors import DataError
from swinq.models.architecture import Architecture, Stage

MASKED = -100.0  # added to a logit between tokens of different regions; never -inf


def window_partition(x: Tensor, window: int) -> Tensor:
    """Cut (B, H, W, C) into windows: (B*nW, window*window, C), windows row by row."""
    b, h, w, c = x.shape
    x = x.view(b, h // window, window, w // window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, c)


def window_reverse(windows: Tensor, window: int, h: int, w: int) -> Tensor:
    """Undo `window_partition`: (B*nW, window*window, C) -> (B, H, W, C)."""
    c = windows.shape[-1]
    x = windows.view(-1, h // window, w // window, window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, c)


def relative_position_index(window: int) -> Tensor:
    """Row of the compact table for each pair of tokens: (N, N) int64, N = window*window.

    Query minus key offset (dy, dx) has row (dy + window - 1) * (2 * window - 1) + dx + window - 1.
    """
    line = torch.arange(window)
    y, x = (axis.flatten() for axis in torch.meshgrid(line, line, indexing="ij"))  # (N,) each
    dy = y[:, None] - y[None, :] + window - 1
    dx = x[:, None] - x[None, :] + window - 1
    return dy * (2 * window - 1) + dx


def shifted_window_mask(resolution: int, window: int, shift: int) -> Tensor:
    """Mask of a rolled map: 0 between tokens that were neighbours, `MASKED` otherwise.

    After rolling by -shift the last window of each axis holds two regions, so a map has nine.

    Returns:
        (nW, N, N) fp32, N = window*window.
    """
    line = torch.arange(resolution)
    region = (line >= resolution - window).long() + (line >= resolution - shift).long()
    regions = region[:, None] * 3 + region[None, :]  # (H, W)
    regions = window_partition(regions[None, :, :, None], window).squeeze(-1)  # (nW, N)
    same = regions[:, :, None] == regions[:, None, :]
    return torch.where(same, 0.0, MASKED)  # (nW, N, N) fp32


def merge_neighbours(x: Tensor, resolution: int) -> Tensor:
    """Stack each 2x2 square of tokens: (B, H*W, C) -> (B, H/2*W/2, 4C), left column first."""
    b, _, c = x.shape
    x = x.view(b, resolution // 2, 2, resolution // 2, 2, c)  # (B, H/2, dy, W/2, dx, C)
    return x.permute(0, 1, 3, 4, 2, 5).reshape(b, -1, 4 * c)  # channels ordered dx, dy, C


def add_bias(logits: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Logits (B*nW, heads, N, N) + bias (heads, N, N) + mask (nW, N, N).

    Mask and bias are added first: the large tensor is then read once.
    """
    if mask is None:
        return logits + bias
    _, heads, n, _ = logits.shape
    both = bias + mask[:, None]  # (nW, heads, N, N)
    return (logits.view(-1, mask.shape[0], heads, n, n) + both).view(-1, heads, n, n)


class PatchEmbed(nn.Module):
    """Image to tokens: a strided convolution, then LayerNorm."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.img_size = arch.img_size
        self.proj = nn.Conv2d(
            arch.in_chans, arch.embed_dim, kernel_size=arch.patch_size, stride=arch.patch_size
        )
        self.norm = nn.LayerNorm(arch.embed_dim, eps=arch.norm_eps)
        self.stream = nn.Identity()  # the residual stream as it enters stage 0

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, S, S) -> (B, tokens, C).

        Raises:
            DataError: the input is no batch of images of the model's size, or of another dtype.
        """
        self._check(x)
        return self.stream(self.norm(self.proj(x).flatten(2).transpose(1, 2)))

    def _check(self, x: Tensor) -> None:
        want = (self.proj.in_channels, self.img_size, self.img_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != want:
            raise DataError(
                f"the model wants images (batch, {want[0]}, {want[1]}, {want[2]}), "
                f"got a tensor {tuple(x.shape)}",
                "use the evaluation transform for the model's image size, "
                "or build the model with the other DATA.IMG_SIZE",
            )
        dtype = self.proj.weight.dtype
        if not x.is_floating_point() or (
            x.dtype != dtype and not torch.is_autocast_enabled(x.device.type)
        ):
            raise DataError(
                f"the model's weights are {dtype}, the images are {x.dtype}",
                f"normalise the images and convert them with .to({dtype})",
            )


class Mlp(nn.Module):
    """Two linears with the exact (erf) GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """In training, leaves a residual branch out of some images and enlarges it in the others.

    Stochastic depth (Huang et al. 2016, arXiv 1603.09382). The rate is a buffer, not a number:
    torch.compile would make a graph for each number.
    """

    rate: Tensor

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(float(rate)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...), each image either 0 or divided by 1 - rate."""
        if not self.training:
            return x
        keep = 1.0 - self.rate
        drawn = torch.rand([len(x)] + [1] * (x.ndim - 1), device=x.device)  # fp32
        return x * ((drawn < keep) / keep).to(x.dtype)


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Set the rate of the last block of a model; it grows linearly from 0 at the first."""
    paths = [module for module in model.modules() if isinstance(module, DropPath)]
    for index, path in enumerate(paths):
        path.rate.fill_(rate * index / max(len(paths) - 1, 1))


class WindowBlock(nn.Module):
    """The parts of a block of either version, and attention over (shifted) windows of a map.

    The versions differ in their attention and in `forward`: where norm1 and norm2 stand.
    """

    attn_mask: Tensor | None

    def __init__(self, arch: Architecture, stage: Stage, index: int, attn: nn.Module) -> None:
        super().__init__()
        self.resolution = stage.resolution
        self.window = stage.window
        self.shift = stage.shift if index % 2 else 0
        self.norm1 = nn.LayerNorm(stage.dim, eps=arch.norm_eps)
        self.attn = attn
        self.drop_path = DropPath()
        self.norm2 = nn.LayerNorm(stage.dim, eps=arch.norm_eps)
        self.mlp = Mlp(stage.dim, int(stage.dim * arch.mlp_ratio))
        self.stream = nn.Identity()  # the residual stream after each of the two adds
        mask = None
        if self.shift:
            mask = shifted_window_mask(self.resolution, self.window, self.shift)
        self.register_buffer("attn_mask", mask, persistent=False)  # (nW, N, N) fp32

    def attend(self, x: Tensor) -> Tensor:
        """Window attention over the map: (B, H*W, C) -> (B, H*W, C)."""
        b, tokens, c = x.shape
        side, shift = self.resolution, self.shift
        x = x.view(b, side, side, c)
        if shift:
            x = torch.roll(x, (-shift, -shift), (1, 2))
        x = self.attn(window_partition(x, self.window), self.attn_mask)  # (B*nW, N, C)
        x = window_reverse(x, self.window, side, side)
        if shift:
            x = torch.roll(x, (shift, shift), (1, 2))
        return x.reshape(b, tokens, c)


class BasicLayer(nn.Module):
    """One stage: its blocks, then patch merging unless it is the last."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.use_checkpoint = False  # training: recompute each block instead of keeping it

    def forward(self, x: Tensor) -> Tensor:
        """(B, H*W, C) -> (B, H/2*W/2, 2C), or the same shape in the last stage."""
        for block in self.blocks:
            if self.use_checkpoint and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x if self.downsample is None else self.downsample(x)


class SwinBase(nn.Module):
    """Patch embedding, stages, norm, mean, head; the versions supply the block and the merge."""

    def __init__(
        self,
        arch: Architecture,
        drop_path_rate: float,
        block: Callable[[Architecture, Stage, int], nn.Module],
        merge: Callable[[Architecture, Stage], nn.Module],
    ) -> None:
        """Build the tree.

        Args:
            drop_path_rate: of the last block; it grows linearly from 0 at the first.
            block: makes block `index` of a stage.
            merge: makes the patch merging at the end of a stage.
        """
        super().__init__()
        arch.validate()
        self.arch = arch
        self.patch_embed = PatchEmbed(arch)
        self.layers = nn.ModuleList(
            BasicLayer(
                [block(arch, stage, index) for index in range(stage.depth)],
                merge(arch, stage) if stage.merges else None,
            )
            for stage in arch.stages()
        )
        features = arch.stages()[-1].dim
        self.norm = nn.LayerNorm(features, eps=arch.norm_eps)
        self.head = nn.Linear(features, arch.num_classes)
        self.apply(_init_linear)
        set_drop_path(self, drop_path_rate)

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Trade time for memory in training: keep only the input of each block."""
        for layer in self.layers:
            if isinstance(layer, BasicLayer):
                layer.use_checkpoint = on

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, S, S) -> (B, tokens of the last stage, features), normalised."""
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, S, S) -> logits (B, num_classes)."""
        return self.head(self.forward_features(x).mean(dim=1))


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

"""Int8Swin: an INT8 checkpoint that runs, on plain torch, in integer arithmetic.

An image's logits are the same bits alone, in any batch and at any place in it: integer sums are
exact, and whatever sums floats does so over the same piece of an image in the same order.
"""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict

import torch
from torch import Tensor

from swinq.errors import SwinqError
from swinq.export.reader import Int8Checkpoint, read_checkpoint
from swinq.int8 import reference
from swinq.int8.block import Block, Merge
from swinq.int8.block_v1 import BlockV1, MergeV1
from swinq.int8.block_v2 import BlockV2, MergeV2
from swinq.int8.images import require_finite, require_images
from swinq.int8.layers import OVERFLOW_FIX, Norm, Tap
from swinq.models.architecture import Architecture

_PARTS: dict[int, tuple[type[Block], type[Merge]]] = {1: (BlockV1, MergeV1), 2: (BlockV2, MergeV2)}


class Int8Swin:
    """A Swin of either version that computes on codes.

    Attributes:
        checkpoint: what the file says: classes, transform, calibration, precision and so on. Its
            tensors are on `device`.
        arch: its architecture.
        stages: for each stage its blocks, and its merge or None.
        notes: what a user should hear of how it came to run.
    """

    engine = "the reference"  # what runs the model, for reports

    def __init__(self, checkpoint: Int8Checkpoint, device: str | torch.device = "cpu") -> None:
        """Prepare a checkpoint that was read; `load` does both."""
        self.device = torch.device(device)
        self.notes: list[str] = []
        moved = {name: t.to(self.device) for name, t in checkpoint.tensors.items()}
        self.checkpoint = checkpoint = dataclasses.replace(checkpoint, tensors=moved)
        self.arch = arch = checkpoint.architecture
        self._patch_weight = moved["patch_embed.proj.weight"].float().flatten(1).t().contiguous()
        self._patch_bias = moved["patch_embed.proj.bias"]
        self._patch_norm = Norm(moved, "patch_embed.norm", arch.norm_eps)
        block, merge = _PARTS[arch.version]
        self.stages: list[tuple[list[Block], Merge | None]] = [
            (
                [block(checkpoint, stage, index) for index in range(stage.depth)],
                merge(checkpoint, stage) if stage.merges else None,
            )
            for stage in arch.stages()
        ]
        self._norm = Norm(moved, "norm", arch.norm_eps)
        self._head_weight = moved["head.weight"].float().t().contiguous()  # (C, classes)
        self._head_bias = moved["head.bias"]

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        int8_mode: int | None = None,
        architecture: Architecture | None = None,
        verify: bool = True,
        device: str | torch.device = "cpu",
    ) -> Int8Swin:
        """Read a checkpoint and prepare it.

        Args:
            int8_mode, architecture: what is wanted, if anything; a file that differs is refused.
            verify: compare the digest of every tensor.
            device: where to run.

        Raises:
            CheckpointError: see `swinq.export.reader.read_checkpoint`.
        """
        checkpoint = read_checkpoint(
            path, int8_mode=int8_mode, architecture=architecture, verify=verify
        )
        return cls(checkpoint, device)

    @property
    def int8_mode(self) -> int:
        """The mode that the file was exported in, 1 or 2."""
        return self.checkpoint.int8_mode

    @property
    def classes(self) -> list[str] | None:
        """Class names in the order of the logits, if the file has them."""
        return self.checkpoint.classes

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of a batch.

        Args:
            images: (B, in_chans, S, S) floating point, transformed as for evaluation.

        Returns:
            (B, num_classes) fp32, on `device`.

        Raises:
            DataError: another shape, not floats, or values that are no finite fp16 numbers.
            SwinqError: the residual stream, the logits, or q, k or v of an attention in fp16 left
                the range of fp16 or fp32.
        """
        return self._run(images, None)

    def trace(self, images: Tensor, *, streams: bool = False) -> dict[str, Tensor]:
        """Every int8 tensor of a forward, by name, in the order in which they are made.

        `L.input` and, where it is rounded, `L.output` of each int8 linear L (int8); `A.q`, `A.k`,
        `A.v` (int8) and `A.probabilities` (uint8) of each int8 attention A. Tensors inside
        attention are (B*nW, N, C) or (B*nW, heads, N, d or N); those of MLP and merge (B, H*W, C).

        Args:
            images: as for a call.
            streams: also the fp16 residual stream (B, H*W, C): `patch_embed.stream`,
                `layers.I.blocks.J.attn.stream`, `layers.I.blocks.J.mlp.stream`,
                `layers.I.downsample.stream`; and `logits`.
        """
        seen: dict[str, list[Tensor]] = defaultdict(list)

        def tap(name: str, tensor: Tensor) -> None:
            if streams or tensor.dtype in (torch.int8, torch.uint8):
                seen[name].append(tensor)

        logits = self._run(images, tap)
        tap("logits", logits)
        whole = {name: torch.cat(parts) for name, parts in seen.items()}
        return {
            name: x.view(len(images), -1, x.shape[-1])
            if ".mlp." in name or ".downsample." in name
            else x
            for name, x in whole.items()
        }

    def _run(self, images: Tensor, tap: Tap | None) -> Tensor:
        # autocast would turn exact products of codes into bfloat16
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            x = self._patches(self._accepted(images))
            if not len(images):
                return self._logits(x)  # (0, num_classes)
            if tap is not None:
                tap("patch_embed.stream", x)
            for index, (blocks, merge) in enumerate(self.stages):
                for block in blocks:
                    x = block(x, tap)
                # an infinity stays in the stream, but the next codes would hide it
                self._require_finite(x, f"the residual stream of layers.{index}")
                if merge is not None:
                    x = merge(x, tap)
            return self._logits(x)

    def _accepted(self, images: Tensor) -> Tensor:
        """The images on the device, holding fp16 values, if they are images of this model."""
        require_images(images, self.arch)
        rounded = images.to(self.device).half()
        require_finite(rounded)
        return rounded.float()

    def _patches(self, images: Tensor) -> Tensor:
        """(B, in_chans, S, S) -> the residual stream (B, tokens, C) fp16, image by image."""
        size = self.arch.patch_size
        tokens = (self.arch.img_size // size) ** 2
        x = torch.empty(
            (len(images), tokens, self.arch.embed_dim), dtype=torch.float16, device=self.device
        )
        for image, row in zip(images, x, strict=True):
            y = reference.half_gemm(
                reference.patches(image, size), self._patch_weight, self._patch_bias
            )
            row.copy_(self._patch_norm(y))
        return x

    def _logits(self, x: Tensor) -> Tensor:
        """(B, tokens, C) fp16 -> (B, num_classes) fp32, image by image."""
        logits = torch.empty(
            (len(x), self.arch.num_classes), dtype=torch.float32, device=self.device
        )
        for row, tokens in zip(logits, x, strict=True):
            row.copy_(
                reference.head(self._norm(tokens.float()), self._head_weight, self._head_bias)
            )
        self._require_finite(logits, "the logits")
        return logits

    def _require_finite(self, x: Tensor, what: str) -> None:
        if not bool(x.isfinite().all()):
            raise SwinqError(
                f"{self.checkpoint.path}: {what} overflowed on these images", OVERFLOW_FIX
            )

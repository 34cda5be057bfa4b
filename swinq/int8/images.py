"""What a model of either engine says to a batch that it cannot take."""

from __future__ import annotations

import torch
from torch import Tensor

from swinq.errors import DataError
from swinq.models.architecture import Architecture


def require_images(images: Tensor, arch: Architecture) -> None:
    """Refuse a tensor that is no batch of images of this model.

    Raises:
        DataError: no dense tensor, another shape than (B, in_chans, S, S), or not floating point.
    """
    if not isinstance(images, Tensor) or images.layout != torch.strided:
        kind = images.layout if isinstance(images, Tensor) else type(images).__name__
        raise DataError(
            f"the images are a {kind}, wanted a dense tensor", "stack them: torch.stack(images)"
        )
    want = (arch.in_chans, arch.img_size, arch.img_size)
    if images.dim() != 4 or tuple(images.shape[1:]) != want:
        raise DataError(
            f"the model wants images (batch, {', '.join(map(str, want))}), "
            f"got a tensor {tuple(images.shape)}",
            f"resize and crop to {want[1]} x {want[2]}: the checkpoint holds the transform",
        )
    if not images.is_floating_point():
        raise DataError(
            f"the images are {images.dtype}, wanted floating point",
            "scale and normalise them: the checkpoint holds the transform",
        )


def require_finite(images: Tensor) -> None:
    """Refuse images that are no finite numbers in fp16.

    Raises:
        DataError: names the first one.
    """
    finite = images.half().isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        raise DataError(
            f"image {int((~finite).nonzero()[0])} of the batch holds NaN, infinity or values "
            "beyond fp16",
            "check the file it was read from and the normalisation",
        )

"""Images decoded and resized once, kept as bytes in a folder: later runs need no photographs.

What a model sees is computed from the bytes on its device, and is the same bits that the evaluation
transform gives.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from swinq.data.datasets import open_dataset
from swinq.data.loader import BatchLoader
from swinq.data.sampling import calibration_indices
from swinq.data.transforms import EvalTransform, eval_transform
from swinq.errors import ConfigError

DECODED_AT_ONCE = 128
MOST_WORKERS = 16


@dataclass(frozen=True)
class Decoded:
    """Some images of a data set.

    Attributes:
        images: (n, 3, S, S) uint8. labels, indices: (n,) int64.
        transform: what makes a model's input of a picture; all but its last step is done.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    transform: EvalTransform

    def batches(self, size: int, device: torch.device) -> Iterator[Tensor]:
        """(B, 3, S, S) fp32 on the device, in order."""
        # tensors, not numbers: CUDA divides by a number through its reciprocal
        full = torch.full((1,), 255.0, device=device)
        mean = torch.tensor(self.transform.mean, device=device).view(3, 1, 1)
        std = torch.tensor(self.transform.std, device=device).view(3, 1, 1)
        for part in self.images.split(size):
            yield part.to(device).float().div_(full).sub_(mean).div_(std)


def decoded(
    data_path: str | None,
    split: str,
    transform_name: str,
    img_size: int,
    count: int,
    cache: Path | None,
) -> Decoded:
    """Images of a split: from the cache, or decoded and put there.

    Args:
        data_path: where the photographs are; None: the cache must have them.
        split: "train" or "val".
        transform_name, img_size: as `eval_transform` has them.
        count: so many, drawn with seed 0; 0: all of them.
        cache: a folder, or None.

    Raises:
        ConfigError: neither photographs nor a cached file.
        DataError: photographs that cannot be read.
    """
    transform = eval_transform(transform_name, img_size)
    name = f"{split}-{transform_name}-{img_size}-{count or 'all'}.safetensors"
    path = cache / name if cache else None
    if path is not None and path.exists():
        held = load_file(path)
        return Decoded(held["images"], held["labels"], held["indices"], transform)
    if data_path is None:
        raise ConfigError(
            f"there are no decoded images {path or name}",
            "give the photographs with --data-path, once, and the same --cache",
        )
    plain = dataclasses.replace(transform, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    dataset = open_dataset(data_path, split, plain)
    chosen = calibration_indices(len(dataset), min(count or len(dataset), len(dataset)), 0)
    batches = [chosen[i : i + DECODED_AT_ONCE] for i in range(0, len(chosen), DECODED_AT_ONCE)]
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    loaded = list(BatchLoader(dataset, batches, num_workers=workers))
    made = Decoded(
        torch.cat([batch.images.mul(255).round().byte() for batch in loaded]),
        torch.cat([batch.labels for batch in loaded]),
        torch.cat([batch.indices for batch in loaded]),
        transform,
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        tensors = {"images": made.images, "labels": made.labels, "indices": made.indices}
        save_file(tensors, beside)
        os.replace(beside, path)
    return made

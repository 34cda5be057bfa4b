"""Made-up images for trying out machinery and speed; a score on them means nothing."""

from __future__ import annotations

import numpy as np
from PIL import Image

from swinq.data.dataset import PixelDataset, Transform
from swinq.errors import DataError

COUNT = 256  # images of a split, unless asked for another number
_SIDE, _COARSE = 96, 6  # pixels
_MAX_COUNT = 10_000_000


class FakeDataset(PixelDataset):
    """Seeded random blobs and noise with random labels: the same images on every machine.

    Args:
        split: "train" or "val"; they hold different images.
        transform: RGB picture -> float32 (3, S, S).
        num_classes: labels are 0 .. num_classes-1; 1000 if None.
        count: number of images.
    """

    synthetic = True

    def __init__(
        self,
        split: str,
        transform: Transform,
        num_classes: int | None = None,
        count: int = COUNT,
    ) -> None:
        if not 1 <= count <= _MAX_COUNT:
            raise DataError(f"fake data set of {count} images: want 1 to {_MAX_COUNT:,}")
        self._key = ("train", "val").index(split)
        classes = num_classes or 1000
        labels = np.random.RandomState(self._key).randint(classes, size=count)
        super().__init__(
            [f"fake/{split}/{index:08d}" for index in range(count)],
            labels,
            [f"fake {label}" for label in range(classes)],
            transform,
            f"FAKE random images, {split}",
        )

    def image(self, index: int) -> Image.Image:
        """Image `index`, uint8 RGB, 96x96 pixels."""
        # RandomState's streams are frozen by NumPy's policy; Generator's may change
        random = np.random.RandomState([self._key, range(len(self))[index]])
        coarse = random.randint(256, size=(_COARSE, _COARSE, 3)).astype(np.uint8)
        blobs = Image.fromarray(coarse).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        noise = random.randint(-16, 17, size=(_SIDE, _SIDE, 3))
        return Image.fromarray((np.asarray(blobs) + noise).clip(0, 255).astype(np.uint8))

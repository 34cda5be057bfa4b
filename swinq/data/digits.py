"""The embedded demo's real data: scikit-learn's handwritten digits, 1,797 scans of 8x8 pixels.

Origin: the test part of the UCI set "Optical Recognition of Handwritten Digits", 13 writers who are
not those of its training part. It ships inside scikit-learn, so nothing is downloaded.

The split is fixed and stratified: of each digit, in the order of the file, the 5th, 10th, 15th, ...
image is held out ("val", 355 images) and the others are for training and calibration ("train",
1,442). Writers appear on both sides: this shows that the machinery works, not how well a model
generalises to other hands.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from swinq.data.dataset import PixelDataset, Transform, check_classes
from swinq.errors import DataError

IMG_SIZE = 32  # the demo model's input; the transform scales 8x8 up to it, bicubic
_FOLD = 5  # one image in five is held out
_WHITE = 16.0  # the scans count black pixels in 4x4 blocks: 0..16


class DigitsDataset(PixelDataset):
    """Handwritten digits as RGB pictures of 8x8 pixels, scaled up by the transform.

    Raises:
        DataError: scikit-learn is not installed, or `num_classes` is not 10.
    """

    def __init__(self, split: str, transform: Transform, num_classes: int | None = None) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError(
                f"the demo's digits come with scikit-learn, which cannot be imported: {error}",
                "pip install scikit-learn",
            ) from error
        digits = load_digits()
        targets = digits.target.astype(np.int64)  # (1797,)
        held_out = np.zeros(len(targets), np.bool_)
        for digit in range(10):
            held_out[np.flatnonzero(targets == digit)[_FOLD - 1 :: _FOLD]] = True
        chosen = np.flatnonzero(held_out if split == "val" else ~held_out)
        classes = [str(digit) for digit in range(10)]
        check_classes(classes, num_classes, "the digits data set")
        super().__init__(
            [f"{split}/{targets[i]}/digit_{i:04d}" for i in chosen],
            targets[chosen],
            classes,
            transform,
            f"scikit-learn's handwritten digits, {split}",
        )
        grey = np.rint(digits.images[chosen] * (255.0 / _WHITE))
        self._pixels = grey.astype(np.uint8)  # (n, 8, 8)

    def image(self, index: int) -> Image.Image:
        """Scan `index`, white on black, 8x8 pixels, RGB."""
        return Image.fromarray(self._pixels[index]).convert("RGB")

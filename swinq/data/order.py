"""Which images a training step sees: a function of (seed, step), never of who computes it."""

from __future__ import annotations

import numpy as np

from swinq.errors import ConfigError


class StepOrder:
    """A new permutation of the images for every epoch, cut into steps and micro-batches.

    An optimiser step consists of micro-batches numbered from 0 over all ranks and accumulations, so
    any division of the numbers among ranks sees the same images. The images that would begin an
    incomplete step at an epoch's end are left out of that epoch.

    Attributes:
        steps_per_epoch: whole steps in an epoch.

    Args:
        images: in the data set.
        micro_batch: images of one micro-batch.
        micro_batches: micro-batches of one step, all ranks together.
        seed: 0 to 2**32-1.

    Raises:
        ConfigError: a size below 1, a seed out of range, or fewer images than one step needs.
    """

    def __init__(self, images: int, micro_batch: int, micro_batches: int, seed: int) -> None:
        if min(micro_batch, micro_batches) < 1:
            raise ConfigError(
                f"a step of {micro_batches} micro-batches of {micro_batch} images: want at least 1"
            )
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seed {seed}: want 0 to {2**32 - 1}")
        self.images = images
        self.micro_batch = micro_batch
        self.micro_batches = micro_batches
        self.seed = seed
        self.steps_per_epoch = images // (micro_batch * micro_batches)
        if not self.steps_per_epoch:
            raise ConfigError(
                f"one training step takes {micro_batches} micro-batches (ranks x accumulation "
                f"steps) of {micro_batch} images, {micro_batch * micro_batches:,} in all; "
                f"the data set holds {images:,}",
                "lower --batch-size or --accumulation-steps, use fewer ranks, or give more images",
            )
        self._epoch = -1
        self._permutation = np.empty(0, np.int64)

    def keys(self, step: int, number: int) -> list[int]:
        """The images of one micro-batch.

        Args:
            step: optimiser step, from 0 over all epochs.
            number: of the micro-batch in its step, 0 to micro_batches-1.

        Returns:
            epoch * images + index of each image: a key says which image and in which epoch.
        """
        if step < 0 or not 0 <= number < self.micro_batches:
            raise IndexError(f"micro-batch {number} of step {step}: there is no such")
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = (step_in_epoch * self.micro_batches + number) * self.micro_batch
        chosen = self._permuted(epoch)[start : start + self.micro_batch]
        return (chosen + epoch * self.images).tolist()

    def _permuted(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            # RandomState's streams are frozen by NumPy's policy; Generator's may change
            random = np.random.RandomState([self.seed, epoch])
            self._epoch, self._permutation = epoch, random.permutation(self.images)  # (images,)
        return self._permutation

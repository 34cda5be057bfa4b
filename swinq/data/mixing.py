"""Mixup, CutMix and label smoothing of one micro-batch: timm's, seeded by (seed, step, number)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from swinq.data.augment import seeded
from swinq.errors import ConfigError

MODES = ("batch", "pair", "elem")
_STREAM = 2  # keeps the seeds here apart from those of other uses of the same numbers


class Mixing:
    """Turns images and labels into the images and soft targets to train on.

    mixup: Zhang et al. 2018; CutMix: Yun et al. 2019; both as in timm.data.Mixup.

    Args:
        num_classes: K.
        mixup: AUG.MIXUP, alpha of the Beta distribution; 0 for none.
        cutmix: AUG.CUTMIX, likewise.
        cutmix_minmax: AUG.CUTMIX_MINMAX, least and largest share of a side to cut out, instead of
            alpha.
        prob: AUG.MIXUP_PROB, how often a batch (or pair, or image) is mixed at all.
        switch_prob: AUG.MIXUP_SWITCH_PROB, how often that is CutMix where both are on.
        mode: AUG.MIXUP_MODE: one mixture for the "batch", for each "pair" or for each "elem".
        label_smoothing: MODEL.LABEL_SMOOTHING, the share spread over all classes.
        seed: the job's.

    Raises:
        ConfigError: an unknown mode, or limits of CutMix that are not 0 <= least < largest <= 1.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        cutmix_minmax: Sequence[float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        label_smoothing: float = 0.1,
        seed: int = 0,
    ) -> None:
        from timm.data import Mixup

        if mode not in MODES:
            raise ConfigError(
                f"AUG.MIXUP_MODE is '{mode}', wanted one of {', '.join(MODES)}",
                "--opts AUG.MIXUP_MODE batch",
            )
        limits = list(cutmix_minmax) if cutmix_minmax is not None else [0.0, 1.0]
        if len(limits) != 2 or not 0 <= limits[0] < limits[1] <= 1:
            raise ConfigError(
                f"AUG.CUTMIX_MINMAX is {limits}, wanted two shares, 0 <= least < largest <= 1",
                "for example [0.2, 0.8], or leave it empty",
            )
        self.seed = seed
        self.mixes = (mixup > 0 or cutmix > 0 or cutmix_minmax is not None) and prob > 0
        self._mixup = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            cutmix_minmax=limits if cutmix_minmax is not None else None,
            prob=prob,
            switch_prob=switch_prob,
            mode=mode,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )

    def __call__(
        self, images: Tensor, labels: Tensor, step: int, number: int
    ) -> tuple[Tensor, Tensor]:
        """Mixes a micro-batch with its own reverse.

        Args:
            images: (B, 3, S, S) on any device; overwritten.
            labels: (B,) int64 on the same device.
            step: optimiser step, from 0.
            number: of the micro-batch in its step, over all ranks.

        Returns:
            the images and their targets (B, K) float32; each row of targets sums to 1.

        Raises:
            ConfigError: an odd number of images that are to be mixed.
        """
        from timm.data.mixup import mixup_target

        if not self.mixes:
            smoothing = self._mixup.label_smoothing
            return images, mixup_target(labels, self._mixup.num_classes, 1.0, smoothing)
        self.check_batch(len(images))
        with seeded(self.seed, _STREAM, step, number):
            mixed, targets = self._mixup(images, labels)
        return mixed, targets

    def check_batch(self, size: int) -> None:
        """Refuses a batch size that cannot be mixed.

        Raises:
            ConfigError: an odd one: an image in the middle would have no partner.
        """
        if self.mixes and size % 2:
            raise ConfigError(
                f"a batch of {size} images cannot be mixed: mixup and CutMix pair them",
                "use an even --batch-size, or --opts AUG.MIXUP 0 AUG.CUTMIX 0",
            )

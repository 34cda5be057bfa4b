"""Training augmentation: timm's, as Swin was trained, seeded by (seed, epoch, image)."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from swinq.data.dataset import ImageDataset, Transform
from swinq.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from swinq.errors import ConfigError, DataError

SMALL = 32  # pixels: up to here whole pictures are shifted, not cut out and enlarged
_SHIFT = 4  # pixels
_STREAM = 1  # keeps the seeds here apart from those of other uses of the same numbers


class Augmented(Dataset[tuple[Tensor, int]]):
    """A data set whose items are asked for by key: epoch * len(dataset) + index.

    The pixels of a key are the same in any process and in any order: the transform finds the global
    generators of Python, NumPy and torch (CPU) seeded by (seed, epoch, index), and leaves them as
    they were.

    Args:
        dataset: its transform is the augmentation.
        seed: the job's.

    Raises:
        DataError: images without labels.
    """

    def __init__(self, dataset: ImageDataset, seed: int) -> None:
        if not dataset.labelled:
            raise DataError(
                f"{dataset.description}: training needs labels",
                "give --data-path a folder or zip with train/<class>/<image>",
            )
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        """Images in one epoch."""
        return len(self.dataset)

    def __getitem__(self, key: int) -> tuple[Tensor, int]:
        """float32 (3, S, S) and the label.

        Raises:
            UnreadableImageError: the image cannot be read or decoded.
        """
        epoch, index = divmod(key, len(self.dataset))
        with seeded(self.seed, _STREAM, epoch, index):
            return self.dataset[index]

    def path(self, key: int) -> str:
        """The image's name in its data set."""
        return self.dataset.path(key % len(self.dataset))

    def preload(self, keys: Iterable[int]) -> None:
        """Keeps nothing: every rank comes by every image, so its share would be the whole set."""


@contextlib.contextmanager
def seeded(seed: int, *numbers: int) -> Iterator[None]:
    """Seeds the global generators of Python, NumPy and torch's CPU; puts their states back.

    Args:
        seed: the job's.
        numbers: what the random numbers are for; any difference makes an independent stream.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=numbers)
    words = sequence.generate_state(3, np.uint64)
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(words[1:2].view(np.uint32))
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed would seed the GPUs too
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(cpu)


def train_transform(
    img_size: int,
    *,
    color_jitter: float = 0.4,
    auto_augment: str = "rand-m9-mstd0.5-inc1",
    reprob: float = 0.25,
    remode: str = "pixel",
    recount: int = 1,
    interpolation: str = "bicubic",
    hflip: float = 0.5,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    squash: bool = False,
) -> Transform:
    """The official Swin augmentation (data/build.py of microsoft/Swin-Transformer), made by timm.

    A random part of the picture resized to the model's input; up to 32 pixels the whole picture,
    padded by 4 and cropped. Then flip, RandAugment or colour jitter, normalisation, random erasing.

    Args:
        img_size: side of the model's input in pixels, S.
        color_jitter: AUG.COLOR_JITTER; 0 for none. RandAugment takes its place where there is one.
        auto_augment: AUG.AUTO_AUGMENT in timm's notation; "none" or "" for none.
        reprob: AUG.REPROB, the probability of random erasing; 0 for none.
        remode: AUG.REMODE: "pixel", "rand" or "const".
        recount: AUG.RECOUNT, rectangles erased at most.
        interpolation: "bicubic" or "bilinear".
        hflip: probability of a horizontal flip; 0 where mirror images are of another class.
        mean, std: per channel of the image scaled to [0, 1].
        squash: scale both sides of a picture to S before it is padded; for S up to 32 only.

    Returns:
        RGB picture -> float32 (3, S, S); draws from the global generators.

    Raises:
        ConfigError: a value that timm does not know.
    """
    from timm.data import create_transform
    from torchvision import transforms

    try:
        pipeline = create_transform(
            img_size,
            is_training=True,
            color_jitter=color_jitter if color_jitter > 0 else None,  # type: ignore[arg-type]
            auto_augment=auto_augment if auto_augment not in ("", "none") else None,
            re_prob=reprob,
            re_mode=remode,
            re_count=recount,
            interpolation=interpolation,
            hflip=hflip,
            mean=tuple(mean),
            std=tuple(std),
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"augmentation AUTO_AUGMENT '{auto_augment}', REMODE '{remode}', interpolation "
            f"'{interpolation}': timm refuses it: {error or type(error).__name__}",
            "for example --opts AUG.AUTO_AUGMENT rand-m9-mstd0.5-inc1 AUG.REMODE pixel",
        ) from error
    for step in pipeline.transforms:
        _keep_one_bit(step)
    if img_size <= SMALL:
        crop = transforms.RandomCrop(img_size, padding=_SHIFT, pad_if_needed=True)
        mode = transforms.InterpolationMode(interpolation)
        resize = transforms.Resize((img_size, img_size), mode)
        pipeline.transforms[0] = transforms.Compose([resize, crop]) if squash else crop
    return pipeline


def _keep_one_bit(step: object) -> None:
    """Makes the posterizing operations among timm's RandAugment, AutoAugment or AugMix ours."""
    policies = getattr(step, "policy", [getattr(step, "ops", [])])
    for operation in itertools.chain.from_iterable(policies):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize


def _posterize(picture: Image.Image, bits: int, **_: object) -> Image.Image:
    """At full strength timm asks for 0 bits: Pillow 13 raises, others make a black picture."""
    return ImageOps.posterize(picture, max(1, min(bits, 8)))

"""Evaluation transforms: which pixels of a picture the model sees, as data that a file can hold.

Top-1 moves by up to 0.4 points between the official and timm's preprocessing, so every report and
every exported file names its transform.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from swinq.errors import ConfigError, DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TRANSFORMS = ("official", "timm", "squash")
_INTERPOLATIONS = ("bicubic", "bilinear", "nearest")


@dataclass(frozen=True)
class EvalTransform:
    """Resize, centre crop, scale to [0, 1], normalise.

    Attributes:
        resize: int: the shorter side gets this many pixels; (height, width): both sides do.
        crop: side of the centre crop in pixels, None for no crop.
        interpolation: "bicubic", "bilinear" or "nearest", antialiased by Pillow.
        mean, std: per channel of the image scaled to [0, 1].
        name: what the transform is called in reports and files.
    """

    resize: int | tuple[int, int]
    crop: int | None = None
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    name: str = "custom"

    def __post_init__(self) -> None:
        sides = self.resize if isinstance(self.resize, tuple) else (self.resize, self.resize)
        if len(sides) != 2 or min(sides) < 1 or (self.crop is not None and self.crop < 1):
            raise ConfigError(
                f"transform {self.name}: resize {self.resize}, crop {self.crop}: want at least 1"
            )
        squashes = isinstance(self.resize, tuple) and sides[0] == sides[1]
        if self.crop is None and not squashes:
            raise ConfigError(
                f"transform {self.name}: resize {self.resize} without a crop leaves images that "
                "are not square",
                "give a crop, or resize both sides to the same length",
            )
        if self.interpolation not in _INTERPOLATIONS:
            raise ConfigError(
                f"transform {self.name}: interpolation '{self.interpolation}' is not known",
                f"use one of {', '.join(_INTERPOLATIONS)}",
            )
        numbers = all(isinstance(value, (int, float)) for value in (*self.mean, *self.std))
        if not (numbers and len(self.mean) == len(self.std) == 3 and min(self.std) > 0):
            raise ConfigError(
                f"transform {self.name}: mean {self.mean}, std {self.std}: "
                "want three numbers each, std above 0"
            )

    @property
    def img_size(self) -> int:
        """Side of the square that comes out, in pixels."""
        if self.crop is not None:
            return self.crop
        return self.resize if isinstance(self.resize, int) else self.resize[0]

    def __call__(self, picture: Image.Image) -> Tensor:
        """Turns an RGB picture into a float32 tensor (3, S, S).

        Raises:
            DataError: a picture so long and thin that resizing its shorter side would need more
                than Pillow's limit of pixels.
        """
        self._refuse_splinters(picture)
        return _pipeline(self)(picture)  # float32 (3, S, S)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        fields = dataclasses.asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> EvalTransform:
        """The transform that `to_dict` described.

        Raises:
            ConfigError: keys that are missing or unknown, values that make no transform.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != known:
            raise ConfigError(
                f"transform: missing keys {sorted(known - set(fields))}, "
                f"unknown keys {sorted(set(fields) - known)}"
            )
        try:
            values: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in fields.items()
            }
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"transform: {error}") from error

    def __str__(self) -> str:
        side = "x".join(map(str, self.resize)) if isinstance(self.resize, tuple) else self.resize
        crop = f", centre crop {self.crop}" if self.crop is not None else ""
        return f"{self.name} ({self.interpolation} resize {side}{crop})"

    def _refuse_splinters(self, picture: Image.Image) -> None:
        short, long = sorted(picture.size)
        limit = Image.MAX_IMAGE_PIXELS
        if isinstance(self.resize, int) and limit and self.resize**2 * long > limit * short:
            raise DataError(
                f"{picture.width}x{picture.height} pixels: too long and thin to resize its "
                f"shorter side to {self.resize}"
            )


def eval_transform(name: str, img_size: int, crop: bool = True) -> EvalTransform:
    """The evaluation transform of a known name.

    Args:
        name: "official": microsoft's, with `crop` Resize(int(256/224*S)) and CenterCrop(S), without
            Resize((S, S)), as its 384 configurations do. "timm": the shorter side is resized to
            floor(S/0.9) and cropped; without `crop`, or from 384 pixels on, crop_pct is 1.0, as in
            timm's own settings of these models. "squash": both sides to S, nothing cropped.
        img_size: S, the model's input side in pixels.
        crop: TEST.CROP of the configuration.

    Raises:
        ConfigError: unknown name or a size below 1.
    """
    if img_size < 1:
        raise ConfigError(f"image size {img_size}: want at least 1 pixel")
    if name == "squash" or (name == "official" and not crop):
        return EvalTransform((img_size, img_size), None, name=name)
    if name == "official":
        return EvalTransform(int(256 / 224 * img_size), img_size, name=name)
    if name == "timm":
        crop_pct = 0.9 if crop and img_size < 384 else 1.0
        return EvalTransform(math.floor(img_size / crop_pct), img_size, name=name)
    raise ConfigError(f"transform '{name}' is not known", f"use one of {', '.join(TRANSFORMS)}")


@functools.lru_cache(maxsize=16)
def _pipeline(transform: EvalTransform) -> Callable[[Image.Image], Tensor]:
    """The torchvision pipeline; imported here, since torchvision takes a second to import."""
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    interpolation = InterpolationMode(transform.interpolation)
    steps: list[Callable] = [transforms.Resize(transform.resize, interpolation, antialias=True)]
    if transform.crop is not None:
        steps.append(transforms.CenterCrop(transform.crop))
    steps += [transforms.ToTensor(), transforms.Normalize(transform.mean, transform.std)]
    return transforms.Compose(steps)

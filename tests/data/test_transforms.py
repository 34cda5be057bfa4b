"""The evaluation transforms are those that the checkpoints' accuracies were measured with."""

import json
import pickle
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from swinq.data.transforms import IMAGENET_MEAN, IMAGENET_STD, EvalTransform, eval_transform
from swinq.errors import ConfigError, DataError

SIZES = [(300, 200), (200, 300), (64, 64), (500, 375), (231, 97)]


@pytest.mark.parametrize(
    ("name", "img_size", "crop", "resize", "cropped"),
    [
        ("official", 224, True, 256, 224),
        ("official", 256, True, 292, 256),
        ("official", 192, True, 219, 192),
        ("official", 384, False, (384, 384), None),
        ("timm", 224, True, 248, 224),
        ("timm", 256, True, 284, 256),
        ("timm", 384, True, 384, 384),
        ("timm", 384, False, 384, 384),
        ("timm", 224, False, 224, 224),
        ("squash", 224, True, (224, 224), None),
    ],
)
def test_names_mean_the_published_sizes(
    name: str, img_size: int, crop: bool, resize: int | tuple[int, int], cropped: int | None
) -> None:
    found = eval_transform(name, img_size, crop)
    assert (found.resize, found.crop, found.name) == (resize, cropped, name)
    assert found.img_size == img_size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("img_size", "crop_pct"), [(224, 0.9), (256, 0.9), (384, 1.0)])
def test_timm_transform_is_timms(
    make_picture: Callable[..., Image.Image], size: tuple[int, int], img_size: int, crop_pct: float
) -> None:
    image = make_picture(3, *size)
    theirs = create_transform((3, img_size, img_size), interpolation="bicubic", crop_pct=crop_pct)
    assert torch.equal(eval_transform("timm", img_size)(image), theirs(image))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", [True, False])
def test_official_transform_is_microsofts(
    make_picture: Callable[..., Image.Image], size: tuple[int, int], crop: bool
) -> None:
    image = make_picture(4, *size)
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = (
        [transforms.Resize(256, interpolation=bicubic), transforms.CenterCrop(224)]
        if crop
        else [transforms.Resize((224, 224), interpolation=bicubic)]
    )
    steps += [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    got = eval_transform("official", 224, crop)(image)
    assert got.shape == (3, 224, 224) and got.dtype == torch.float32
    assert torch.equal(got, transforms.Compose(steps)(image))


def test_shrinking_is_antialiased() -> None:
    stripes = Image.new("L", (64, 64))
    stripes.putdata([255 * (x % 2) for _ in range(64) for x in range(64)])
    out = eval_transform("squash", 16)(stripes.convert("RGB"))
    spread = (out[0].max() - out[0].min()) * IMAGENET_STD[0]
    assert spread < 0.1  # without antialiasing every pixel would be fully black or fully white


@pytest.mark.parametrize("name", ["official", "timm", "squash"])
def test_a_transform_survives_json_and_pickling(name: str) -> None:
    before = eval_transform(name, 224)
    assert EvalTransform.from_dict(json.loads(json.dumps(before.to_dict()))) == before
    assert pickle.loads(pickle.dumps(before)) == before  # noqa: S301
    assert name in str(before) and "bicubic" in str(before)


@pytest.mark.parametrize(
    "change",
    [
        {"resize": 0},
        {"resize": [224, 0]},
        {"resize": [224]},
        {"resize": "224"},
        {"crop": 0},
        {"crop": None},  # the shorter side alone does not make a square
        {"interpolation": "lanczos"},
        {"std": [0.1, 0.0, 0.1]},
        {"mean": [0.1, 0.1]},
        {"mean": ["a", "b", "c"]},
        {"unknown": 1},
    ],
)
def test_a_description_that_makes_no_transform_is_refused(change: dict[str, object]) -> None:
    fields = eval_transform("official", 224).to_dict()
    with pytest.raises(ConfigError):
        EvalTransform.from_dict({**fields, **change})


def test_a_description_with_a_missing_key_names_it() -> None:
    fields = eval_transform("official", 224).to_dict()
    del fields["mean"]
    with pytest.raises(ConfigError, match="mean"):
        EvalTransform.from_dict(fields)


@pytest.mark.parametrize(("name", "img_size"), [("center", 224), ("official", 0)])
def test_unknown_names_and_sizes_are_refused(name: str, img_size: int) -> None:
    with pytest.raises(ConfigError):
        eval_transform(name, img_size)


def test_a_splinter_of_a_picture_is_refused_before_it_is_resized() -> None:
    splinter = Image.new("RGB", (100_000, 1))  # would become 25.6 million x 256 pixels
    with pytest.raises(DataError, match="100000x1"):
        eval_transform("official", 224)(splinter)
    assert eval_transform("squash", 8)(splinter).shape == (3, 8, 8)

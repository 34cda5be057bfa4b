"""Augmentation: official steps, drawn by (seed, epoch, image) alone, leaving no trace behind."""

import pickle
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from swinq.data.augment import Augmented, seeded, train_transform
from swinq.data.datasets import open_dataset
from swinq.data.images import UnreadableImageError
from swinq.errors import ConfigError, DataError


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.fixture
def data() -> Augmented:
    return Augmented(open_dataset("fake:6", "train", train_transform(40), num_classes=3), seed=1)


def test_a_key_gives_the_same_pixels_in_any_order_and_copy(data: Augmented) -> None:
    keys = [0, 5, 6, 17]
    wanted = {key: data[key] for key in keys}
    random.seed(123)
    np.random.seed(123)
    torch.manual_seed(123)
    copied = pickle.loads(pickle.dumps(data))  # as a worker that is spawned gets it
    for key in reversed(keys):
        pixels, label = copied[key]
        assert pixels.shape == (3, 40, 40) and pixels.dtype == torch.float32
        assert torch.equal(pixels, wanted[key][0]) and label == wanted[key][1]


def test_epochs_images_and_seeds_are_augmented_differently(data: Augmented) -> None:
    first, next_epoch = data[2], data[2 + len(data)]
    assert first[1] == next_epoch[1] == int(data.dataset.labels[2])
    assert not torch.equal(first[0], next_epoch[0])
    assert not torch.equal(first[0], Augmented(data.dataset, seed=2)[2][0])


def test_the_global_generators_are_left_as_they_were(data: Augmented) -> None:
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    wanted = drawn()
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    data[3]
    with pytest.raises(KeyError), seeded(0, 1):
        raise KeyError
    assert drawn() == wanted


def test_any_difference_in_the_numbers_makes_another_stream() -> None:
    streams = set()
    for key in [(0, 1), (0, 2), (1, 1), (1, 2), (0, 1, 0), (0, 0, 1), (2**32 - 1, 1)]:
        with seeded(*key):
            first = drawn()
        with seeded(*key):
            assert drawn() == first
        streams |= {*first}
    assert len(streams) == 3 * 7


def test_labels_are_wanted(write_folder: Callable[..., Path], make_bytes: Callable) -> None:
    flat = open_dataset(write_folder({"a.png": make_bytes(0)}), "train", train_transform(40))
    with pytest.raises(DataError, match="training needs labels"):
        Augmented(flat, seed=0)


def test_an_unreadable_image_is_named_in_every_epoch(
    image_files: dict[str, bytes], write_folder: Callable[[Mapping[str, bytes]], Path]
) -> None:
    image_files["train/ant/ant_1.png"] = b""
    folder = open_dataset(write_folder(image_files), "train", train_transform(40))
    data = Augmented(folder, seed=0)
    with pytest.raises(UnreadableImageError, match="ant_1.png"):
        data[1 + 3 * len(data)]
    assert data.path(1 + 3 * len(data)) == folder.path(1)


def names(transform: object) -> list[str]:
    return [type(step).__name__ for step in transform.transforms]  # type: ignore[attr-defined]


def test_the_steps_are_the_official_ones() -> None:
    official = train_transform(224)
    assert names(official) == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "RandAugment",
        "MaybeToTensor",
        "Normalize",
        "RandomErasing",
    ]
    assert "interpolation=bicubic" in str(official) and "mode=pixel, count=(1, 1)" in str(official)


def test_each_part_can_be_left_out() -> None:
    plain = train_transform(224, color_jitter=0, auto_augment="none", reprob=0, hflip=0)
    assert names(plain) == ["RandomResizedCropAndInterpolation", "MaybeToTensor", "Normalize"]
    jitter = train_transform(224, auto_augment="none")
    assert "ColorJitter" in names(jitter) and "RandAugment" not in names(jitter)


def test_a_small_picture_is_shifted_as_a_whole(make_picture: Callable) -> None:
    """Scaled to the model's 32 pixels, padded by 4, cropped: at most 4 rows or columns go."""
    plain = train_transform(
        32,
        color_jitter=0,
        auto_augment="",
        reprob=0,
        hflip=0,
        squash=True,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    white = Image.new("RGB", (8, 8), "white")
    shifts = set()
    for seed in range(40):
        with seeded(seed):
            pixels = plain(white)
        assert set(pixels.unique().tolist()) <= {0.0, 1.0}
        rows, columns = pixels[0].amax(1).sum().item(), pixels[0].amax(0).sum().item()
        shifts |= {rows, columns}
    assert min(shifts) == 28 and max(shifts) == 32
    assert train_transform(32)(make_picture(0, 20, 50)).shape == (3, 32, 32)


def test_mean_and_std_normalise() -> None:
    grey = Image.new("RGB", (64, 64), (51, 102, 204))
    plain = train_transform(
        48, color_jitter=0, auto_augment="none", reprob=0, mean=(0.2, 0.5, 0.5), std=(1, 0.1, 0.5)
    )
    assert torch.allclose(plain(grey)[:, 5, 5], torch.tensor([0.0, -1.0, 0.6]), atol=1e-6)


@pytest.mark.parametrize("policy", ["rand-m10-n4-p1-inc1", "original", "v0r", "augmix-m10"])
def test_no_policy_fails_at_full_strength(policy: str, make_picture: Callable) -> None:
    """timm asks for 0 bits at full strength: an error in Pillow 13, black pictures before."""
    strong = train_transform(40, auto_augment=policy, reprob=0, mean=(0, 0, 0), std=(1, 1, 1))
    picture = make_picture(3, 64, 64)
    for seed in range(150):
        with seeded(seed):
            pixels = strong(picture)
        assert pixels.isfinite().all()


def test_posterizing_keeps_at_least_one_bit(make_picture: Callable) -> None:
    step = train_transform(40, auto_augment="rand-m10-n1-p1-inc1").transforms[2]  # type: ignore[attr-defined]
    (posterize,) = (op for op in step.ops if op.name.startswith("Posterize"))
    posterize.prob = 1.0
    assert set(np.unique(np.asarray(posterize(make_picture(0))))) == {0, 128}


@pytest.mark.parametrize(
    "wrong", [{"auto_augment": "rand-q9"}, {"auto_augment": "fancy"}, {"remode": "noise"}]
)
def test_what_timm_does_not_know_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        train_transform(224, **wrong)  # type: ignore[arg-type]
    assert next(iter(wrong.values())) in str(caught.value)

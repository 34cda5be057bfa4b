"""Training batches: the same bits from any start, with any workers, on any number of ranks."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from swinq.data.augment import Augmented, train_transform
from swinq.data.datasets import open_dataset
from swinq.data.order import StepOrder
from swinq.data.training import TrainingLoader
from swinq.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

IMAGES, BATCH, NUMBERS, STEPS = 26, 2, 4, 8  # three steps in an epoch, two images are left over
Batches = dict[tuple[int, int], tuple[Tensor, Tensor]]


@pytest.fixture
def data() -> Augmented:
    transform = train_transform(24)
    return Augmented(open_dataset(f"fake:{IMAGES}", "train", transform, num_classes=5), seed=4)


def loaded(
    data: Augmented, *, first: int = 0, numbers: range = range(NUMBERS), workers: int = 0
) -> Batches:
    """Images and labels by (step, number), in the order in which they came."""
    loader = TrainingLoader(
        data,
        StepOrder(len(data), BATCH, NUMBERS, seed=4),
        first_step=first,
        last_step=STEPS,
        numbers=numbers,
        num_workers=workers,
    )
    batches = list(loader)
    assert len(batches) == len(loader) and {len(batch) for batch in batches} <= {BATCH}
    return {(batch.step, batch.number): (batch.images, batch.labels) for batch in batches}


def same(part: Batches, whole: Batches) -> bool:
    return all(
        torch.equal(images, whole[place][0]) and torch.equal(labels, whole[place][1])
        for place, (images, labels) in part.items()
    )


@pytest.mark.parametrize(
    ("first", "numbers", "workers"),
    [
        (0, range(NUMBERS), 1),
        (0, range(NUMBERS), 2),
        (4, range(NUMBERS), 0),  # resumed in the middle of an epoch
        (7, range(NUMBERS), 2),
        (STEPS, range(NUMBERS), 0),  # resumed when all was done
        (0, range(0, 2), 2),  # the first of two ranks
        (0, range(2, 4), 0),
    ],
)
def test_start_ranks_and_workers_do_not_change_a_bit(
    data: Augmented, first: int, numbers: range, workers: int
) -> None:
    whole = loaded(data)
    random.seed(first)  # nothing of what the caller has drawn before may matter
    np.random.seed(first)
    torch.manual_seed(first)
    part = loaded(data, first=first, numbers=numbers, workers=workers)
    assert list(part) == [(step, n) for step in range(first, STEPS) for n in numbers]
    assert same(part, whole)


def test_an_image_is_augmented_anew_in_the_next_epoch(data: Augmented) -> None:
    order = StepOrder(len(data), BATCH, NUMBERS, seed=4)
    seen: dict[int, list[Tensor]] = {}
    for (step, number), (images, labels) in loaded(data).items():
        for key, image, label in zip(order.keys(step, number), images, labels, strict=True):
            assert label == data.dataset.labels[key % IMAGES]
            seen.setdefault(key % IMAGES, []).append(image)
    repeats = [images for images in seen.values() if len(images) > 1]
    assert repeats and not any(torch.equal(images[0], images[1]) for images in repeats)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_draws_nothing_from_the_global_generators(data: Augmented, workers: int) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    loaded(data, first=6, workers=workers)
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_stop_the_training_by_name(
    image_files: dict[str, bytes],
    write_folder: Callable[[Mapping[str, bytes]], Path],
    workers: int,
) -> None:
    image_files["train/bee/bee_1.png"] = b"<html>"
    folder = open_dataset(write_folder(image_files), "train", train_transform(24))
    loader = TrainingLoader(
        Augmented(folder, seed=0),
        StepOrder(9, 3, 3, seed=0),
        first_step=0,
        last_step=2,
        numbers=range(3),
        num_workers=workers,
    )
    with pytest.raises(DataError, match="train/bee/bee_1.png: not an image") as caught:
        list(loader)
    assert caught.value.problem.count("bee_1.png") == 1  # though two epochs met it
    assert "repair" in caught.value.fix and "another job" in caught.value.fix


def test_a_zip_and_its_folder_give_the_same_batches(
    image_files: dict[str, bytes],
    write_folder: Callable[[Mapping[str, bytes]], Path],
    write_zip: Callable[..., Path],
) -> None:
    found = [
        list(
            TrainingLoader(
                Augmented(open_dataset(path, "train", train_transform(24)), seed=0),
                StepOrder(9, 2, 2, seed=0),
                first_step=0,
                last_step=3,
                numbers=range(2),
            )
        )
        for path in (write_folder(image_files), write_zip(image_files))
    ]
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)

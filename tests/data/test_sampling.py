"""Sampling and sharing out: exact, seeded, the same for every number of ranks."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from swinq.data.dataset import ImageDataset
from swinq.data.datasets import open_dataset
from swinq.data.sampling import (
    batches_of_rank,
    calibration_indices,
    sample_digest,
)
from swinq.data.transforms import EvalTransform
from swinq.errors import ConfigError, DataError


@pytest.mark.parametrize("world", range(1, 9))
def test_every_image_is_in_exactly_one_batch_of_one_rank(world: int) -> None:
    for n in range(1, 61):
        for batch_size in (1, 2, 3, 7, 8, 16, 64):
            shares = [batches_of_rank(n, batch_size, rank, world) for rank in range(world)]
            images = sorted(i for share in shares for batch in share for i in batch)
            assert images == list(range(n))


@pytest.mark.parametrize("world", range(1, 9))
def test_batches_are_the_same_for_every_number_of_ranks(world: int) -> None:
    for n in range(1, 61):
        for batch_size in (1, 3, 8, 16):
            alone = batches_of_rank(n, batch_size, 0, 1)
            shares = [batches_of_rank(n, batch_size, rank, world) for rank in range(world)]
            together = [None] * len(alone)
            for rank, share in enumerate(shares):
                together[rank::world] = share
            assert together == alone
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("batch_size", "rank", "world"), [(0, 0, 1), (4, 2, 2), (4, -1, 2)])
def test_a_share_that_cannot_be_is_refused(batch_size: int, rank: int, world: int) -> None:
    with pytest.raises(ConfigError):
        batches_of_rank(10, batch_size, rank, world)


def test_the_sample_is_exact_sorted_and_without_repeats() -> None:
    for n, count in ((1, 1), (10, 10), (50_000, 512)):
        chosen = calibration_indices(n, count, seed=3)
        assert len(chosen) == count == len(set(chosen)) and chosen == sorted(chosen)
        assert 0 <= chosen[0] and chosen[-1] < n


def test_the_sample_is_frozen_and_follows_its_seed() -> None:
    # literal numbers: a checkpoint's sample must be found again years later
    assert calibration_indices(1000, 5, seed=0) == [298, 553, 672, 859, 993]
    assert calibration_indices(1000, 5, seed=1) != calibration_indices(1000, 5, seed=0)


def test_more_images_than_there_are_names_both_numbers() -> None:
    with pytest.raises(DataError, match=r"512.*100"):
        calibration_indices(100, 512, seed=0)


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (-1, 0), (5, -1), (5, 2**32)])
def test_senseless_samples_are_refused(count: int, seed: int) -> None:
    with pytest.raises(ConfigError):
        calibration_indices(100, count, seed)


def test_the_sample_is_spread_evenly_over_the_data() -> None:
    counts = np.zeros(10)
    for seed in range(200):
        counts += np.histogram(calibration_indices(1000, 50, seed), 10, (0, 1000))[0]
    assert abs(counts - 1000).max() < 120  # 4 standard deviations


def test_digest_is_of_names_and_content_not_of_order_or_container(
    image_files: dict[str, bytes],
    write_folder: Callable[[Mapping[str, bytes]], Path],
    write_zip: Callable[..., Path],
    transform: EvalTransform,
) -> None:
    folder = open_dataset(write_folder(image_files), "train", transform)
    archive = open_dataset(write_zip(image_files), "train", transform)
    digest = sample_digest(folder, [0, 4, 7])
    assert len(digest) == 64 and digest == sample_digest(folder, [7, 0, 4])
    assert digest == sample_digest(archive, [0, 4, 7])
    assert digest != sample_digest(folder, [0, 4, 6])
    first = folder.root / folder.path(0)  # type: ignore[attr-defined]
    first.write_bytes(first.read_bytes() + b"\0")
    assert digest != sample_digest(folder, [0, 4, 7])


class Named(ImageDataset):
    """Names and labels of images that are not there."""

    def __init__(self, *images: tuple[str, int]) -> None:
        names, labels = [name for name, _ in images], [label for _, label in images]
        super().__init__(
            names, labels, ["a", "b", "c"], transform=lambda picture: picture, source=""
        )

    def raw(self, index: int) -> bytes:
        raise AssertionError("opened")


def test_digest_of_names_tells_other_labels_other_borders_and_another_order() -> None:
    first = Named(("ab", 0), ("c", 1)).all_names_digest
    others = [
        Named(("ab", 0), ("c", 2)),
        Named(("a", 0), ("bc", 1)),
        Named(("ab", 0)),
        Named(("c", 1), ("ab", 0)),
    ]
    assert first == Named(("ab", 0), ("c", 1)).all_names_digest
    assert all(other.all_names_digest != first for other in others)
    assert others[3].names_digest([1, 0]) == first


def test_names_are_digested_once_whatever_the_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Named(("ab", 0), ("c", 1))
    found = dataset.all_names_digest
    monkeypatch.setattr(Named, "path", None)
    assert dataset.all_names_digest == found
    assert dataset.with_transform(lambda picture: picture).all_names_digest == found

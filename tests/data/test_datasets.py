"""The embedded digits, fake images, and paths at which there is nothing."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from swinq.data.datasets import open_dataset
from swinq.data.transforms import EvalTransform, eval_transform
from swinq.errors import ConfigError, DataError


def test_digits_are_split_by_class_without_overlap() -> None:
    transform = eval_transform("squash", 32)
    train = open_dataset("digits", "train", transform, num_classes=10)
    val = open_dataset("digits", "val", transform, num_classes=10)
    assert (len(train), len(val)) == (1442, 355) and not val.synthetic
    assert not {n.rpartition("_")[2] for n in train.names} & {
        n.rpartition("_")[2] for n in val.names
    }
    held_out = np.bincount(val.labels) / np.bincount(np.concatenate([train.labels, val.labels]))
    assert held_out.min() > 0.19 and held_out.max() < 0.21
    pixels, label = val[0]
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
    assert val.path(0).startswith(f"val/{label}/")


def test_digits_are_scikit_learns_scans() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    val = open_dataset("digits", "val", eval_transform("squash", 32))
    for index in (0, 100, 354):
        number = int(val.path(index).rpartition("_")[2])
        assert digits.target[number] == val.labels[index]
        scan = np.asarray(val.image(index))[:, :, 0].astype(float) * 16 / 255
        np.testing.assert_allclose(scan, digits.images[number], atol=0.04)
    assert len(val.raw(0)) == 8 * 8 * 3


def test_fake_images_are_seeded_and_say_that_they_are_fake(transform: EvalTransform) -> None:
    first = open_dataset("fake:12", "train", transform, num_classes=5)
    again = open_dataset("fake:12", "train", transform, num_classes=5)
    other = open_dataset("fake:12", "val", transform, num_classes=5)
    assert len(first) == 12 and first.synthetic and "FAKE" in first.description
    assert first.labels.tolist() == again.labels.tolist() and set(first.labels) <= set(range(5))
    images = [dataset[i][0].numpy().tobytes() for dataset in (first, other) for i in range(12)]
    assert [first[i][0].numpy().tobytes() for i in range(12)] == images[:12]
    assert [again[i][0].numpy().tobytes() for i in range(12)] == images[:12]
    assert max(Counter(images).values()) == 1
    assert len(open_dataset("fake", "val", transform)) == 256
    assert len(list(first)) == 12  # iteration ends by itself


@pytest.mark.parametrize("path", ["fake:0", "fake:99999999999"])
def test_fake_data_sets_of_no_or_endless_size_are_refused(
    path: str, transform: EvalTransform
) -> None:
    with pytest.raises(DataError, match="want 1 to"):
        open_dataset(path, "val", transform)


def test_digits_for_another_number_of_classes_are_refused(transform: EvalTransform) -> None:
    with pytest.raises(DataError, match=r"10 classes.*1,000"):
        open_dataset("digits", "val", transform, num_classes=1000)


def test_a_folder_called_digits_can_be_named(
    tmp_path: Path, transform: EvalTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    with pytest.raises(DataError, match="no folder val"):
        open_dataset("./digits", "val", transform)


@pytest.mark.parametrize("path", ["", "/nowhere/at/all", "a\0b", "x" * 5000, "fake:many"])
def test_a_path_that_does_not_exist_is_named(path: str, transform: EvalTransform) -> None:
    with pytest.raises(DataError, match="data path") as caught:
        open_dataset(path, "val", transform)
    assert "fix: " in str(caught.value)


def test_the_nearest_name_is_offered(tmp_path: Path, transform: EvalTransform) -> None:
    (tmp_path / "imagenet").mkdir()
    with pytest.raises(DataError, match=f"did you mean {tmp_path}/imagenet"):
        open_dataset(tmp_path / "imagnet" / "ILSVRC", "val", transform)


def test_a_file_that_is_no_zip_is_named(tmp_path: Path, transform: EvalTransform) -> None:
    (tmp_path / "val.tar").write_bytes(b"tar")
    with pytest.raises(DataError, match=r"val\.tar is a file, but no zip"):
        open_dataset(tmp_path / "val.tar", "val", transform)


def test_unknown_splits_are_refused(transform: EvalTransform) -> None:
    with pytest.raises(ConfigError, match="test"):
        open_dataset("digits", "test", transform)

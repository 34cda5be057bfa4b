"""Folders of images: labels by sorted name, and every way to lay them out wrongly is named."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from swinq.data.datasets import open_dataset
from swinq.data.transforms import EvalTransform
from swinq.errors import DataError

Write = Callable[[Mapping[str, bytes]], Path]


def test_labels_are_places_of_the_sorted_class_names(
    image_files: dict[str, bytes], write_folder: Write, transform: EvalTransform
) -> None:
    data = open_dataset(write_folder(image_files), "train", transform, num_classes=3)
    assert data.classes == ["ant", "bee", "cat"] and len(data) == 9
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.path(3) == "train/bee/bee_0.png"
    pixels, label = data[3]
    assert pixels.shape == (3, 8, 8) and label == 1
    assert "9 images, 3 classes" in data.description and data.labelled and not data.synthetic


def test_images_labels_and_order_are_those_of_torchvisions_imagefolder(
    image_files: dict[str, bytes], write_folder: Write, transform: EvalTransform
) -> None:
    root = write_folder(image_files)
    ours, theirs = open_dataset(root, "val", transform), ImageFolder(str(root / "val"), transform)
    assert ours.classes == theirs.classes and len(ours) == len(theirs)
    for (pixels, label), (their_pixels, their_label) in zip(ours, theirs, strict=True):
        assert label == their_label
        np.testing.assert_array_equal(pixels.numpy(), their_pixels.numpy())


def test_droppings_of_the_system_are_not_images(
    image_files: dict[str, bytes], write_folder: Write, transform: EvalTransform
) -> None:
    droppings = {
        "val/ant/._ant_0.png": b"mac",
        "val/.DS_Store": b"",
        "val/.cache/x.png": b"",
        "val/bee/.thumbs/x.png": b"",
        "val/ant/Thumbs.db": b"",
        "val/list.txt": b"",
    }
    data = open_dataset(write_folder({**image_files, **droppings}), "val", transform)
    assert len(data) == 6 and data.classes == ["ant", "bee", "cat"]


def test_sub_folders_and_links_of_a_class_belong_to_it(
    image_files: dict[str, bytes], write_folder: Write, transform: EvalTransform
) -> None:
    root = write_folder({**image_files, "val/ant/more/a.png": image_files["val/ant/ant_0.png"]})
    elsewhere = root.parent / "elsewhere"
    (root / "val/cat").rename(elsewhere)
    (root / "val/cat").symlink_to(elsewhere)
    (root / "val/ant/more/up").symlink_to(root / "val/ant")  # a loop
    data = open_dataset(root, "val", transform)
    assert [name for name in data.names if "ant" in name][-1] == "val/ant/more/a.png"
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_a_flat_folder_has_images_without_labels(
    image_files: dict[str, bytes], write_folder: Write, transform: EvalTransform
) -> None:
    flat = {name.rpartition("/")[2]: data for name, data in image_files.items()}
    data = open_dataset(write_folder({**flat, "readme.txt": b""}), "train", transform)
    assert len(data) == 9 and not data.labelled and data.classes == []
    assert data[0][1] == -1 and data.path(0) == "ant_0.png"
    assert "no labels" in data.description


def failure(root: Path, transform: EvalTransform, split: str = "val", **options: object) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(root, split, transform, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert len(message.splitlines()) <= 10 and "fix: " in message
    return message


def test_a_class_count_that_contradicts_the_model_names_both(
    image_files: dict[str, bytes], write_folder: Write, transform: EvalTransform
) -> None:
    message = failure(write_folder(image_files), transform, num_classes=1000)
    assert "3 classes" in message and "1,000" in message and "ant, bee, cat" in message


def test_a_missing_split_says_what_is_there(
    image_files: dict[str, bytes], write_folder: Write, transform: EvalTransform
) -> None:
    root = write_folder(image_files)
    (root / "val").rename(root / "validation")
    message = failure(root, transform)
    assert "no folder val" in message and "train, validation" in message
    assert f"rename {root / 'validation'} to val" in message


def test_the_split_itself_given_as_data_path_is_pointed_out(
    image_files: dict[str, bytes], write_folder: Write, transform: EvalTransform
) -> None:
    root = write_folder(image_files)
    assert f"give the folder above it: {root}" in failure(root / "val", transform)


def test_a_loose_picture_beside_a_split_is_not_taken_for_a_flat_data_set(
    image_files: dict[str, bytes], write_folder: Write, transform: EvalTransform
) -> None:
    files = {name: data for name, data in image_files.items() if name.startswith("val")}
    root = write_folder({**files, "preview.png": image_files["val/ant/ant_0.png"]})
    assert "no folder train" in failure(root, transform, "train")


def test_an_empty_folder_says_so(write_folder: Write, transform: EvalTransform) -> None:
    assert "it is empty" in failure(write_folder({}), transform)


def test_an_empty_split_says_so(write_folder: Write, transform: EvalTransform) -> None:
    root = write_folder({})
    (root / "val").mkdir()
    assert "no class folders and is empty" in failure(root, transform)


def test_images_that_are_not_sorted_into_classes_are_named(
    image_files: dict[str, bytes], write_folder: Write, transform: EvalTransform
) -> None:
    root = write_folder({"val/a.png": image_files["val/ant/ant_0.png"]})
    assert "only files (a.png)" in failure(root, transform)


def test_class_folders_without_images_are_listed(
    image_files: dict[str, bytes], write_folder: Write, transform: EvalTransform
) -> None:
    root = write_folder(image_files)
    for name in ("val", "train"):
        for i in range(7):
            (root / name / f"empty{i}").mkdir()
    message = failure(root, transform)
    assert "7 class folders" in message and "empty4 and 2 more" in message


def test_splits_with_different_classes_are_refused(
    image_files: dict[str, bytes], write_folder: Write, transform: EvalTransform
) -> None:
    files = {k: v for k, v in image_files.items() if not k.startswith("val/ant")}
    message = failure(write_folder(files), transform)  # bee would get ant's label
    assert "ant" in message and "train/" in message and "val/" in message


@pytest.mark.parametrize("place", ["", "val", "val/bee"])
def test_a_folder_that_may_not_be_listed_is_named(
    image_files: dict[str, bytes],
    write_folder: Write,
    transform: EvalTransform,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    root = write_folder(image_files)
    if not place:
        shutil.rmtree(root / "val")
    refuse_to_list(root / place, monkeypatch)
    message = failure(root, transform)
    assert f"{root / place} cannot be listed: Permission denied" in message


def refuse_to_list(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As chmod 0, which does not stop the superuser that tests may run as."""
    for name in ("listdir", "scandir"):
        real = getattr(os, name)

        def guarded(path: object = ".", real: Callable[[object], object] = real) -> object:
            if Path(str(path)) == place:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        monkeypatch.setattr(os, name, guarded)

"""What every data set of images has in common: names, labels, classes, pixels, transform."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from swinq.data.images import UnreadableImageError, decode, listed, shown
from swinq.errors import DataError

Transform = Callable[[Image.Image], Tensor]
UNLABELLED = -1


class ImageDataset(Dataset[tuple[Tensor, int]], ABC):
    """Images in a fixed order: `dataset[i]` is (float32 (3, S, S), label).

    Every process may hold a copy: nothing here is an open file, and copies made by fork or by
    pickling read the same images.

    Attributes:
        classes: names in label order; empty where the images have no labels.
        transform: RGB picture -> float32 (3, S, S).
        description: one line for people: where the images come from and how many there are.
        synthetic: whether the images are made up, so that scores on them mean nothing.
    """

    synthetic = False

    def __init__(
        self,
        names: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        classes: Sequence[str],
        transform: Transform,
        source: str,
    ) -> None:
        self.names = list(names)
        self.labels = np.asarray(labels, dtype=np.int64)  # (n,)
        self.classes = list(classes)
        self.transform = transform
        kinds = f"{len(self.classes)} classes" if self.classes else "no labels"
        self.description = f"{source}: {len(self.names):,} images, {kinds}"

    @property
    def labelled(self) -> bool:
        """Whether the images have labels; those without serve for calibration only."""
        return bool(self.classes)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        """A name of image `index` that is the same on every machine and in every container."""
        return self.names[index]

    def names_digest(self, indices: Iterable[int]) -> str:
        """SHA-256 over names and labels of some images, in their order.

        Says which images were meant, not what they look like: no file is opened.
        """
        digest = hashlib.sha256()
        for index in indices:
            name = self.path(index).encode("utf-8", "surrogateescape")
            label = int(self.labels[index]).to_bytes(8, "little", signed=True)
            digest.update(len(name).to_bytes(8, "little") + name + label)
        return digest.hexdigest()

    @cached_property
    def all_names_digest(self) -> str:
        """`names_digest` of all images: a second for a million, so it is computed once."""
        return self.names_digest(range(len(self)))

    def with_transform(self, transform: Transform) -> ImageDataset:
        """The same images under another transform, without looking for them again."""
        other = copy.copy(self)
        other.transform = transform
        return other

    @abstractmethod
    def raw(self, index: int) -> bytes:
        """The stored bytes of image `index`: an encoded file, or pixels where there is no file.

        Raises:
            UnreadableImageError: the bytes cannot be read.
        """

    def image(self, index: int) -> Image.Image:
        """Image `index` as an RGB picture.

        Raises:
            UnreadableImageError: it cannot be read or decoded.
        """
        return decode(self.raw(index), self.path(index))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = self.image(index)
        try:
            pixels = self.transform(picture)  # float32 (3, S, S)
        except DataError as error:
            raise UnreadableImageError(self.path(index), error.problem) from error
        return pixels, int(self.labels[index])

    def preload(self, indices: Iterable[int]) -> None:
        """Keeps the stored bytes of these images in memory, where the data set was asked to.

        Data sets that have nothing to keep do nothing.
        """


class PixelDataset(ImageDataset):
    """Images whose pixels are in memory or computed, not decoded from files."""

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Image `index` as an RGB picture."""

    def raw(self, index: int) -> bytes:
        """The RGB pixels, row by row, uint8 (H, W, 3)."""
        return self.image(index).tobytes()


def check_classes(found: Sequence[str], num_classes: int | None, place: str) -> None:
    """Refuses a data set whose class count contradicts the model's.

    Raises:
        DataError: naming both counts.
    """
    if num_classes is None or len(found) == num_classes:
        return
    raise DataError(
        f"{place} holds {len(found):,} classes ({listed(found)}), "
        f"but the model has {num_classes:,}",
        "use the data the model was trained for, or a checkpoint for these classes",
    )


def check_class_order(found: Sequence[str], recorded: Sequence[str] | None, place: str) -> None:
    """Refuses classes that a model knows under other numbers: its logits would be misread.

    Names that it does not know say nothing: a file may have words where folders have numbers.

    Raises:
        DataError: names the first such class.
    """
    recorded = recorded or []
    known = {name: number for number, name in enumerate(recorded)}
    for number, name in enumerate(found):
        if name in known and (number >= len(recorded) or recorded[number] != name):
            raise DataError(
                f"class {shown(name)} is number {number} in {place}, and number {known[name]} in "
                "the checkpoint",
                "numbers follow from the sorted names of all classes: rename folders, or give a "
                "checkpoint whose classes are in that order",
            )


def check_same_classes(split: str, here: Sequence[str], other: str, there: Sequence[str]) -> None:
    """Refuses splits with different class folders: sorted names would give different labels.

    Raises:
        DataError: naming the classes that only one of them has.
    """
    for name, ours, theirs in ((split, here, there), (other, there, here)):
        extra = sorted(set(ours) - set(theirs))
        if extra:
            missing = other if name == split else split
            raise DataError(
                f"{name}/ has {len(extra)} class folders that {missing}/ has not: {listed(extra)}; "
                "labels are the positions of the sorted names, so they would not agree",
                f"give {missing}/ the same class folders as {name}/",
            )


def class_rows(members: Iterable[tuple[str, str]]) -> tuple[list[str], list[str], list[int]]:
    """Sorts (class name, path below the class) pairs into classes, names and labels.

    Returns:
        sorted class names; "class/path" of each image, class by class; the label of each.
    """
    ordered = sorted(members)
    classes = sorted({name for name, _ in ordered})
    label_of = {name: label for label, name in enumerate(classes)}
    return (
        classes,
        [f"{name}/{below}" for name, below in ordered],
        [label_of[name] for name, _ in ordered],
    )


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, sorted, fit to be shown."""
    return sorted(shown(name) for name, times in Counter(names).items() if times > 1)

"""Images in folders: {train,val}/<class>/<image>, or a flat folder without labels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from swinq.data.dataset import (
    UNLABELLED,
    ImageDataset,
    Transform,
    check_classes,
    check_same_classes,
    class_rows,
)
from swinq.data.images import (
    MAX_ENCODED_BYTES,
    UnreadableImageError,
    is_image_name,
    listed,
)
from swinq.errors import DataError

SPLITS = ("train", "val")


class FolderDataset(ImageDataset):
    """Image files below a folder, one file an image."""

    def __init__(
        self,
        root: Path,
        names: list[str],
        labels: list[int],
        classes: list[str],
        transform: Transform,
        source: str,
    ) -> None:
        super().__init__(names, labels, classes, transform, source)
        self.root = root

    def raw(self, index: int) -> bytes:
        """The file's bytes."""
        try:
            with open(self.root / self.names[index], "rb") as file:
                data = file.read(MAX_ENCODED_BYTES + 1)
        except OSError as error:
            raise UnreadableImageError(self.path(index), error.strerror or str(error)) from error
        if len(data) > MAX_ENCODED_BYTES:
            raise UnreadableImageError(self.path(index), f"larger than {MAX_ENCODED_BYTES:,} bytes")
        return data


def open_class_folders(
    root: Path, split: str, transform: Transform, num_classes: int | None
) -> FolderDataset:
    """`root/split/<class>/**/<image>`; the label is the class's place among the sorted names.

    Raises:
        DataError: no images, a class without images, classes that differ from the other split's,
            or a class count other than `num_classes`.
    """
    place = root / split
    found = _class_folders(place)
    if not found:
        loose = f", only files ({listed(_names(place))})" if _names(place) else " and is empty"
        raise DataError(
            f"{place} has no class folders{loose}",
            f"sort the images into {place}/<class>/<image>",
        )
    for other in SPLITS:
        if other != split and (there := _class_folders(root / other)):
            check_same_classes(split, found, other, there)
    check_classes(found, num_classes, str(place))
    members = [(name, below) for name in found for below in _images_below(place / name)]
    empty = sorted(set(found) - {name for name, _ in members})
    if empty:
        raise DataError(
            f"{len(empty)} class folders of {place} hold no images: {listed(empty)}",
            "fill or delete these folders; deleting one shifts the labels of those after it",
        )
    classes, names, labels = class_rows(members)
    return FolderDataset(
        root, [f"{split}/{name}" for name in names], labels, classes, transform, str(place)
    )


def open_flat_folder(root: Path, transform: Transform) -> FolderDataset | None:
    """Images directly in `root`, without labels; None if there are none."""
    names = [name for name in _names(root) if is_image_name(name) and (root / name).is_file()]
    if not names:
        return None
    return FolderDataset(root, names, [UNLABELLED] * len(names), [], transform, str(root))


def missing_split(root: Path, split: str) -> DataError:
    """What to say of a folder that holds neither the split nor loose images."""
    inside = _names(root)
    held = f"it holds {listed(inside)}" if inside else "it is empty"
    fix = f"want {root}/{split}/<class>/<image>, {split}.zip with {split}_map.txt, or loose images"
    if root.name in SPLITS:
        fix = f"give the folder above it: {root.parent}"
    elif alike := [name for name in inside if name.lower().startswith(split)]:
        fix = f"rename {root / alike[0]} to {split}, or link it"
    return DataError(f"{root} has no folder {split}; {held}", fix)


def _names(folder: Path) -> list[str]:
    """Sorted names in a folder, hidden ones left out; none if there is no such folder.

    Raises:
        DataError: the folder may not be listed.
    """
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(
            f"{folder} cannot be listed: {error.strerror or error}", "check its permissions"
        ) from error


def _class_folders(place: Path) -> list[str]:
    return [name for name in _names(place) if (place / name).is_dir()]


def _images_below(folder: Path) -> Iterator[str]:
    """Images in `folder` and its sub-folders as relative names with forward slashes."""
    seen: set[tuple[int, int]] = set()

    def fail(error: OSError) -> None:
        raise DataError(
            f"{error.filename} cannot be listed: {error.strerror or error}",
            "check its permissions",
        ) from error

    for place, below, files in os.walk(folder, followlinks=True, onerror=fail):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back up
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below[:] = [name for name in below if not name.startswith(".")]
        relative = Path(place).relative_to(folder).as_posix()
        for name in files:
            if is_image_name(name):
                yield name if relative == "." else f"{relative}/{name}"

"""Opens whatever `--data-path` names as a data set of labelled images."""

from __future__ import annotations

import difflib
import os
import zipfile
from pathlib import Path

from swinq.data.archive import CACHE_MODES, open_class_zip, open_mapped_zip
from swinq.data.dataset import ImageDataset, Transform
from swinq.data.digits import DigitsDataset
from swinq.data.fake import COUNT, FakeDataset
from swinq.data.folder import SPLITS, missing_split, open_class_folders, open_flat_folder
from swinq.errors import ConfigError, DataError

__all__ = ["CACHE_MODES", "SPLITS", "ImageDataset", "open_dataset"]


def open_dataset(
    data_path: str | os.PathLike[str],
    split: str,
    transform: Transform,
    *,
    zip_mode: bool = False,
    cache_mode: str = "part",
    num_classes: int | None = None,
) -> ImageDataset:
    """Opens a split of a data set, recognised by what lies at the path.

    Args:
        data_path: a folder with {train,val}/<class>/<image>; a folder with {split}.zip and
            {split}_map.txt; a zip with {train,val}/<class>/<image>; a flat folder of images without
            labels (calibration only, labels -1); "digits", the embedded demo; "fake" or "fake:N",
            N random images. A folder that is called digits is ./digits.
        split: "train" or "val".
        transform: RGB picture -> float32 (3, S, S).
        zip_mode: take {split}.zip and {split}_map.txt even where there are folders too.
        cache_mode: which images of a zip are kept in memory: "no", "part" (this rank's share of
            those that are used), "full". Files in folders are left to the system's own cache.
        num_classes: the model's; a data set that contradicts it is refused.

    Raises:
        ConfigError: unknown split or cache mode.
        DataError: nothing usable at the path; the message says what was found and what is wanted.
    """
    if split not in SPLITS:
        raise ConfigError(f"split '{split}' is not known", f"use {' or '.join(SPLITS)}")
    if cache_mode not in CACHE_MODES:
        raise ConfigError(
            f"cache mode '{cache_mode}' is not known", f"use one of {', '.join(CACHE_MODES)}"
        )
    if isinstance(data_path, str):
        keyword, colon, count = data_path.partition(":")
        if data_path == "digits":
            return DigitsDataset(split, transform, num_classes)
        if keyword == "fake" and (not colon or count.isdecimal()):
            return FakeDataset(split, transform, num_classes, int(count) if colon else COUNT)
    path = Path(os.path.expanduser(data_path))
    # os.path, not Path: a name that is too long or not ours to see is "not there" as well
    if not os.fspath(data_path) or not os.path.exists(path):
        raise _not_there(path, os.fspath(data_path))
    if os.path.isfile(path):
        if not zipfile.is_zipfile(path):
            raise DataError(
                f"{path} is a file, but no zip", "give a folder of images, or a zip that holds them"
            )
        return open_class_zip(path, split, transform, num_classes, cache_mode)
    folders = [name for name in SPLITS if os.path.isdir(path / name)]
    has_map = all(os.path.isfile(path / name) for name in (f"{split}.zip", f"{split}_map.txt"))
    if zip_mode or (has_map and split not in folders):
        return open_mapped_zip(path, split, transform, num_classes, cache_mode)
    if split in folders:
        return open_class_folders(path, split, transform, num_classes)
    flat = None if folders else open_flat_folder(path, transform)
    if flat is None:
        raise missing_split(path, split)
    return flat


def _not_there(path: Path, given: str) -> DataError:
    """Names the part of the path that does not exist and what is like it."""
    fix = "give --data-path a folder or zip of images, or digits for the embedded demo"
    if not given:
        return DataError("the data path is empty", fix)
    known = path.absolute()
    while not known.parent.exists():
        known = known.parent
    try:
        alike = difflib.get_close_matches(known.name, os.listdir(known.parent), n=1)
    except OSError:
        alike = []
    if alike:
        fix = f"did you mean {known.parent / alike[0]}?"
    return DataError(f"the data path {path} does not exist: there is no {known}", fix)

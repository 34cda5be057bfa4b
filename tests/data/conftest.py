"""Pictures, folders and archives made on the fly; no image file is kept in the project."""

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swinq.data.transforms import EvalTransform, eval_transform


def picture(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    """A smooth random RGB picture, so that JPEG does not change it much."""
    pixels = np.random.RandomState(seed).randint(256, size=(4, 4, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encoded(seed: int, form: str = "PNG", width: int = 20, height: int = 16) -> bytes:
    """A picture as a file's bytes."""
    file = io.BytesIO()
    picture(seed, width, height).save(file, form)
    return file.getvalue()


@pytest.fixture
def make_picture() -> Callable[..., Image.Image]:
    return picture


@pytest.fixture
def make_bytes() -> Callable[..., bytes]:
    return encoded


@pytest.fixture
def transform() -> EvalTransform:
    return eval_transform("squash", 8)


@pytest.fixture
def image_files() -> dict[str, bytes]:
    """Two splits of three classes: 3 + 3 + 3 images to train on, 2 + 2 + 2 held out."""
    files = {}
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            for i in range(count):
                seed = 100 * (split == "val") + 10 * label + i
                files[f"{split}/{name}/{name}_{i}.png"] = encoded(seed)
    return files


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[[Mapping[str, bytes]], Path]:
    """Writes files below a fresh folder."""

    def write(files: Mapping[str, bytes]) -> Path:
        root = tmp_path / "images"
        root.mkdir()
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        return root

    return write


@pytest.fixture
def write_zip(tmp_path: Path) -> Callable[..., Path]:
    """Writes files into an archive."""

    def write(
        files: Mapping[str, bytes], name: str = "images.zip", method: int = zipfile.ZIP_STORED
    ) -> Path:
        path = tmp_path / name
        with zipfile.ZipFile(path, "w", method) as archive:
            for member, data in files.items():
                archive.writestr(member, data)
        return path

    return write


@pytest.fixture
def write_mapped(tmp_path: Path, write_zip: Callable[..., Path]) -> Callable[..., Path]:
    """Writes {split}.zip with {split}_map.txt and returns the folder of both."""

    def write(files: Mapping[str, bytes], lines: list[str], split: str = "val") -> Path:
        write_zip(files, f"{split}.zip")
        (tmp_path / f"{split}_map.txt").write_text("".join(line + "\n" for line in lines))
        return tmp_path

    return write

"""Runs the command line in this process, as a user would, and keeps what it said."""

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from swinq import cli
from swinq.data.digits import DigitsDataset
from swinq.demo.checkpoint import CHECKPOINT

# Calibration of a few digits, judged on a few, without layers and TensorBoard: half a second.
FEW = tuple(
    "--num-calib-batch 1 --calib-batchsz 6 --eval-images 20 --batch-size 20 --sensitivity-images 0 "
    "--opts REPORT.TENSORBOARD false".split()
)


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    code: int
    out: str
    err: str

    def row(self, model: str) -> list[str]:
        """Cells of a model's line in the printed table, after its name."""
        lines = [line for line in self.out.splitlines() if line.startswith(f"{model}  ")]
        assert len(lines) == 1, f"{len(lines)} lines for {model}:\n{self.out}"
        return lines[0].removeprefix(model).split()


def swinq(*argv: object) -> Ran:
    """Run a command whose outcome is open."""
    out, err = io.StringIO(), io.StringIO()
    words = [str(word) for word in argv]
    typed = mock.patch.object(sys, "argv", ["swinq/main.py", *words])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), typed:
        code = cli.main(words)
    return Ran(code, out.getvalue(), err.getvalue())


def done(*argv: object) -> Ran:
    """Run a command that must succeed."""
    ran = swinq(*argv)
    assert ran.code == 0, ran.err
    return ran


def refused(*argv: object) -> str:
    """Run a command that must be refused; returns the short message: what is wrong, what to do."""
    ran = swinq(*argv)
    assert ran.code == 2, ran.out + ran.err
    assert "Traceback" not in ran.out + ran.err
    message = ran.err.partition("error: ")[2]
    assert "\n  fix: " in message
    assert len(message.splitlines()) <= 10
    return message


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def changed_micro_swin(path: Path, changes: dict[str, Tensor]) -> Path:
    """The demo's checkpoint with some tensors replaced."""
    tensors = tensors_of(CHECKPOINT)
    assert changes.keys() <= tensors.keys()
    save_file(tensors | changes, path, metadata_of(CHECKPOINT))
    return path


def write_digits(
    folder: Path, *, splits: tuple[str, ...] = ("train", "val"), classes: int = 10
) -> Path:
    """Digits as PNG files, two of each class: folder/split/class/number.png."""
    for split in splits:
        digits = DigitsDataset(split, transform=lambda picture: picture)
        for label in range(classes):
            place = folder / split / str(label)
            place.mkdir(parents=True)
            for index in [i for i in range(len(digits)) if digits.labels[i] == label][:2]:
                digits.image(index).save(place / f"{index}.png")
    return folder


def write_flat(folder: Path, count: int = 8) -> Path:
    """Digits as PNG files without labels: folder/number.png."""
    folder.mkdir(parents=True)
    digits = DigitsDataset("train", transform=lambda picture: picture)
    for index in range(count):
        picture: Image.Image = digits.image(index)
        picture.save(folder / f"{index}.png")
    return folder

"""A stand-in for libswinq, built with the C compiler, and the engine on the CPU in front of it."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from swinq.int8 import device as devices
from swinq.int8 import engine
from swinq.int8.library import VARIABLE, library

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("fake_library.c")


def compiled(source: Path, made: Path, *flags: str) -> Path:
    """Compile C against swinq.h; the test is skipped where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    command = [compiler, "-O1", f"-I{ROOT / 'csrc' / 'include'}", *flags, str(source)]
    subprocess.run([*command, "-o", str(made), "-lm"], check=True, timeout=60)
    return made


def built(folder: Path, *flags: str) -> Path:
    """The fake library in a folder."""
    return compiled(SOURCE, folder / "libfake.so", "-shared", "-fPIC", *flags)


def use(path: Path, patch: pytest.MonkeyPatch) -> None:
    """Let the engine take the fake library, and the CPU for its GPU."""
    patch.setenv(VARIABLE, str(path))
    patch.setattr(devices, "require", lambda device: torch.device("cpu"))
    patch.setattr(engine, "Graph", EagerGraph)


def live_plans() -> int:
    """Plans of the fake library that were made and not yet destroyed."""
    return int(ctypes.CDLL(str(library().path)).fake_live_plans())


class EagerGraph:
    """In place of a CUDA graph: calls the forward."""

    def __init__(self, images: torch.Tensor, forward: object) -> None:
        self.images, self.forward = images, forward

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.images.copy_(images)
        logits: torch.Tensor = self.forward()  # type: ignore[operator]
        return logits

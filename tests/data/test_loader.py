"""Batches: the given ones, in order, with any workers; unreadable images stop the work by name."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from swinq.data import loader
from swinq.data.dataset import ImageDataset
from swinq.data.datasets import open_dataset
from swinq.data.loader import BatchLoader
from swinq.data.transforms import EvalTransform
from swinq.errors import ConfigError, DataError

WriteFolder = Callable[[Mapping[str, bytes]], Path]


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of Python 3.12 and later
def test_workers_give_the_same_batches_as_no_workers(
    image_files: dict[str, bytes],
    write_zip: Callable[..., Path],
    transform: EvalTransform,
    start_method: str,
) -> None:
    data = open_dataset(write_zip(image_files), "train", transform)
    data[0]  # the archive is open before the workers start
    batches = [[0, 8], range(3, 6), [7]]
    alone = list(BatchLoader(data, batches))
    helped = BatchLoader(data, batches, num_workers=2, start_method=start_method)
    assert len(helped) == 3
    for ours, theirs, wanted in zip(alone, helped, batches, strict=True):
        assert ours.indices.tolist() == theirs.indices.tolist() == list(wanted)
        assert torch.equal(ours.labels, theirs.labels) and len(ours) == len(wanted)
        assert torch.equal(ours.images, theirs.images)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_unreadable_images_are_all_named_and_none_is_replaced(
    image_files: dict[str, bytes],
    write_folder: WriteFolder,
    transform: EvalTransform,
    num_workers: int,
) -> None:
    names = sorted(name for name in image_files if name.startswith("train"))
    for name, data in zip(names[2:], (b"", b"<html>", image_files[names[0]][:100]), strict=False):
        image_files[name] = data
    data = open_dataset(write_folder(image_files), "train", transform)
    seen = []
    with pytest.raises(DataError) as caught:
        for batch in BatchLoader(data, [[0, 1], [2, 3], [4, 5], [6, 7]], num_workers=num_workers):
            seen += batch.indices.tolist()
    assert seen == [0, 1]
    message = str(caught.value)
    assert "3 of the 8 images" in message and all(name in message for name in names[2:5])
    assert "the file is empty" in message and "not an image in a known format" in message


def test_the_search_for_more_unreadable_images_is_bounded(
    image_files: dict[str, bytes],
    write_folder: WriteFolder,
    transform: EvalTransform,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader, "LOOK_AHEAD", 2)
    broken = {name: b"" for name in image_files if name.startswith("train")}
    data = open_dataset(write_folder({**image_files, **broken}), "train", transform)
    with pytest.raises(DataError, match="3 of the 3 images"):
        list(BatchLoader(data, [[i] for i in range(9)]))


def test_files_that_vanish_after_the_listing_are_named(
    image_files: dict[str, bytes], write_folder: WriteFolder, transform: EvalTransform
) -> None:
    root = write_folder(image_files)
    data = open_dataset(root, "val", transform)
    (root / data.path(1)).unlink()
    with pytest.raises(DataError, match=f"{data.path(1)}: No such file"):
        list(BatchLoader(data, [range(6)]))


class _Deadly(ImageDataset):
    """Kills the process that reads it, as the system does when memory runs out."""

    def raw(self, index: int) -> bytes:
        os._exit(9)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_worker_that_is_killed_is_explained(transform: EvalTransform) -> None:
    data = _Deadly(["a"], [0], ["one"], transform, "deadly")
    with pytest.raises(DataError, match="data worker died") as caught:
        list(BatchLoader(data, [[0]], num_workers=1))
    assert "/dev/shm" in str(caught.value)


HOLDS_WORKERS = """
import itertools, multiprocessing, subprocess, sys
from swinq.data.datasets import open_dataset
from swinq.data.loader import BatchLoader
from swinq.data.transforms import eval_transform

data = open_dataset("fake:8", "val", eval_transform("squash", 8))
held = iter(BatchLoader(data, [[0]] * 9, num_workers=1))
next(held)
(worker,) = multiprocessing.active_children()
subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
assert len(list(itertools.islice(held, 7))) == 7  # it goes on: that was not its parent
print("ending")
sys.exit(3)
"""


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="macOS cannot tell who sent SIGTERM")
def test_workers_outlive_a_strangers_sigterm_but_not_their_parent(repo_root: Path) -> None:
    """An error may hold an iterator until the process ends; its workers may not hold that up."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HOLDS_WORKERS],
        cwd=repo_root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (3, "ending\n"), ran.stderr


class _Faulty(ImageDataset):
    def raw(self, index: int) -> bytes:
        raise RuntimeError("a programming mistake")


def test_other_failures_are_not_disguised(transform: EvalTransform) -> None:
    data = _Faulty(["a"], [0], ["one"], transform, "faulty")
    with pytest.raises(RuntimeError, match="a programming mistake"):
        list(BatchLoader(data, [[0]]))


def test_a_picture_the_transform_refuses_is_named(
    image_files: dict[str, bytes],
    make_bytes: Callable[..., bytes],
    write_folder: WriteFolder,
) -> None:
    image_files["val/ant/ant_0.png"] = make_bytes(0, "PNG", 30_000, 1)
    transform = EvalTransform(resize=256, crop=8, name="crop")
    data = open_dataset(write_folder(image_files), "val", transform)
    with pytest.raises(DataError, match=r"val/ant/ant_0.png: 30000x1 pixels"):
        list(BatchLoader(data, [range(6)]))


def test_fewer_than_no_workers_are_refused(transform: EvalTransform) -> None:
    with pytest.raises(ConfigError):
        BatchLoader(open_dataset("fake:2", "val", transform), [[0]], num_workers=-1)

"""Decodes batches, in worker processes if wanted, and names every image that cannot be read."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from swinq.data.images import UnreadableImageError, unreadable
from swinq.errors import ConfigError, DataError

# After the first unreadable image this many more are tried, so that one run names most of them
LOOK_AHEAD = 512

_Loaded = tuple[int, Tensor | None, int, str]  # index, pixels, label, why there are no pixels
_Collated = tuple[Tensor, Tensor, Tensor, list[tuple[int, str]]]


class Images(Protocol):
    """What a loader asks of a data set: an ImageDataset, or one that is indexed by other keys."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...

    def path(self, index: int) -> str:
        """The name to call an image in an error."""

    def preload(self, indices: Iterable[int]) -> None:
        """Hears once which images will be asked for."""


class Batches(Protocol):
    """The indices of each batch; they may be made only when they are asked for."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence[int]]: ...


@dataclass(frozen=True)
class Batch:
    """Images of one batch."""

    images: Tensor  # (n, 3, S, S) float32
    labels: Tensor  # (n,) int64
    indices: Tensor  # (n,) int64, in the data set

    def __len__(self) -> int:
        return len(self.indices)


class BatchLoader:
    """Iterates over given batches of a data set, in their order.

    Args:
        dataset: where the images come from.
        batches: the indices of each batch.
        num_workers: processes that decode; 0 decodes in this one.
        pin_memory: page-locked batches, quicker to copy to a GPU.
        start_method: "fork", "spawn" or "forkserver" for the workers; None is the platform's.

    Raises:
        ConfigError: fewer than 0 workers.
        DataError (when iterated): images that cannot be read, all of those met by then; a worker
            that was killed.
    """

    def __init__(
        self,
        dataset: Images,
        batches: Batches,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        start_method: str | None = None,
    ) -> None:
        if num_workers < 0:
            raise ConfigError(f"{num_workers} data workers: want 0 or more")
        self.dataset = dataset
        self.batches = batches
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.start_method = start_method if num_workers else None

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        self.dataset.preload(index for batch in self.batches for index in batch)
        loader: DataLoader[_Loaded] = DataLoader(
            _Guarded(self.dataset),
            batch_sampler=_Lists(self.batches),  # any sized iterable will do
            collate_fn=_collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            multiprocessing_context=self.start_method,
            worker_init_fn=_leave_signals_to_parent,
            generator=torch.Generator(),  # else the global one would be drawn from
        )
        failures: list[tuple[str, str]] = []
        checked = checked_at_first = 0
        try:
            with _sigterm_blocked():  # so it is in every thread of a worker, torch's own too
                loaded = iter(loader)
            for images, labels, indices, failed in loaded:
                checked += len(indices) + len(failed)
                if failed and not failures:
                    checked_at_first = checked
                failures += [(self.dataset.path(index), reason) for index, reason in failed]
                if not failures:
                    yield Batch(images, labels, indices)
                elif checked - checked_at_first >= LOOK_AHEAD:
                    break
        except RuntimeError as error:  # torch has no class of its own for a lost worker
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"a data worker died: {str(error).splitlines()[0]}",
                "it was killed, most likely for want of memory or of room in /dev/shm: "
                "use fewer workers or a smaller batch",
            ) from error
        if failures:
            raise unreadable(failures, checked)


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """SIGTERM waits; threads and processes that are started meanwhile inherit that."""
    if not hasattr(signal, "sigwaitinfo"):  # not on macOS: nothing there would wait for it
        yield
        return
    resource_tracker.ensure_running()  # starting it, as a spawn does, would unblock SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's signals reach the whole process group; workers go on until told."""
    signal.set_wakeup_fd(-1)  # a fork shares its parent's, which would take ours for its own
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # where a server has forked it
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Obey SIGTERM from the parent alone: with it a process ends the workers that it leaves."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


class _Guarded(Dataset[_Loaded]):
    """Returns what went wrong as data: exceptions lose their fields between processes."""

    def __init__(self, dataset: Images) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> _Loaded:
        try:
            pixels, label = self.dataset[index]
        except UnreadableImageError as error:
            return index, None, 0, error.reason
        return index, pixels, label, ""


class _Lists:
    """The batches as lists of int, made one at a time."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(batch) for batch in self.batches)


def _collate(loaded: list[_Loaded]) -> _Collated:
    good = [(index, pixels, label) for index, pixels, label, _ in loaded if pixels is not None]
    failed = [(index, reason) for index, pixels, _, reason in loaded if pixels is None]
    # In a worker it stacks into shared memory at once; torch.stack's result would be copied there
    images = default_collate([pixels for _, pixels, _ in good]) if good else torch.empty(0)
    labels = torch.tensor([label for _, _, label in good], dtype=torch.int64)
    indices = torch.tensor([index for index, _, _ in good], dtype=torch.int64)
    return images, labels, indices, failed

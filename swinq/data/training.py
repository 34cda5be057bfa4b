"""The training batches of one rank, from any step to any other, bit for bit the same each time."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from torch import Tensor

from swinq.data.augment import Augmented
from swinq.data.images import UnreadableImagesError
from swinq.data.loader import BatchLoader
from swinq.data.order import StepOrder


@dataclass(frozen=True)
class TrainingBatch:
    """One micro-batch and its place in the job."""

    images: Tensor  # (B, 3, S, S) float32
    labels: Tensor  # (B,) int64
    step: int  # optimiser step, from 0 over all epochs
    number: int  # of the micro-batch in its step, over all ranks

    def __len__(self) -> int:
        return len(self.labels)


class TrainingLoader:
    """Iterates over a rank's micro-batches of every step, with one set of workers for all epochs.

    Args:
        dataset: gives augmented images by key.
        order: which keys belong to a micro-batch.
        first_step: where to begin; the step after the last one done in a resumed job.
        last_step: where to stop; this step is not done any more (the number of all steps).
        numbers: the micro-batches of each step that this rank computes, in their order.
        num_workers: processes that decode and augment; 0 does it in this one.
        pin_memory: page-locked batches, quicker to copy to a GPU.

    Raises:
        ConfigError: fewer than 0 workers.
        DataError (when iterated): images that cannot be read, all of those met by then; a worker
            that was killed.
    """

    def __init__(
        self,
        dataset: Augmented,
        order: StepOrder,
        *,
        first_step: int,
        last_step: int,
        numbers: range,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self._places = _Places(order, range(first_step, last_step), numbers)
        self._loader = BatchLoader(
            dataset, self._places, num_workers=num_workers, pin_memory=pin_memory
        )

    def __len__(self) -> int:
        """Micro-batches in all."""
        return len(self._places)

    def __iter__(self) -> Generator[TrainingBatch, None, None]:
        places = self._places.numbered()
        try:
            for batch, (step, number) in zip(self._loader, places, strict=True):
                yield TrainingBatch(batch.images, batch.labels, step, number)
        except UnreadableImagesError as error:
            raise UnreadableImagesError(
                error.problem,
                "repair these files and repeat the command; without them it would be another job",
            ) from error


class _Places:
    """The keys of micro-batch after micro-batch, made when they are asked for."""

    def __init__(self, order: StepOrder, steps: range, numbers: range) -> None:
        self.order = order
        self.steps = steps
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.steps) * len(self.numbers)

    def __iter__(self) -> Iterator[list[int]]:
        return (self.order.keys(step, number) for step, number in self.numbered())

    def numbered(self) -> Iterator[tuple[int, int]]:
        """(step, number) of each."""
        return ((step, number) for step in self.steps for number in self.numbers)

"""When a training checkpoint is due: at a fixed interval, or so that saving costs little time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from swinq import distributed

FIRST_SAVE = 100  # steps, where the interval is found by itself
SAVE_SHARE = 0.02  # of the steps' time, that saving may then take


class SavePlan:
    """The steps after which a job's state is saved; the same on all ranks.

    Args:
        interval: steps from save to save; 0 measures what a step and a save take.
        done: steps that are done when the job begins or goes on.
    """

    def __init__(self, interval: int, done: int) -> None:
        self._interval = interval
        every = interval or FIRST_SAVE
        self._next = (done // every + 1) * every
        self._from_step, self._from_s = -1, 0.0  # where the clock of the steps began

    def due(self, step: int) -> bool:
        """Whether a save is due after so many steps."""
        return step >= self._next

    def stepped(self, step: int) -> None:
        """Say that so many steps were begun; the clock starts after the first, which compiles."""
        if self._from_step < 0:
            self._from_step, self._from_s = step, time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the time is none of the steps'."""
        began = time.monotonic()
        yield
        self._from_s += time.monotonic() - began

    def saved(self, step: int, began: float) -> None:
        """Choose the next step, after a save that `began` then, on the monotonic clock."""
        ended = time.monotonic()
        if self._interval:
            self._next = (step // self._interval + 1) * self._interval
        elif step == self._from_step:  # no step was timed yet
            self._next = step + FIRST_SAVE
        else:
            per_step = max((began - self._from_s) / (step - self._from_step), 1e-6)
            wanted = math.ceil((ended - began) / (SAVE_SHARE * per_step))
            self._next = step + int(distributed.broadcast_(torch.tensor(wanted)))  # rank 0's clock
        self._from_step, self._from_s = step, ended

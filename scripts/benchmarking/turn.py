"""Whose turn it is on the GPU: processes compile side by side, but use the GPU one at a time.

While processes get ready, one that has something to run on the GPU borrows the turn for it by
locking a file that all share. To be timed, a process takes the turn: it asks for it, and gets it
when all others of its round are ready and idle, host included. It keeps it until it ends.
"""

from __future__ import annotations

import fcntl
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Turn:
    """This process's turn; by default it is always its turn."""

    def __init__(self, path: Path | None = None, ask: Callable[[], object] | None = None) -> None:
        """Share the turn.

        Args:
            path: the file that processes lock to borrow the turn.
            ask: returns when this process may have the turn to the end.
        """
        self._file = os.open(path, os.O_RDWR | os.O_CREAT) if path else None  # open to the end
        self._ask = ask
        self._held = path is None
        self.taken = False

    def take(self) -> None:
        """Wait for the turn and keep it until the process ends."""
        if self._ask is not None and not self.taken:
            _finish()
            self._ask()
        self._held = self.taken = True

    @contextmanager
    def borrow(self) -> Iterator[None]:
        """Have the turn for a moment; nothing changes if this process has it already."""
        if self._held or self._file is None:
            yield
            return
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._held = True
        try:
            yield
        finally:
            _finish()
            self._held = self.taken
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def borrowing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, called only in a borrowed turn."""

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.borrow():
                return function(*args, **kwargs)

        return inside


def _finish() -> None:
    """Wait for what this process has queued on the GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()

"""Whose turn it is on the GPU: compilations overlap, measurements never do.

Processes share one file and lock it. A process takes its turn before its first kernel that must not
share the GPU and keeps it until it ends, however it ends.
"""

from __future__ import annotations

import fcntl
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Turn:
    """This process's turn; without a file it is always its turn."""

    def __init__(self, path: Path | None = None) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT) if path else None  # open to the end
        self._taken = False

    def take(self) -> None:
        """Wait for the turn and keep it until the process ends."""
        if self._file is not None and not self._taken:
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self._taken = True

    @contextmanager
    def borrow(self) -> Iterator[None]:
        """Have the turn for a moment; nothing changes if it is taken already."""
        if self._taken or self._file is None:
            yield
            return
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if not self._taken:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def borrowing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, called only in a borrowed turn."""

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.borrow():
                return function(*args, **kwargs)

        return inside

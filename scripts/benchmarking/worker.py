"""The process of a task, as the program that starts it sees it: it gets ready, then has a turn."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarking.cases import Task
from benchmarking.peers import one_thread_compiles
from benchmarking.records import Key, key
from benchmarking.task import LONGEST_ERROR, MARK, READY

STOPPED = "it ran out of time"

Add = Callable[[dict[str, Any]], None]


class Worker:
    """A running task.

    Attributes:
        seen: keys of the rows that it has said.
        stopped: whether it was ended for taking too long.
    """

    def __init__(self, task: Task, command: Sequence[str], turn: Path, say: Add) -> None:
        """Start the process.

        Args:
            command: starts a process that takes `--task JSON --turn FILE`.
            say: gets each row.
        """
        self.task = task
        self.seen: set[Key] = set()
        self.stopped = False
        self._say = say
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [*command, "--task", json.dumps(asdict(task)), "--turn", str(turn)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=one_thread_compiles(),
        )

    def get_ready(self, seconds: float) -> None:
        """Wait until it waits for its turn or has ended."""
        self._hear(seconds)

    def have_turn(self, seconds: float) -> None:
        """Let it have the GPU until it has ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it may have died while it waited
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        self._hear(seconds)

    def missing(self) -> list[Key]:
        """Keys of the rows that it has not said."""
        return [row for row in self.task.rows() if row not in self.seen]

    def failure(self) -> str:
        """Why rows are missing, once it has ended."""
        if self.stopped:
            return STOPPED
        self._errors.seek(0)
        tail = self._errors.read()[-LONGEST_ERROR:].strip()
        return f"the process ended with code {self._process.wait()}: {tail}"

    def end(self) -> None:
        """End it if it still runs."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._errors.close()

    def _hear(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self._stop)
        timer.start()
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                if line.startswith(READY):
                    return
                if line.startswith(MARK):
                    row = json.loads(line.removeprefix(MARK))
                    self.seen.add(key(row))
                    self._say(row)
            self._process.wait()
        finally:
            timer.cancel()

    def _stop(self) -> None:
        self.stopped = True
        self._process.kill()

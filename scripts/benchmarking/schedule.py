"""Runs tasks, a process each: they compile side by side; one that crashes or hangs ends alone."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarking.cases import FORMS, TUNED, Task
from benchmarking.peers import one_thread_compiles
from benchmarking.records import Key, key
from benchmarking.task import LONGEST_ERROR, MARK

TASK_LIMIT_S = 240.0
TUNED_LIMIT_S = 540.0
QUICK_JOBS = 2
SHORTEST_S = 45.0  # a task is not started with less time left
STOPPED = "it ran out of time"

Add = Callable[[dict[str, Any]], None]


def run_all(
    tasks: Sequence[Task], command: Sequence[str], jobs: int, deadline: float | None, add: Add
) -> list[Task]:
    """Run tasks; those that compile so many at once, the others beside them.

    Args:
        command: starts a process that takes `--task JSON --turn FILE`.
        jobs: compiling processes at a time.
        deadline: on the monotonic clock; what runs then is stopped. None: no end.
        add: gets every row, one at a time.

    Returns:
        the tasks that were not started or not finished in time.
    """
    late: list[Task] = []
    lock = threading.Lock()

    def say(row: dict[str, Any]) -> None:
        with lock:
            add(row)

    with tempfile.NamedTemporaryFile(prefix="gpu-turn-") as turn:

        def attempt(task: Task) -> None:
            limit = TUNED_LIMIT_S if task.forms == (TUNED,) else TASK_LIMIT_S
            left = limit if deadline is None else deadline - time.monotonic()
            if left < SHORTEST_S:
                late.append(task)
                return
            arguments = [*command, "--task", json.dumps(asdict(task)), "--turn", turn.name]
            seen, failure = _run(arguments, min(limit, left), say)
            missing = [row for row in task.rows() if row not in seen]
            if missing and failure == STOPPED and left < limit:
                late.append(task)
                return
            for model, batch, form in missing:
                say({"model": model, "batch": batch, "form": form, "error": failure})

        compiling = [task for task in tasks if FORMS[task.forms[0]].compiled]
        quick = [task for task in tasks if not FORMS[task.forms[0]].compiled]
        with ThreadPoolExecutor(jobs) as slow_pool, ThreadPoolExecutor(QUICK_JOBS) as pool:
            done = [pool.submit(attempt, task) for task in quick]
            done += [slow_pool.submit(attempt, task) for task in compiling]
        for future in done:
            future.result()
    return late


def _run(arguments: Sequence[str], limit: float, say: Add) -> tuple[set[Key], str]:
    """The rows that a process printed, and why there are no more."""
    seen: set[Key] = set()
    stopped = threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=errors, text=True, env=one_thread_compiles()
        ) as process:

            def stop() -> None:
                stopped.set()
                process.kill()

            timer = threading.Timer(limit, stop)
            timer.start()
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(MARK):
                    row = json.loads(line.removeprefix(MARK))
                    seen.add(key(row))
                    say(row)
            code = process.wait()
            timer.cancel()
        errors.seek(0)
        tail = errors.read()[-LONGEST_ERROR:].strip()
    if stopped.is_set():
        return seen, STOPPED
    return seen, f"the process ended with code {code}: {tail}"


def command_of(script: Path, device: str) -> list[str]:
    """What starts a task's process."""
    return [sys.executable, "-W", "ignore", str(script), "--device", device]

"""Runs tasks, a process each, in rounds: all of one get ready together, then each is timed alone.

While one is timed, the others wait or have ended: nothing else runs on the GPU or on the host. A
process that crashes or hangs ends alone.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarking.cases import FORMS, TUNED, Task
from benchmarking.worker import Add, Worker

TASK_LIMIT_S = 240.0  # to get ready, and again to be timed
TUNED_LIMIT_S = 540.0
QUICK_JOBS = 4  # what they capture for all their batches lies in the GPU's memory together
SHORTEST_S = 45.0  # a round is not started with less time left


def run_all(
    tasks: Sequence[Task], command: Sequence[str], jobs: int, deadline: float | None, add: Add
) -> list[Task]:
    """Run tasks; those that compile apart from the others, because they tune kernels meanwhile.

    Args:
        command: starts a process that takes `--task JSON --turn FILE`.
        jobs: processes at a time.
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
        for together in _rounds(tasks, jobs):
            if _left(deadline) < SHORTEST_S:
                late += together
                continue
            workers = [Worker(task, command, Path(turn.name), say) for task in together]
            try:
                late += _run_round(workers, deadline, say)
            finally:
                for worker in workers:
                    worker.end()
    return late


def _rounds(tasks: Sequence[Task], jobs: int) -> Iterator[list[Task]]:
    for compiled, most in ((False, min(jobs, QUICK_JOBS)), (True, jobs)):
        alike = [task for task in tasks if FORMS[task.forms[0]].compiled is compiled]
        for first in range(0, len(alike), most):
            yield alike[first : first + most]


def _run_round(workers: Sequence[Worker], deadline: float | None, say: Add) -> list[Task]:
    """Time every worker alone; the tasks that the deadline cut short."""
    with ThreadPoolExecutor(len(workers)) as pool:
        list(pool.map(lambda worker: worker.get_ready(_limit(worker, deadline)), workers))
    late = []
    for worker in workers:
        worker.have_turn(_limit(worker, deadline))
        if worker.missing() and worker.stopped and _left(deadline) <= 0:
            late.append(worker.task)
            continue
        for model, batch, form in worker.missing():
            say({"model": model, "batch": batch, "form": form, "error": worker.failure()})
    return late


def _limit(worker: Worker, deadline: float | None) -> float:
    """Seconds that a worker may take now."""
    limit = TUNED_LIMIT_S if worker.task.forms == (TUNED,) else TASK_LIMIT_S
    return max(0.0, min(limit, _left(deadline)))


def _left(deadline: float | None) -> float:
    return float("inf") if deadline is None else deadline - time.monotonic()


def command_of(script: Path, device: str) -> list[str]:
    """What starts a task's process."""
    return [sys.executable, "-W", "ignore", str(script), "--device", device]

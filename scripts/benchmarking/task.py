"""One process's share of the benchmark: make every call, wait for the GPU, time them, say so."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarking import ours, peers
from benchmarking.cases import FORMS, Task, find_models
from benchmarking.timing import Call, Step, measured
from benchmarking.turn import Turn

MARK = "ROW "  # starts a line of standard output that holds a row
READY = "READY"  # a line that asks for the turn; the answer is a line of standard input
LONGEST_ERROR = 600

Say = Callable[[dict[str, Any]], None]


def run(task: Task, device: torch.device, turn: Turn, say: Say) -> None:
    """Measure what a task lists; a form that fails is a row with its error.

    Args:
        say: gets each row as soon as it is known.
    """
    (model,) = find_models([task.model])
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    if FORMS[task.forms[0]].ours:
        steps: Iterator[Step] = ours.runs(model, task.forms, task.batches, device)
    else:
        steps = peers.runs(model, task.forms, task.batches, device, dtype, turn)
    calls: list[tuple[dict[str, Any], Call]] = []
    with torch.inference_mode():
        for step in steps:
            row = {"model": task.model, "batch": step.batch, "form": step.form}
            with _guarded(row, say):
                call = step.make()
                calls.append((row | step.about, call))
        turn.take()
        for row, call in calls:
            with _guarded(row, say):
                say(row | _timed(call, device))


def _timed(call: Call, device: torch.device) -> dict[str, Any]:
    times = measured(call, device)
    if not bool(torch.isfinite(call()).all()):
        raise ArithmeticError("the logits are not finite")
    return times


@contextmanager
def _guarded(row: dict[str, Any], say: Say) -> Iterator[None]:
    """Make a failure a row: one form's never ends the run."""
    try:
        yield
    except Exception as error:  # whatever a compiler, a driver or a model can raise
        say(row | {"error": f"{type(error).__name__}: {error}"[:LONGEST_ERROR]})


def main(text: str, device: str, turn_file: str) -> int:
    """Run the task that `text` describes and print its rows."""
    said = json.loads(text)
    task = Task(said["model"], tuple(said["forms"]), tuple(said["batches"]))
    turn = Turn(Path(turn_file), ask_for_turn) if turn_file else Turn()
    run(task, torch.device(device), turn, lambda row: print(MARK + json.dumps(row), flush=True))
    return 0


def ask_for_turn() -> None:
    """Say that all is ready, and wait for the program that started this one."""
    print(READY, flush=True)
    if not sys.stdin.readline():
        sys.exit("the program that gives turns has ended")

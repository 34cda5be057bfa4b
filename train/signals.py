"""SIGTERM, SIGUSR1 and Ctrl-C as a wish to stop, on which all ranks agree at the end of a step.

A handler in Python waits until the main thread leaves whatever library it is in, which in a
collective without its peers is never. So a thread reads the signals from the wakeup pipe, which
the system fills, and ends the process if no step ends in time.
"""

from __future__ import annotations

import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as group
from torch.distributed.launcher.api import LaunchConfig

from swinq import console, distributed
from swinq.errors import ConfigError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Share of torchrun's patience in which a step must end; saving has the rest
GRACE_SHARE = 2 / 3
PATIENCE_S = 30.0  # torchrun's, where nobody has changed it, and always once a rank has failed
_CLOSE, _SAVED = b"\0", b"\xff"  # no signals' numbers


class StopRequest:
    """Within it the signals ask for a stop instead of ending the process.

    A second Ctrl-C raises KeyboardInterrupt. A process whose step has not ended `grace_s` after a
    signal, because a peer is gone or a step is too long, exits at once with the exit code.

    Args:
        grace_s: seconds from a signal to the end of a step, at most; None is 20, and for SIGUSR1
            more where TORCH_ELASTIC_SHUTDOWN_TIMEOUT makes torchrun wait longer before it kills.
            SIGTERM is what torchrun sends when another rank has failed, and then it never waits
            longer.
    """

    def __init__(self, grace_s: float | None = None) -> None:
        self._grace_s = grace_s
        self._patience_s = _patience_of_torchrun()
        self._received = 0  # the first signal's number here, 0 for none
        self._agreed = 0  # the number on which all ranks agreed
        self._interrupts = 0
        self._pending: _Maximum | None = None
        self._saving = False

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it: 143, 138 or 130; 0 before any signal."""
        number = self._agreed or self._received
        return 128 + number if number else 0

    def grace_s(self, number: int) -> float:
        """Seconds that a step has after this signal."""
        if self._grace_s is not None:
            return self._grace_s
        waits = number == signal.SIGUSR1 and hasattr(LaunchConfig, "shutdown_timeout")
        return GRACE_SHARE * (self._patience_s if waits else min(self._patience_s, PATIENCE_S))

    def agreed(self) -> bool:
        """Whether all ranks stop now; call it on all of them after each step.

        With more ranks than one the answer is that of the call before: it has travelled during
        the step, so nothing waits for it, and a signal costs one step more.
        """
        if self._agreed:
            return True
        if distributed.world_size() == 1:
            self._agreed = self._received
            return bool(self._agreed)
        if self._pending is not None:
            self._agreed = self._pending.result()
        self._pending = None if self._agreed else _Maximum(self._received)
        return bool(self._agreed)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within it nothing is cut short: what is being written is worth waiting for."""
        self._saving = True
        try:
            yield
        finally:
            os.write(self._writer, _SAVED)  # the step after it has all of its time
            self._saving = False

    def __enter__(self) -> StopRequest:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous: dict[int, Any] = {
            number: signal.signal(number, self._handle) for number in SIGNALS
        }
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pending is not None and error is None:
            self._pending.result()  # no rank leaves the group while others still ask
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.write(self._writer, _CLOSE)
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """The main thread's part; `_watch` has the same byte, perhaps much earlier."""
        self._received = self._received or number
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        deadline, cause = math.inf, 0  # when this process ends, and the signal that says so
        while True:
            left = None if deadline == math.inf else max(deadline - time.monotonic(), 0.0)
            if not select.select([self._reader], [], [], left)[0]:
                if not self._saving and not self._agreed:
                    self._exit(cause)
                deadline = math.inf  # what is being saved takes the time that it takes
                continue
            for number in os.read(self._reader, 4096):
                if number == _CLOSE[0]:
                    return
                if self._agreed:
                    continue
                if number == _SAVED[0] and cause:
                    deadline = time.monotonic() + self.grace_s(cause)
                elif number in SIGNALS:
                    self._received = self._received or number
                    ends = time.monotonic() + self.grace_s(number)
                    deadline, cause = min((deadline, cause), (ends, number))

    def _exit(self, cause: int) -> None:
        console.complain(
            f"{signal.Signals(cause).name} {self.grace_s(cause):.0f} s ago, and no step has ended "
            "since: ending now; the last checkpoint counts",
            label="",
        )
        sys.stdout.flush()
        os._exit(self.exit_code)


def _patience_of_torchrun() -> float:
    said = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(PATIENCE_S))
    try:
        return float(said)
    except ValueError as error:
        raise ConfigError(
            f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT is {said!r}, wanted seconds", "correct or unset it"
        ) from error


class _Maximum:
    """The maximum of a number over all ranks, under way."""

    def __init__(self, number: int) -> None:
        on_gpu = group.get_backend() == "nccl"
        # filled in place: a copy from here would wait for all that the GPU has still to do
        self._value = torch.full((1,), number, device="cuda" if on_gpu else "cpu")  # int64
        self._work = group.all_reduce(self._value, op=group.ReduceOp.MAX, async_op=True)
        self._copied: torch.cuda.Event | None = None
        if on_gpu:
            self._work.wait()  # makes the GPU's stream wait, not this thread
            here = torch.empty(1, dtype=torch.int64, pin_memory=True)
            self._value = here.copy_(self._value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def result(self) -> int:
        """Waits for the collective alone, not for what the GPU was given after it.

        Raises:
            SwinqError: another rank has gone.
        """
        with distributed.lost_peers_named("the wish to stop"):
            if self._copied is not None:
                self._copied.synchronize()
            else:
                self._work.wait()
        return int(self._value)

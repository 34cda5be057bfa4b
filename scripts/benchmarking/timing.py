"""How long a call takes: medians of CUDA-event times, with a warm and with a flushed L2 cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

WARM_UP = 5
WINDOW_S = 0.15  # measured for about so long each, within the repeats below
FEWEST, MOST = 20, 300
FLUSH_BYTES = 256 * 2**20  # several times any L2 cache

Call = Callable[[], Any]


@dataclass
class Step:
    """A form of a model at one batch size, to be made and then timed.

    Attributes:
        make: gives the call to time; whatever it raises is a result too.
        about: what a reader should know of it, filled by `make`.
    """

    form: str
    batch: int
    make: Callable[[], Call]
    about: dict[str, Any] = field(default_factory=dict)


def measured(call: Call, device: torch.device) -> dict[str, Any]:
    """Time a call with its data where the last call left it, and with a cache full of other data.

    On a CPU there is a monotonic clock and no flushing: good for trying the benchmark out.

    Returns:
        `warm_ms`, `cold_ms` (medians), and for each the 10th and 90th percentile and the repeats.
    """
    times = _cuda_times if device.type == "cuda" else _cpu_times
    for _ in range(WARM_UP):
        call()
    estimate = statistics.median(times(call, WARM_UP, False, device))
    repeats = max(FEWEST, min(MOST, int(1e3 * WINDOW_S / max(estimate, 1e-3))))
    result: dict[str, Any] = {}
    for state in ("warm", "cold"):
        seen = times(call, repeats, state == "cold", device)
        tenths = statistics.quantiles(seen, n=10, method="inclusive")
        result[f"{state}_ms"] = statistics.median(seen)
        result[state] = {"p10": tenths[0], "p90": tenths[-1], "repeats": repeats}
    return result


def _cuda_times(call: Call, repeats: int, flush: bool, device: torch.device) -> list[float]:
    """Milliseconds of each call; nothing waits between them, so the queue never runs dry."""
    with torch.cuda.device(device):
        other = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if flush else None
        marks = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(repeats)
        ]
        torch.cuda.synchronize()
        for start, end in marks:
            if other is not None:
                other.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in marks]


def _cpu_times(call: Call, repeats: int, flush: bool, device: torch.device) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times

"""How long a model takes for a batch: medians over interleaved runs, on CPU or GPU."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from swinq.errors import ConfigError, SwinqError

Model = Callable[[Tensor], Tensor]  # (B, 3, S, S) float32 -> logits (B, K)


@dataclass(frozen=True)
class Latency:
    """Time of one forward of one batch.

    Attributes:
        median_ms, p10, p90: milliseconds; the 10th and 90th percentiles show how steady it was.
        images_per_second: batch size over the median.
        batch_size: images a forward.
        device_name: the GPU's or the processor's own name.
        threads: CPU threads that torch may use; on a GPU they do not matter.
        img_size: side of the input in pixels.
        repeats: forwards measured.
    """

    median_ms: float
    p10: float
    p90: float
    images_per_second: float
    batch_size: int
    device_name: str
    threads: int
    img_size: int
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def measure_latency(
    model: Model,
    batch_size: int,
    img_size: int,
    device: torch.device | str,
    warmup: int = 5,
    repeats: int = 20,
) -> Latency:
    """Measures one model; see `measure_together`."""
    return measure_together({"": model}, batch_size, img_size, device, warmup, repeats)[""]


def measure_together(
    models: Mapping[str, Model],
    batch_size: int,
    img_size: int,
    device: torch.device | str,
    warmup: int = 5,
    repeats: int = 20,
) -> dict[str, Latency]:
    """Measures several models in one run, taking turns, so that their ratios are fair.

    Clock speed and neighbours drift over seconds; models that are measured one after the other see
    different machines, models that take turns see the same one.

    Args:
        models: by name; each takes (B, 3, S, S) float32 on `device`. Modules should be in eval
            mode.
        batch_size: B.
        img_size: S in pixels.
        device: CUDA events time a GPU, a monotonic clock the CPU.
        warmup: forwards of each model that are not measured.
        repeats: forwards of each model that are.

    Raises:
        ConfigError: a size or count below 1 (warmup: below 0).
        SwinqError: the batch does not fit in the device's memory.
    """
    wanted = {"batch size": batch_size, "image size": img_size, "repeats": repeats}
    for what, value in wanted.items():
        if value < 1:
            raise ConfigError(f"{what} {value}: want at least 1")
    if warmup < 0:
        raise ConfigError(f"warmup {warmup}: want 0 or more")
    device = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, img_size, img_size, generator=generator).to(device)
    timed = _time_cuda if device.type == "cuda" else _time_cpu
    times: dict[str, list[float]] = {name: [] for name in models}
    try:
        with torch.inference_mode():
            for turn in range(warmup + repeats):
                for name, model in models.items():
                    elapsed = timed(model, images)
                    if turn >= warmup:
                        times[name].append(elapsed)
    except torch.OutOfMemoryError as error:
        raise SwinqError(
            f"a batch of {batch_size} images does not fit in the memory of {device}",
            f"use --batch-size {max(1, batch_size // 2)}",
        ) from error
    return {name: _summary(values, batch_size, img_size, device) for name, values in times.items()}


def device_name(device: torch.device | str) -> str:
    """The GPU's or the processor's own name."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return next(filter(None, names), platform.processor() or platform.machine() or "CPU")


def _time_cuda(model: Model, images: Tensor) -> float:
    """Milliseconds on the device's current stream, measured by the device."""
    with torch.cuda.device(images.device):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        model(images)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def _time_cpu(model: Model, images: Tensor) -> float:
    """Milliseconds by the monotonic clock."""
    start = time.perf_counter()
    model(images)
    return 1e3 * (time.perf_counter() - start)


def _summary(times: list[float], batch_size: int, img_size: int, device: torch.device) -> Latency:
    # quantiles() wants two values; inclusive: the smallest and largest are the 0th and 100th
    tenths = statistics.quantiles(times * 2 if len(times) == 1 else times, n=10, method="inclusive")
    median = statistics.median(times)
    return Latency(
        median_ms=median,
        p10=tenths[0],
        p90=tenths[-1],
        images_per_second=1e3 * batch_size / median,
        batch_size=batch_size,
        device_name=device_name(device),
        threads=torch.get_num_threads(),
        img_size=img_size,
        repeats=len(times),
    )

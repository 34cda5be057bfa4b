"""What is seen of a QAT job while it runs: lines on rank 0, and TensorBoard curves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from swinq import console, distributed
from swinq.quant.insert import used_quantizers
from swinq.quant.linear import QuantLinear
from swinq.train.ranges import kind_of

GIB = 2**30


class Monitor:
    """Shows losses, rates, speed, memory and ranges; rank 0 alone prints and writes.

    Neither a full disk nor a missing folder for the curves ends a job: that is said once.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        total_steps: int,
        steps_per_epoch: int,
        images_per_step: int,
        print_every: int,
        world: int = 1,
        eval_epochs: int = 1,
    ) -> None:
        """Prepare to show a job; nothing is written before its first step.

        Args:
            folder: of the curves, for this job alone; None for none.
            total_steps, steps_per_epoch: of the whole job, also where it is resumed.
            images_per_step: over all ranks and micro-batches.
            print_every: steps from line to line.
            world: number of ranks, for the lines.
            eval_epochs: epochs between evaluations, for the time that is left.
        """
        self._folder = folder if distributed.is_main() else None
        self._total, self._per_epoch = total_steps, steps_per_epoch
        self._images, self._every, self._world = images_per_step, print_every, world
        self._between_evaluations = eval_epochs * steps_per_epoch
        self._writer: Any = None
        self._losses: list[float] = []
        self._timed_steps, self._timed_seconds = 0, 0.0  # since the last line, without evaluations
        self._last: float | None = None  # when the last step was reported
        self._evaluation_seconds = 0.0
        self._step = 0  # steps that are done
        self._fresh_from = 0  # the first step that this run writes

    def step(
        self,
        step: int,
        loss: float,
        rate: float,
        gradient_norm: float,
        parts: Mapping[str, float],
    ) -> None:
        """Report one finished step.

        Args:
            step: counted from 0 over the whole job; curves and lines count from 1.
            loss: of this step. rate: the learning rate. gradient_norm: before clipping.
            parts: what the loss consists of, by name.
        """
        now = time.monotonic()
        first = self._last is None and self._step == 0
        self._step = self._fresh_from = step + 1
        if self._last is not None:
            self._timed_steps += 1
            self._timed_seconds += now - self._last
        self._last = now
        self._losses.append(loss)
        scalars = {"loss": loss, "rate": rate, "gradient_norm": gradient_norm}
        if len(parts) > 1:
            scalars |= {f"loss/{name}": value for name, value in parts.items()}
        due = self._step % self._every == 0 or self._step == self._total
        speed = self._timed_steps / self._timed_seconds if self._timed_seconds else 0.0
        if due and speed:
            scalars["images_per_second"] = speed * self._images
        if due and torch.cuda.is_initialized():
            scalars["memory_gib"] = torch.cuda.max_memory_reserved() / GIB
        for name, value in scalars.items():
            self._write("add_scalar", f"train/{name}", value, self._step)
        if due or first:
            self._say(rate, gradient_norm, speed)
            self._write("flush")
            self._losses, self._timed_steps, self._timed_seconds = [], 0, 0.0

    def evaluated(self, step: int, top1: float) -> None:
        """Report the accuracy of the quantized model after `step` steps, in percent."""
        self._step = max(self._step, step)  # a resumed job may begin with an evaluation
        self._fresh_from = step + 1 if step else 0
        when = (
            f"epoch {math.ceil(step / self._per_epoch)}, step {step}" if step else "before training"
        )
        console.say(f"{when}: top-1 {top1:.2f} % as fake quantization", "bold")
        self._write("add_scalar", "validation/top1", top1, step)
        self._write("flush")
        if self._last is not None:
            self._evaluation_seconds = time.monotonic() - self._last
        self._last = None  # the next step's time starts with the one after it

    def ranges(self, model: nn.Module) -> None:
        """Write where the ranges of a model stand: a few numbers and a histogram for each kind.

        A weight's clipped share is that of its values beyond amax.
        """
        if self._folder is None:
            return
        amax: dict[str, list[Tensor]] = {}
        clipped: list[Tensor] = []
        for name, quantizer in used_quantizers(model).items():
            kind = kind_of(name)
            amax.setdefault(kind, []).append(quantizer.amax.detach().reshape(-1))
            if kind == "weight":
                layer: QuantLinear = model.get_submodule(name.rpartition(".")[0])  # type: ignore[assignment]
                clipped.append(_clipped_share(layer))
        for kind, values in amax.items():
            found = torch.cat(values).cpu()
            found = found[found > 0]  # a dead channel has no logarithm
            if len(found):
                self._write(
                    "add_scalar", f"ranges/{kind}/median", found.median().item(), self._step
                )
                self._write("add_scalar", f"ranges/{kind}/maximum", found.max().item(), self._step)
                self._write("add_histogram", f"ranges/{kind}/log2_amax", found.log2(), self._step)
        if clipped:
            shares = torch.stack(clipped).cpu()
            self._write("add_scalar", "ranges/weight/clipped", shares.mean().item(), self._step)
            self._write("add_histogram", "ranges/weight/clipped_share", shares, self._step)

    def close(self) -> None:
        """Write what is still in memory."""
        self._write("close")
        self._writer = self._folder = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _say(self, rate: float, gradient_norm: float, speed: float) -> None:
        finite = [loss for loss in self._losses if math.isfinite(loss)]
        mean = sum(finite) / len(finite) if finite else math.nan
        epoch = math.ceil(self._step / self._per_epoch)
        words = [
            f"epoch {epoch}/{math.ceil(self._total / self._per_epoch)}",
            f"step {self._step}/{self._total}",
            f"loss {mean:.4f}",
            f"rate {rate:.2e}",
            f"gradient {gradient_norm:.3g}",
        ]
        if speed:
            ranks = f" on {self._world} ranks" if self._world > 1 else ""
            words.append(f"{speed * self._images:,.0f} images/s{ranks}")
        if torch.cuda.is_initialized():
            words.append(f"{torch.cuda.max_memory_reserved() / GIB:.1f} GiB")
        if speed and self._step < self._total:
            left = (self._total - self._step) / speed
            left += self._evaluations_left() * self._evaluation_seconds
            words.append(f"{console.duration(left)} left")
        console.say("  ".join(words))

    def _evaluations_left(self) -> int:
        """How often the model will still be evaluated; the end always is an evaluation."""
        every = self._between_evaluations
        return math.ceil(self._total / every) - self._step // every

    def _write(self, method: str, *arguments: Any) -> None:
        """Call TensorBoard's writer, made at the first call, and give it up once it fails."""
        if self._folder is None or (self._writer is None and method in ("flush", "close")):
            return
        try:
            if self._writer is None:
                self._writer = _open_writer(self._folder, self._fresh_from)
            call: Callable[..., None] = getattr(self._writer, method)
            call(*arguments)
        except OSError as error:
            reason = error.strerror or error
            console.say(
                f"note: no curves are written from step {self._step} on: {self._folder}: {reason}",
                "warning",
            )
            self._writer = self._folder = None


def _open_writer(folder: Path, step: int) -> Any:
    """A writer whose curves replace what a killed run left from this step on."""
    from torch.utils.tensorboard import SummaryWriter  # seconds to import, only needed here

    folder.mkdir(parents=True, exist_ok=True)
    return SummaryWriter(str(folder), purge_step=step)


@torch.no_grad()
def _clipped_share(layer: QuantLinear) -> Tensor:
    """The share of a weight's values beyond its range, 0-dim fp32 on the weight's device."""
    weight, quantizer = layer.folded_weight(), layer.weight_quantizer
    return (weight.abs() > quantizer.broadcast(quantizer.amax, weight.ndim)).float().mean()

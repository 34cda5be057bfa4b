"""The QAT loop: steps, checkpoints, judgements, and how a killed job goes on.

The student is a copy of the calibrated model. It alone is wrapped, compiled and trained; its state
comes back into the plain calibrated model whenever that is judged, and at the end.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from swinq import console, distributed
from swinq.data.augment import Augmented
from swinq.data.mixing import Mixing
from swinq.data.order import StepOrder
from swinq.data.training import TrainingBatch, TrainingLoader
from swinq.errors import ExportError, SwinqError
from swinq.models.layers import SwinBase, set_drop_path
from swinq.train import parallel
from swinq.train.average import Average
from swinq.train.distill import Distillation
from swinq.train.graphs import CapturedStages, capture_stages, hold_gradients
from swinq.train.job import describe_job, require_same_job
from swinq.train.monitor import Monitor
from swinq.train.optimizer import Schedule, build_optimizer, parameters_of
from swinq.train.precision import autocast
from swinq.train.randomness import gather, restore_rank, seed_step
from swinq.train.ranges import learn_ranges
from swinq.train.saving import SavePlan
from swinq.train.settings import Settings
from swinq.train.signals import StopRequest
from swinq.train.state import CheckpointFolder

CURVE_POINTS = 200  # of loss and rate, kept for the report
SKIPPED_LIMIT = 50  # steps in a row that fp16's scaler may skip before the job is given up


class StoppedError(SwinqError):
    """The job was asked to stop, and has saved its state."""

    def __init__(self, step: int, total: int, code: int) -> None:
        super().__init__(
            f"stopped after step {step} of {total}, as asked; everything is saved",
            "repeat the same command to go on",
        )
        self.code = code


@dataclass
class Progress:
    """What a job remembers beside its tensors.

    Attributes:
        curve: (step, loss, rate) from time to time. judged: (step, top-1 in percent).
        best_step, best_top1: of the judgement that was best so far; the earlier of equals.
        seconds: spent in the loop, over all runs of the job.
    """

    curve: list[tuple[int, float, float]] = field(default_factory=list)
    judged: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    best_top1: float = -1.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Surroundings:
    """What the loop uses and does not make itself.

    Attributes:
        images: the training images, with their augmentation. workers: processes that decode them.
        device: of this rank. identity: what a checkpoint must share with this job, plain JSON.
        judge: gives the top-1 of the plain model in percent; all ranks call it.
        keep: stores the plain model as the best so far, of a step, with a top-1; all ranks call it,
            and it tells all of them whether it could.
    """

    images: Augmented
    mixing: Mixing
    distillation: Distillation | None
    workers: int
    device: torch.device
    folder: CheckpointFolder
    monitor: Monitor
    identity: dict[str, Any]
    judge: Callable[[nn.Module], float]
    keep: Callable[[nn.Module, int, float], bool]

    def job(self, settings: Settings) -> dict[str, Any]:
        """What a checkpoint must share with this job, plain JSON."""
        return describe_job(settings, self.identity, len(self.images))


def train(calibrated: SwinBase, around: Surroundings, settings: Settings) -> Progress:
    """Train until the last epoch, from the newest checkpoint in the folder if there is one.

    Args:
        calibrated: every range known, on the device; holds the trained weights and ranges
            afterwards, those of the last step (or of their average).

    Raises:
        StoppedError: a signal asked for it; the state is saved.
        ConfigError: the folder's checkpoints are of another job, or too few images for a step.
        CheckpointError: there are checkpoints, and none of them is whole.
        SwinqError: the gradient or a weight is not finite.
    """
    with distributed.lost_peers_named("training"):
        return _Loop(calibrated, around, settings).run()


class _Loop:
    """One rank of a running job."""

    def __init__(self, calibrated: SwinBase, around: Surroundings, settings: Settings) -> None:
        self.calibrated, self.around, self.settings = calibrated, around, settings
        world, self.rank = distributed.world_size(), distributed.rank()
        per_step = settings.accumulation * world
        self.order = StepOrder(len(around.images), settings.batch, per_step, settings.seed)
        self.total = settings.epochs * self.order.steps_per_epoch
        first = self.rank * settings.accumulation
        self.numbers = range(first, first + settings.accumulation)  # of this rank's micro-batches

        self.saved = around.folder.newest()
        if self.saved is not None:
            require_same_job(self.saved.path, self.saved.metadata, around.job(settings))
            # found anew, a range may be a vector where the job began with a number
            saved = self.saved.part("model.")
            ranges = {name: saved[name] for name in saved if name.endswith("._amax")}
            calibrated.load_state_dict(ranges, strict=False)
        student = copy.deepcopy(calibrated)
        set_drop_path(student, settings.drop_path)
        student.set_gradient_checkpointing(settings.checkpointing)
        if settings.learned:
            learn_ranges(student, settings.learned)
        if settings.compile_blocks:
            parallel.compile_blocks(student)
        self.captured: CapturedStages | None = None
        if settings.cuda_graphs:
            self.captured = capture_stages(student.train(), settings.batch, settings.amp)
        # sums that start from None would begin in the graphs' own memory
        self.holds_gradients = settings.cuda_graphs and settings.accumulation > 1
        if self.holds_gradients:
            hold_gradients(student)
        self.student = student
        self.model = parallel.wrap(student, settings.parallel, around.device)
        self.optimizer = build_optimizer(student, settings)
        self.schedule = Schedule(self.optimizer, self.total, settings)
        self.average = Average(student, settings.ema) if settings.ema else None
        self.scaler = torch.amp.GradScaler(around.device.type, enabled=settings.amp == "fp16")
        self.label_loss = SoftTargetCrossEntropy()
        self.progress = Progress()
        self.skipped = 0
        if around.distillation is not None:
            around.distillation.watch(student)

    def run(self) -> Progress:
        done = self._resume()
        if self.captured is not None:
            self.captured.require_unmoved()
        self.model.train()
        self.started = time.monotonic() - self.progress.seconds
        self._judge_once(done)
        self.saves = SavePlan(self.settings.save_steps, done)
        # closed, whatever happens: else a traceback could keep the workers until the process ends
        with StopRequest() as stop, closing(iter(self._loader(done))) as batches:
            unread: _Unread | None = None
            for step in range(done, self.total):
                latest = self._step(step, batches)
                self.saves.stepped(step + 1)
                if unread is not None:
                    self._read(unread)
                unread = latest
                now = step + 1
                last, stops = now == self.total, stop.agreed()
                if last or stops or self._due(now) or self.saves.due(now):
                    self._read(unread)  # a state is saved once its step is known to be sound
                    unread = None
                    with stop.saving():
                        self._save(now, required=last or stops)
                if stops:
                    raise StoppedError(now, self.total, stop.exit_code)
                # after the save: a judgement takes longer than a signal leaves, and can be repeated
                with self.saves.paused():
                    self._judge_once(now)
            # once for what the last step asked, and once for what came while it was judged
            if stop.agreed() or stop.agreed():
                raise StoppedError(self.total, self.total, stop.exit_code)
        self._write_back()
        return self.progress

    def _loader(self, first_step: int) -> TrainingLoader:
        return TrainingLoader(
            self.around.images,
            self.order,
            first_step=first_step,
            last_step=self.total,
            numbers=self.numbers,
            num_workers=self.around.workers,
            pin_memory=self.around.device.type == "cuda",
        )

    def _step(self, step: int, batches: Iterator[TrainingBatch]) -> _Unread:
        """One step of the optimiser; what it gave stays on the device."""
        rate = self.schedule.set(step)
        sums: dict[str, Tensor] = {}
        for number in self.numbers:
            batch = next(batches)
            assert (batch.step, batch.number) == (step, number)
            seed_step(self.settings.seed, step, number)
            with parallel.gradient_sync(self.model, number == self.numbers[-1]):
                parts = self._losses(batch)
                loss = torch.stack(list(parts.values())).sum() / self.settings.accumulation
                self.scaler.scale(loss).backward()
            for name, part in parts.items():
                share = part.detach() / self.settings.accumulation
                sums[name] = sums[name] + share if name in sums else share
        self.scaler.unscale_(self.optimizer)
        weights = parameters_of(self.optimizer, ranges=False)
        ranges = parameters_of(self.optimizer, ranges=True)  # AdamW bounds their step
        norm = parallel.clip_gradients(weights, self.settings.clip)
        norm = norm + 0.0 * parallel.clip_gradients(ranges, 0.0)  # not finite if theirs is not
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=not self.holds_gradients)
        if self.average is not None:
            self.average.update(step)
        losses = parallel.mean_over_ranks(torch.stack([value.float() for value in sums.values()]))
        return _Unread(step, rate, torch.cat([norm.float().view(1), losses]), list(sums))

    def _losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """The weighted parts of the loss of a micro-batch, 0-dim fp32 each."""
        settings, device = self.settings, self.around.device
        images = batch.images.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        images, targets = self.around.mixing(images, labels, batch.step, batch.number)
        distillation = self.around.distillation
        with autocast(device, settings.amp):
            wanted = None if distillation is None else distillation.teach(images)
            logits = self.model(images).float()
        parts: dict[str, Tensor] = {}
        if settings.labels:
            parts["labels"] = settings.labels * self.label_loss(logits, targets)
        if distillation is not None and wanted is not None:
            parts |= distillation.losses(logits, wanted)
        return parts

    def _read(self, unread: _Unread) -> None:
        """Look at a step's numbers, stop at what is not finite, and show them."""
        norm, parts = unread.read()
        loss, step = sum(parts.values()), unread.step
        if not math.isfinite(norm):  # the same on all ranks
            self.skipped += 1
            if self.settings.amp != "fp16" or self.skipped > SKIPPED_LIMIT:
                raise _diverged(
                    f"the gradient of step {step + 1} is {norm} (loss {loss:g}, rate "
                    f"{unread.rate:g})"
                )
        else:
            self.skipped = 0
        shown = step % max(1, self.total // CURVE_POINTS) == 0 or step + 1 == self.total
        if shown and math.isfinite(loss):  # fp16 may skip a step whose loss overflowed
            self.progress.curve.append((step + 1, loss, unread.rate))
        self.around.monitor.step(step, loss, unread.rate, norm, parts)

    def _due(self, step: int) -> bool:
        """Whether the model is judged after this step: at the start, and at the end of epochs."""
        epoch, inside = divmod(step, self.order.steps_per_epoch)
        return not inside and (step == self.total or epoch % self.settings.eval_epochs == 0)

    def _judge_once(self, step: int) -> None:
        """Judge where that is due, unless a resumed job has been judged there already."""
        if self._due(step) and all(step != judged for judged, _ in self.progress.judged):
            self._judge(step)

    def _judge(self, step: int) -> None:
        """Measure the plain model with the student's state; keep it if none was better."""
        if step:  # before the first one it is what was calibrated, to the bit
            self._write_back()
        top1 = self.around.judge(self.calibrated)
        progress = self.progress
        progress.judged.append((step, top1))
        self.around.monitor.evaluated(step, top1)
        self.around.monitor.ranges(self.calibrated)
        # what was calibrated is found anew if it could not be kept
        if top1 > progress.best_top1 and (
            self.around.keep(self.calibrated, step, top1) or not step
        ):
            progress.best_step, progress.best_top1 = step, top1
        self.model.train()

    def _write_back(self) -> None:
        """Copy weights and ranges, or their averages, into the plain calibrated model."""
        state = parallel.full_state(self.student)
        if self.average is not None:
            state |= self.average.tensors()
        self.calibrated.load_state_dict(state)

    def _save(self, step: int, *, required: bool) -> None:
        """Write the whole state; a full disk ends the job only where the state is needed now."""
        began = time.monotonic()
        self._require_sound(step)
        if self.captured is not None:
            self.captured.require_unmoved()
        tensors = parallel.save_tensors(self.student, self.optimizer)
        if self.average is not None:
            tensors |= {name: parallel.whole(t) for name, t in self.average.named().items()}
        tensors |= gather()
        self.progress.seconds = time.monotonic() - self.started
        metadata = {
            "job": self.around.job(self.settings),
            "progress": asdict(self.progress),
            "scaler": self.scaler.state_dict(),
        }
        try:
            path = self.around.folder.save(step, tensors, metadata)
        except ExportError as error:  # on rank 0 alone
            if required:
                raise
            console.say(f"warning: step {step} could not be saved: {error}", "warning")
            distributed.barrier()  # where the others wait in save
        else:
            console.say(f"saved: {path}", "quiet")
        self.saves.saved(step, began)

    def _require_sound(self, step: int) -> None:
        """Stop at what a sound gradient has made of the state, and no forward has seen.

        Raises:
            SwinqError: NaN or numbers beyond all use in weights, ranges, moments or averages.
        """
        state = parallel.trained_tensors(self.student, self.optimizer)
        state |= {  # a finite logarithm may be one of an infinite range
            f"the range of {name}": log.exp()
            for name, log in state.items()
            if name.startswith("model.") and name.endswith(".log_amax")
        }
        if self.average is not None:
            state |= self.average.named()
        if spoiled := parallel.first_spoiled(state):  # the same on all ranks
            raise _diverged(f"{spoiled} has numbers beyond {parallel.SOUND:g} after step {step}")

    def _resume(self) -> int:
        """Take up the newest checkpoint; return the number of steps that are done."""
        saved, self.saved = self.saved, None
        if saved is None:
            return 0
        parallel.load_tensors(self.student, self.optimizer, saved.tensors)
        if self.average is not None:
            self.average.load(saved.part("average."))
        if saved.metadata["scaler"]:
            self.scaler.load_state_dict(saved.metadata["scaler"])
        restore_rank(saved.tensors)
        self.progress = Progress(**saved.metadata["progress"])
        self.progress.curve = [tuple(p) for p in self.progress.curve]  # type: ignore[misc]
        self.progress.judged = [tuple(p) for p in self.progress.judged]  # type: ignore[misc]
        console.say(f"resumed: step {saved.step} of {self.total} from {saved.path}", "good")
        return saved.step


def _diverged(problem: str) -> SwinqError:
    return SwinqError(
        f"{problem}; the newest checkpoint is from before it",
        "lower --qat-lr, or train with --amp-type bf16 or --disable-amp",
    )


class _Unread:
    """The numbers of a step on their way from the device, which goes on computing meanwhile."""

    def __init__(self, step: int, rate: float, values: Tensor, names: list[str]) -> None:
        """Send off values (1 + names,) fp32: the gradient's norm, then the parts of the loss."""
        self.step, self.rate, self.names = step, rate, names
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            here = torch.empty(values.shape, pin_memory=True)
            values = here.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        self._values = values

    def read(self) -> tuple[float, dict[str, float]]:
        """The norm and the parts; waits for this step alone, not for what was begun after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        norm, *values = self._values.tolist()
        return norm, dict(zip(self.names, values, strict=True))

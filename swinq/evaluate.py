"""Exact top-1 and top-5 over any number of ranks, and how two models differ on the same images.

Batches are fixed before they are shared out and all have the same size (the last one is padded), so
a model sees the same batches on 1 or 8 ranks. Only integers cross ranks: scores, flips and even the
mean KL (summed in fixed point) are the same numbers for every number of ranks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swinq import distributed
from swinq.data.dataset import UNLABELLED, ImageDataset
from swinq.data.images import listed
from swinq.data.loader import Batch, BatchLoader
from swinq.data.sampling import batches_of_rank
from swinq.errors import DataError, SwinqError

Model = Callable[[Tensor], Tensor]  # (B, 3, S, S) float32 -> logits (B, K)
Progress = Callable[[Iterable[Batch], str], Iterable[Batch]]  # swinq.console.progress

KL_UNIT = 2.0**-32  # nats; with the cap, sums over 2 million images fit in int64
KL_CAP = 1024.0  # nats an image: further apart than this is just "far"
_CHUNK = 2**21  # logits that are looked at together in float64: 16 MiB
_EXACT_COUNTS = 1024  # discordant pairs up to which McNemar's sum is done in integers
_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Scores:
    """Counts of right predictions over all ranks.

    Attributes:
        images: every image once.
        top1: the label has the largest logit; of equal logits the first class counts.
        top5: the label is among the five largest; with five classes or fewer that is every image.
    """

    images: int
    top1: int
    top5: int

    @property
    def top1_percent(self) -> float:
        """Top-1 accuracy in percent."""
        return 100.0 * self.top1 / self.images if self.images else 0.0

    @property
    def top5_percent(self) -> float:
        """Top-5 accuracy in percent."""
        return 100.0 * self.top5 / self.images if self.images else 0.0

    def to_dict(self) -> dict[str, int | float]:
        """Counts and percentages."""
        percent = {"top1_percent": self.top1_percent, "top5_percent": self.top5_percent}
        return {**asdict(self), **percent}


@dataclass
class Predictions:
    """What a model said about this rank's images.

    Attributes:
        indices: int64 (n,), the images' places in the data set.
        labels: int64 (n,).
        logits: float32 (n, K) on the CPU; (0, 0) on a rank that had no batch.
    """

    indices: Tensor
    labels: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def predicted(self) -> np.ndarray:
        """The class of the largest logit of each image, the first of equals: int64 (n,)."""
        # NumPy promises the first of equal maxima, torch does not
        if not len(self):
            return np.zeros(0, np.int64)
        return self.logits.numpy().argmax(axis=1)

    def scores(self) -> Scores:
        """Right predictions, summed over the ranks; every rank has to call this."""
        place = self._place_of_label()
        counts = torch.tensor([len(place), (place < 1).sum(), (place < 5).sum()], dtype=torch.int64)
        distributed.all_reduce_sum_(counts)
        return Scores(*counts.tolist())

    def _place_of_label(self) -> np.ndarray:
        """How many classes come before the label, by logit and then by index: int64 (n,)."""
        places = [np.zeros(0, np.int64)]
        for rows in _chunks(self.logits):
            logits, label = self.logits[rows].numpy(), self.labels[rows].numpy()[:, None]
            own = np.take_along_axis(logits, label, axis=1)  # (m, 1)
            before = np.arange(logits.shape[1]) < label
            places.append(((logits > own) | ((logits == own) & before)).sum(axis=1))
        return np.concatenate(places)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images: `other` against `reference`, over all ranks.

    Attributes:
        images: images compared.
        both_right, only_reference, only_other, neither: whose top-1 prediction is right.
        agree: images for which both predict the same class, right or wrong.
        mean_kl: mean of KL(softmax(reference) || softmax(other)) in nats.
    """

    images: int
    both_right: int
    only_reference: int
    only_other: int
    neither: int
    agree: int
    mean_kl: float

    @property
    def difference(self) -> float:
        """Top-1 of other minus top-1 of reference, in percentage points."""
        return 100.0 * (self.only_other - self.only_reference) / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `difference`, in percentage points; see `paired_interval`."""
        low, high = paired_interval(self.only_reference, self.only_other, self.images)
        return 100.0 * low, 100.0 * high

    @property
    def p_value(self) -> float:
        """Exact two-sided McNemar test of "both are right equally often"."""
        return mcnemar_exact(self.only_reference, self.only_other)

    @property
    def agreement_percent(self) -> float:
        """Share of images with the same prediction, in percent."""
        return 100.0 * self.agree / self.images

    def to_dict(self) -> dict[str, Any]:
        """Counts and everything derived from them."""
        return {
            **asdict(self),
            "difference_points": self.difference,
            "interval_points": list(self.interval),
            "p_value": self.p_value,
            "agreement_percent": self.agreement_percent,
        }


def evaluate(
    model: Model,
    dataset: ImageDataset,
    *,
    batch_size: int,
    device: torch.device | str,
    progress: Progress | None = None,
    num_workers: int = 0,
    indices: Sequence[int] | None = None,
    label: str = "evaluating",
    if_too_large: str = "",
) -> Predictions:
    """Runs a model over a data set; with several ranks, over this rank's batches.

    Args:
        model: a module or any callable (B, 3, S, S) float32 -> logits (B, K). Modules are put into
            eval mode for the time of the call.
        dataset: labelled images.
        batch_size: images a batch, always exactly: the last batch is filled up with its last image.
        device: where the batches go; the model is there already.
        progress: `swinq.console.progress`, or None for silence.
        num_workers: processes that decode images.
        indices: the images to use, in this order; all of them if None.
        label: what the progress is called.
        if_too_large: what to do where a batch does not fit the memory; a smaller one if empty.

    Raises:
        DataError: no images, no labels, labels that the model has no logit for, unreadable images.
        SwinqError: logits that are not (B, K), or NaN or Inf; the images are named.
    """
    chosen = range(len(dataset)) if indices is None else indices
    if not len(chosen):
        raise DataError("there are no images to evaluate on", "give a data set with images")
    runs = batches_of_rank(len(chosen), batch_size, distributed.rank(), distributed.world_size())
    device = torch.device(device)
    loader = BatchLoader(
        dataset,
        [[chosen[i] for i in run] for run in runs],
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    count = sum(map(len, runs))
    seen = Predictions(_integers(count), _integers(count), torch.empty(0, 0))
    done = 0
    with torch.inference_mode(), _eval_mode(model):
        for batch in progress(loader, label) if progress else loader:
            _check_labelled(batch, dataset)
            logits = _run(model, batch.images, batch_size, device, if_too_large)
            _check_logits(logits, batch, dataset)
            if not done:  # the one copy: gigabytes for many images of many classes
                with torch.inference_mode(False):
                    seen.logits = torch.empty(count, logits.shape[1])
            rows = slice(done, done + len(batch))
            seen.indices[rows], seen.labels[rows] = batch.indices, batch.labels
            seen.logits[rows] = logits
            done += len(batch)
    return seen


def compare(reference: Predictions, other: Predictions) -> Comparison:
    """How `other` differs from `reference` on the same images; every rank has to call this.

    Raises:
        DataError: the two were not made from the same images and labels.
        SwinqError: the two models have different numbers of classes.
    """
    if not torch.equal(reference.indices, other.indices) or not torch.equal(
        reference.labels, other.labels
    ):
        raise DataError(
            f"the predictions to compare are of different images ({len(reference):,} and "
            f"{len(other):,} on rank {distributed.rank()})",
            "evaluate both models with the same data set, batch size and images",
        )
    if reference.logits.shape != other.logits.shape:
        raise SwinqError(
            f"the models to compare have {reference.logits.shape[1]} and "
            f"{other.logits.shape[1]} classes"
        )
    first, second = reference.predicted(), other.predicted()
    labels = reference.labels.numpy()
    right, also = first == labels, second == labels
    counts = torch.tensor(
        [
            len(labels),
            (right & also).sum(),
            (right & ~also).sum(),
            (~right & also).sum(),
            (~right & ~also).sum(),
            (first == second).sum(),
            _kl_units(reference.logits, other.logits),
        ],
        dtype=torch.int64,
    )
    images, both, only_reference, only_other, neither, agree, kl = distributed.all_reduce_sum_(
        counts
    ).tolist()
    if not images:
        raise DataError("there are no images to compare")
    mean_kl = kl * KL_UNIT / images
    return Comparison(images, both, only_reference, only_other, neither, agree, mean_kl)


def mcnemar_exact(only_reference: int, only_other: int) -> float:
    """Exact two-sided McNemar p-value: the discordant images as tosses of a fair coin.

    p = min(1, 2 * P(X <= min(b, c))) for X ~ Binomial(b + c, 1/2). Integer arithmetic up to 1,024
    discordant images; beyond, terms through log-gamma, good to about ten digits.
    """
    n, k = only_reference + only_other, min(only_reference, only_other)
    if only_reference == only_other:
        return 1.0
    if n <= _EXACT_COUNTS:
        return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    # From the largest term downwards: each is the one before times i / (n - i + 1)
    log_top = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2.0)
    total, term = 0.0, 1.0
    for i in range(k, -1, -1):
        total += term
        term *= i / (n - i + 1)
        if term < 1e-18 * total:
            break
    return min(1.0, 2.0 * total * math.exp(log_top))


def paired_interval(only_reference: int, only_other: int, images: int) -> tuple[float, float]:
    """95 % interval of a paired difference of proportions (other minus reference), in [-1, 1].

    Wald's interval after half an image is added to each of the four cells: Agresti and Min,
    "Simple improved confidence intervals for comparing matched proportions", Statistics in
    Medicine 24 (2005) 729-740. It keeps its coverage, and a width above zero, with few flips or
    none, where the plain interval collapses.
    """
    b, c, n = only_reference + 0.5, only_other + 0.5, images + 2.0
    centre = (c - b) / n
    half = _Z95 * math.sqrt(b + c - (c - b) ** 2 / n) / n
    return max(-1.0, centre - half), min(1.0, centre + half)


def _integers(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64)


def _run(
    model: Model, images: Tensor, batch_size: int, device: torch.device, if_too_large: str
) -> Tensor:
    """Logits (n, K) float32 on the CPU; the batch is padded to its full size for the run."""
    count = len(images)
    if count < batch_size:
        images = torch.cat([images, images[-1:].expand(batch_size - count, -1, -1, -1)])
    try:
        logits = model(images.to(device, non_blocking=True))
    except torch.OutOfMemoryError as error:
        raise SwinqError(
            f"a batch of {batch_size} images does not fit in the memory of {device}",
            if_too_large or f"use --batch-size {max(1, batch_size // 2)}",
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != batch_size:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise SwinqError(f"the model gave {got} for a batch of {batch_size}, want logits (B, K)")
    return logits[:count].float().cpu()


def _check_labelled(batch: Batch, dataset: ImageDataset) -> None:
    if (batch.labels == UNLABELLED).any():
        raise DataError(
            f"the images have no labels ({dataset.description})",
            "evaluation needs val/<class>/<image>; images without labels serve for calibration",
        )


def _check_logits(logits: Tensor, batch: Batch, dataset: ImageDataset) -> None:
    worst = int(batch.labels.argmax())
    if int(batch.labels[worst]) >= logits.shape[1]:
        raise DataError(
            f"{dataset.path(int(batch.indices[worst]))} has label {int(batch.labels[worst])}, "
            f"the model has {logits.shape[1]} classes",
            "use the data the model was trained for, or a checkpoint for these classes",
        )
    bad = ~logits.isfinite().all(dim=1)
    if bad.any():
        names = [dataset.path(index) for index in batch.indices[bad].tolist()]
        raise SwinqError(
            f"the model gives NaN or Inf for {len(names)} of {len(batch)} images: {listed(names)}",
            "check the checkpoint: run the float model on the same images first",
        )


@contextlib.contextmanager
def _eval_mode(model: Model) -> Iterator[None]:
    """Eval mode for the length of a call; callables that are no modules have no modes."""
    if not isinstance(model, nn.Module) or not any(m.training for m in model.modules()):
        yield
        return
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _kl_units(reference: Tensor, other: Tensor) -> int:
    """Sum over images of KL(softmax(reference) || softmax(other)) in units of KL_UNIT.

    Each image is rounded to a whole number of units by itself, so the sum has no order.
    """
    total = 0
    for rows in _chunks(reference):
        p, q = _log_softmax(reference[rows]), _log_softmax(other[rows])
        kl = (np.exp(p) * (p - q)).sum(axis=1).clip(0.0, KL_CAP)  # (m,) nats
        total += int(np.rint(kl / KL_UNIT).astype(np.int64).sum())
    return total


def _log_softmax(logits: Tensor) -> np.ndarray:
    """In float64, row by row: (m, K)."""
    x = logits.numpy().astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows that together fill _CHUNK numbers."""
    rows = max(1, _CHUNK // max(1, logits.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(logits), rows))

"""Histograms, ranges and scores as TensorBoard events."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

from swinq.errors import DataError
from swinq.report.schema import Histogram, Report

_EVENTS = "events.out.tfevents.*"


def write_tensorboard(report: Report, folder: Path | str, step: int = 0) -> None:
    """Write `calib/<quantizer>/hist`, `calib/<quantizer>/amax`, clipping, scores and errors.

    Args:
        report: of which everything that has a number over layers or models is written.
        folder: the log directory; events that an earlier run left there are replaced.
        step: of all events; one calibration is one step.

    Raises:
        DataError: the folder cannot be written.
    """
    from torch.utils.tensorboard import SummaryWriter  # seconds to import, only needed here

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = list(folder.glob(_EVENTS))
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            with SummaryWriter(scratch) as writer:
                _add_report(writer, report, step)
            for path in Path(scratch).glob(_EVENTS):
                os.replace(path, folder / path.name)
        for path in earlier:  # its points would lie at the same step
            path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"TensorBoard events cannot be written to {folder}: {error.strerror}",
            "give a writable folder with --output",
        ) from error


def _add_report(writer: Any, report: Report, step: int) -> None:
    for row in report.quantizers:
        tag = f"calib/{row.name}"
        writer.add_scalar(f"{tag}/amax", row.amax.maximum, step)
        if row.clipped_share is not None:
            writer.add_scalar(f"{tag}/clipped", row.clipped_share, step)
        if row.histogram and row.histogram.counts:
            _add_histogram(writer, f"{tag}/hist", row.histogram, step)
    for model in report.models:
        writer.add_scalar(f"score/{model.name}/top1", model.top1, step)
        writer.add_scalar(f"score/{model.name}/top5", model.top5, step)
        if model.comparison:
            writer.add_scalar(f"score/{model.name}/kl", model.comparison.mean_kl, step)
    for layer_error in report.layer_errors:
        for metric, value in (("total", layer_error.total), ("minimum", layer_error.minimum)):
            if math.isfinite(value):
                writer.add_scalar(f"sqnr/{layer_error.layer}/{metric}", value, step)
    for sensitivity in report.sensitivity.rows if report.sensitivity else ():
        tag = f"sensitivity/{sensitivity.layer}"
        writer.add_scalar(f"{tag}/only_this", sensitivity.only_this_quantized, step)
        writer.add_scalar(f"{tag}/all_but_this", sensitivity.only_this_float, step)
    for latency in report.latency:
        tag = f"latency/{latency.name}/batch {latency.batch}"
        writer.add_scalar(tag, latency.median_ms, step)


def _add_histogram(writer: Any, tag: str, histogram: Histogram, step: int) -> None:
    """Counts over |x|; sums are taken at the geometric middle of each bin."""
    width = 1 / histogram.per_octave
    counts = histogram.counts
    upper = [2 ** (histogram.low + width * (i + 1)) for i in range(len(counts))]
    middles = [edge * 2 ** (-width / 2) for edge in upper]
    writer.add_histogram_raw(
        tag,
        min=0.0 if histogram.below else upper[0] * 2**-width,
        max=upper[-1],
        num=sum(counts) + histogram.below,
        sum=sum(n * x for n, x in zip(counts, middles, strict=True)),
        sum_squares=sum(n * x * x for n, x in zip(counts, middles, strict=True)),
        bucket_limits=[upper[0] * 2**-width, *upper],
        bucket_counts=[histogram.below, *counts],
        global_step=step,
    )

"""--calib: find the ranges, write the calibrated and INT8 checkpoints, judge them, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from swinq import api, console, distributed
from swinq.calib.calibrate import Calibration
from swinq.commands.judging import Judged, Judging
from swinq.commands.session import RankImages, Session, load_model, weights_of
from swinq.config import Config
from swinq.data.dataset import ImageDataset
from swinq.data.sampling import calibration_indices, sample_digest
from swinq.errors import ConfigError
from swinq.int8.choice import IntegerModel
from swinq.quant.insert import set_int8_mode
from swinq.quant.spec import QuantSpec
from swinq.report.schema import TrainingSummary


@dataclass(frozen=True)
class Outcome:
    """Everything that the report tells of a calibration run."""

    float_model: nn.Module
    quantized: nn.Module
    calibration: Calibration
    sample: list[int]
    train: ImageDataset
    val: ImageDataset
    files: dict[str, Path]
    judged: list[Judged]
    seconds: float  # that the calibration took, without judging
    notes: list[str]
    training: TrainingSummary | None = None  # of --train


def run(config: Config) -> int:
    """Run the whole of --calib; rank 0 writes."""
    session = Session.open(config)
    session.spare_what_is_read(session.calibrated_path())
    session.begin()
    spec = QuantSpec.from_config(config.QUANT)
    model = load_model(session, ranges=False)  # a calibrated checkpoint's are found anew
    if isinstance(model, IntegerModel):
        raise ConfigError(
            f"{weights_of(config)} is an exported INT8 checkpoint; its float weights are gone",
            "calibrate the float checkpoint it was made from, or use --eval on this one",
        )
    train, val = session.dataset("train", model), session.dataset("val", model)
    outcome = _calibrate(session, spec, model, train, val)
    if distributed.is_main():
        from swinq.commands import report  # matplotlib takes a second that other ranks save

        report.write(session, outcome)
    return 0


def _calibrate(
    session: Session, spec: QuantSpec, model: nn.Module, train: ImageDataset, val: ImageDataset
) -> Outcome:
    quantized, sample, seconds = find_ranges(session, spec, model, train)

    def judge(judging: Judging) -> None:
        for mode in session.modes:
            form = set_int8_mode(quantized, mode)
            judging.add(f"fake-quant mode {mode}", "fake-quant", mode, form)

    path = session.calibrated_path()
    return conclude(session, path, model, quantized, (sample, seconds), (train, val), judge)


def conclude(
    session: Session,
    path: Path,
    float_model: nn.Module,
    quantized: nn.Module,
    calibrated: tuple[list[int], float],
    images: tuple[ImageDataset, ImageDataset],
    judge: Callable[[Judging], None],
    judged: tuple[int, float] | None = None,
) -> Outcome:
    """Write the checkpoints, and judge everything on the same images.

    Args:
        path: where the calibrated checkpoint goes.
        calibrated: the calibration's sample and seconds. images: of training and validation.
        judge: adds the forms to judge between the float model and the exported ones.
        judged: of a trained model, the step it is of and its top-1 in percent.
    """
    (sample, seconds), (train, val) = calibrated, images
    files, notes = _write_checkpoints(session, quantized, path, judged)
    session.require_shared(*files.values())
    judging = Judging(session, val, float_model)
    judge(judging)
    judging.add_exported(files)
    found: Calibration = quantized.calibration  # type: ignore[assignment]
    return Outcome(
        float_model=float_model,
        quantized=quantized,
        calibration=found,
        sample=sample,
        train=train,
        val=val,
        files=files,
        judged=judging.judged,
        seconds=seconds,
        notes=[*found.notes, *notes, *judging.notes],
    )


def find_ranges(
    session: Session, spec: QuantSpec, model: nn.Module, train: ImageDataset
) -> tuple[nn.Module, list[int], float]:
    """Calibrate a quantized copy of a float model on the session's sample of the training images.

    Returns:
        the copy, with its `calibration`; the images' indices; the seconds it took.
    """
    calib = session.config.CALIB
    sample = calibration_sample(session, train)
    method = f"percentile {calib.PERCENTILE}" if calib.METHOD == "percentile" else calib.METHOD
    console.say(
        f"calibration: {len(sample)} images of {train.description}, recipe "
        f"{session.config.QUANT.NAME}, {method}, {distributed.world_size()} rank(s)"
    )
    started = time.monotonic()
    images = RankImages(session, train, sample)
    bar: console.progress[None] = console.progress(len(images), "calibrating")
    with bar:
        quantized = api.calibrate(
            model,
            images,
            recipe=spec,
            method=calib.METHOD,
            percentile=calib.PERCENTILE,
            on_image=bar.update,
        )
    found: Calibration = quantized.calibration  # type: ignore[assignment]
    seconds = time.monotonic() - started
    console.say(
        f"calibrated {len(found.histograms)} histograms in {seconds:.1f} s; "
        f"{len(found.vectors)} layers take a scale per input channel; the residual stream reaches "
        f"{max(found.residual_max.values()):.1f}"
    )
    found.sample_sha256 = sample_digest(train, sample)
    return quantized, sample, seconds


def calibration_sample(session: Session, train: ImageDataset) -> list[int]:
    """The indices of the training images that the configuration calibrates on."""
    calib = session.config.CALIB
    return calibration_indices(len(train), calib.NUM_BATCHES * calib.BATCH_SIZE, calib.SEED)


def _write_checkpoints(
    session: Session, quantized: nn.Module, calibrated: Path, judged: tuple[int, float] | None
) -> tuple[dict[str, Path], list[str]]:
    """Write the calibrated checkpoint and each mode's INT8 one on rank 0; name them on all."""
    spec: QuantSpec = quantized.quant_spec  # type: ignore[assignment]
    files = {"calibrated": calibrated}
    notes: list[str] = []
    problem = spec.exportable_problem()
    if problem is None:
        files |= {f"INT8 mode {mode}": session.int8_path(mode) for mode in session.modes}
    else:
        notes.append(f"not exported: {problem}")
        console.say(f"note: {notes[-1]}", "warning")
    if distributed.is_main():
        session.write_calibrated(calibrated, quantized, judged=judged)
        transform = session.transform(quantized)
        for mode in session.modes if problem is None else ():
            api.export(quantized, session.int8_path(mode), int8_mode=mode, transform=transform)
        for label, path in files.items():
            console.say(f"  {label}: {path} ({path.stat().st_size / 2**20:.2f} MiB)")
    return files, notes

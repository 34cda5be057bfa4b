"""Gathers what --calib found into a report, on rank 0, and tells the user where it is."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from swinq import config as configuration
from swinq import console
from swinq.calib.observers import bin_edges
from swinq.commands.calib import Outcome
from swinq.commands.forms import half_form
from swinq.commands.judging import Judged
from swinq.commands.session import Session, weights_of
from swinq.data.dataset import ImageDataset
from swinq.data.loader import BatchLoader
from swinq.data.sampling import calibration_indices, sample_digest
from swinq.int8 import choice
from swinq.int8.engine import CudaSwin
from swinq.latency import device_name, measure_latency, measure_together
from swinq.models.containers import FOLDER_FILES
from swinq.quant.insert import (
    named_quantizers,
    quantized_layers,
    set_active,
    set_int8_mode,
    used_quantizers,
)
from swinq.report.accuracy import latency_row, model_row
from swinq.report.environment import describe_file, describe_run, launcher
from swinq.report.layer_error import measure_clipping, measure_layer_errors
from swinq.report.quantizers import quantizer_row
from swinq.report.schema import (
    Configuration,
    DataSummary,
    InputFile,
    LatencyRow,
    QuantizerRow,
    Report,
    Sensitivity,
)
from swinq.report.sensitivity import measure_sensitivity, suggest_exclusions
from swinq.report.tensorboard import write_tensorboard
from swinq.report.verdict import headline
from swinq.report.write import write_report
from swinq.train.ranges import kind_of

LATENCY_WARMUP = 3
LATENCY_REPEATS = 31  # forwards of each model, fewer where they take long
LATENCY_SECONDS = 10.0  # that the float model's repeats may take
DIGESTED_IMAGES = 5_000  # evaluation images that are read once more, for the digest of their bytes


def write(session: Session, outcome: Outcome) -> Path:
    """Measure layers and latency, write the report, and print the summary.

    Returns:
        The HTML report's path.
    """
    config = session.config
    started = time.monotonic()
    set_int8_mode(outcome.quantized, session.modes[0])
    images = config.REPORT.SENSITIVITY_IMAGES
    batches = _sample_images(session, outcome.val, images) if images else []
    data, notes = _data(session, outcome)
    report = Report(
        model=session.name,
        run=describe_run(_command(), session.device, device_name("cpu")),
        configuration=Configuration(configuration.dump(config), dict(config.origins)),
        models=[_model_row(session, judged, outcome) for judged in outcome.judged],
        files=_files(session, outcome),
        data=data,
        quantizers=_quantizers(session, outcome, batches),
        layer_errors=_layer_errors(outcome, batches),
        layer_error_images=sum(map(len, batches)),
        sensitivity=_sensitivity(session, outcome, batches) if batches else None,
        latency=_latency(session, outcome),
        training=outcome.training,
        warnings=_warnings(outcome),
        notes=[*outcome.notes, *notes],
    )
    paths = write_report(report, session.folder)
    if config.REPORT.TENSORBOARD:
        write_tensorboard(report, session.folder / "tensorboard")
    _print_summary(report, paths, time.monotonic() - started)
    console.say(f"next: {_next_command(session, outcome, paths)}")
    return paths["html"]


def _command() -> list[str]:
    """The command as a user would repeat it."""
    return [*launcher(), *sys.argv[1:]]


def _checkpoint(session: Session) -> Path | None:
    """The file that holds the weights; of a folder from the hub the one that is read."""
    source = weights_of(session.config)
    if source is None or source.is_file():
        return source
    return next((source / name for name in FOLDER_FILES if (source / name).is_file()), None)


def _model_row(session: Session, judged: Judged, outcome: Outcome) -> Any:
    path = _checkpoint(session) if judged.kind == "float" else outcome.files.get(judged.name)
    return model_row(
        judged.name,
        judged.kind,  # type: ignore[arg-type]
        judged.scores,
        judged.comparison,
        int8_mode=judged.mode,
        size_bytes=path.stat().st_size if path else None,
        engine=judged.engine,
    )


def _files(session: Session, outcome: Outcome) -> list[InputFile]:
    source = _checkpoint(session)
    files = [describe_file("checkpoint", source)] if source else []
    return files + [describe_file(label, path) for label, path in outcome.files.items()]


def _warnings(outcome: Outcome) -> list[str]:
    """What a reader has to know before any figure."""
    made_up = [
        role
        for role, images in (("calibration", outcome.train), ("evaluation", outcome.val))
        if images.synthetic
    ]
    if not made_up:
        return []
    return [
        f"The {' and '.join(made_up)} images are random pixels (--data-path fake): accuracies and "
        "ranges in this report mean nothing."
    ]


def _data(session: Session, outcome: Outcome) -> tuple[list[DataSummary], list[str]]:
    """Both sets of images, and what there is to say of how they were used."""
    notes = [f"The calibration took {outcome.seconds:.1f} s."]
    transform = str(session.transform(outcome.float_model))
    evaluated = outcome.judged[0].scores.images if outcome.judged else 0
    digest = ""
    if evaluated:
        chosen = session.evaluation_indices(outcome.val) or range(len(outcome.val))
        digest = _evaluation_digest(outcome.val, chosen)
        if len(chosen) > DIGESTED_IMAGES:
            notes.append(
                f"The digest of the {len(chosen):,} evaluation images is of their names and "
                f"labels; up to {DIGESTED_IMAGES:,} images it is of their bytes too."
            )
    summaries = [
        DataSummary(
            "calibration",
            outcome.train.description,
            len(outcome.sample),
            len(outcome.train.classes),
            transform,
            outcome.calibration.sample_sha256,
        ),
        DataSummary(
            "evaluation",
            outcome.val.description,
            evaluated,
            len(outcome.val.classes),
            transform,
            digest,
            class_names=list(outcome.val.classes),
        ),
    ]
    return summaries, notes


def _evaluation_digest(dataset: ImageDataset, chosen: Sequence[int]) -> str:
    """Exact for few images; for many, where reading all would cost a pass, by name and label."""
    if len(chosen) <= DIGESTED_IMAGES:
        return sample_digest(dataset, chosen)
    return dataset.names_digest(sorted(chosen))


def _sample_images(session: Session, dataset: ImageDataset, count: int) -> list[Tensor]:
    """The images that layers are judged on, in batches on the device."""
    chosen = calibration_indices(len(dataset), min(count, len(dataset)), session.config.SEED)
    size = session.config.CALIB.BATCH_SIZE
    batches = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    return [batch.images.to(session.device) for batch in BatchLoader(dataset, batches)]


def _quantizers(session: Session, outcome: Outcome, batches: list[Tensor]) -> list[QuantizerRow]:
    found = outcome.calibration
    searched = f"{found.method} {found.percentile}" if found.method == "percentile" else "max"
    searched = searched if found.method in ("percentile", "max") else found.method
    used = used_quantizers(outcome.quantized)
    clipped = measure_clipping(outcome.quantized, list(used), batches) if batches else {}
    edges = bin_edges()
    training = outcome.training
    learned = training.learned_ranges if training and training.exports_trained else []
    rows = []
    for name, quantizer in named_quantizers(outcome.quantized).items():
        if name not in used:
            continue
        method = searched if name in found.histograms else "max"
        if name.rpartition(".")[0] in found.vectors and name.endswith(".input_quantizer"):
            method = "per input channel"
        if kind_of(name) in learned:
            method = f"learned, from {method}"
        rows.append(
            quantizer_row(
                name,
                quantizer.amax,
                method,
                clipped_share=clipped.get(name),
                counts=found.histograms.get(name),
                edges=edges,
            )
        )
    return rows


def _layer_errors(outcome: Outcome, batches: list[Tensor]) -> list[Any]:
    layers = list(quantized_layers(outcome.quantized))
    if not batches:
        return []
    with console.progress(batches, "layer errors") as shown:
        return measure_layer_errors(outcome.float_model, outcome.quantized, layers, shown)


def _sensitivity(session: Session, outcome: Outcome, batches: list[Tensor]) -> Sensitivity:
    model = outcome.quantized
    layers = list(quantized_layers(model))

    @torch.inference_mode()
    def predict() -> Tensor:
        return torch.cat([model(images) for images in batches])

    def set_quantized(names: set[str]) -> None:
        set_active(model, names)

    def progress(names: Any) -> Iterator[str]:
        return iter(console.progress(names, "sensitivity"))

    measured = measure_sensitivity(layers, predict, set_quantized, progress=progress)
    recipe = {"QUANT": model.quant_spec.to_config(), **_recipe_sections(session.config)}  # type: ignore[operator,union-attr]
    text = yaml.safe_dump(recipe, sort_keys=False)
    measured.suggestion = suggest_exclusions(measured, predict, set_quantized, text)
    return measured


def _recipe_sections(config: configuration.Config) -> dict[str, dict[str, Any]]:
    """What the run's recipe stated beside QUANT, which the advised one in its place repeats."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in configuration.leaves(config):
        section, _, name = key.partition(".")
        if section in ("CALIB", "INT8") and config.origins.get(key, "").startswith("recipe "):
            sections.setdefault(section, {})[name] = value
    return sections


def _latency(session: Session, outcome: Outcome) -> list[LatencyRow]:
    """Float and INT8 in turns, on this device; the CUDA engine as a CUDA graph."""
    batch = session.config.REPORT.LATENCY_BATCH
    made: dict[str, Any] = {"float": outcome.float_model}
    made |= {name: form() for name, form in half_form(outcome.float_model, session).items()}
    modes: dict[str, int] = {}
    for mode in session.modes:
        name = f"INT8 mode {mode}"
        if name in outcome.files:
            made[name] = choice.load(
                outcome.files[name], device=session.device, engine=session.config.ENGINE
            )
            modes[name] = mode
    calls = {
        name: model.graph(batch) if isinstance(model, CudaSwin) else model
        for name, model in made.items()
    }
    size: int = outcome.float_model.arch.img_size  # type: ignore[union-attr,assignment]
    one = measure_latency(outcome.float_model, batch, size, session.device, 1, 1)
    repeats = max(5, min(LATENCY_REPEATS, int(LATENCY_SECONDS * 1e3 / one.median_ms)))
    timed = measure_together(calls, batch, size, session.device, LATENCY_WARMUP, repeats)
    return [
        latency_row(
            name,
            "int8" if name in modes else "float",
            batch,
            latency.median_ms,
            device=latency.device_name,
            int8_mode=modes.get(name),
            engine=_engine(made[name]),
        )
        for name, latency in timed.items()
    ]


def _engine(model: Any) -> str:
    """What ran a model that was timed; "" for torch's own operations."""
    engine: str = getattr(model, "engine", "")
    return f"{engine}, CUDA graph" if isinstance(model, CudaSwin) else engine


def _print_summary(report: Report, paths: dict[str, Path], seconds: float) -> None:
    console.say(f"report written in {seconds:.1f} s")
    milliseconds = {row.name: row.median_ms for row in report.latency}
    rows = []
    for row in report.models:
        c = row.comparison
        rows.append(
            [
                row.name,
                f"{row.top1:.2f}",
                f"{row.top5:.2f}",
                f"{c.difference:+.2f}" if c else None,
                f"{c.low:+.2f} to {c.high:+.2f}" if c else None,
                f"{c.agreement_percent:.2f}" if c else None,
                f"{milliseconds[row.name]:.1f}" if row.name in milliseconds else None,
            ]
        )
    console.say("")
    header = ["model", "top-1 %", "top-5 %", "change", "95 % interval", "agree %", "ms/batch"]
    console.table(rows, header)
    console.say("")
    console.say(headline(report), "bold")
    console.say(f"report: {paths['html']}", "good")


def _next_command(session: Session, outcome: Outcome, paths: dict[str, Path]) -> str:
    """What a user most likely does now; flags of this run that still mean something are kept."""
    if session.config.DEMO:
        weights = "swin_tiny_patch4_window7_224.pth"
        action = "--train" if outcome.training else "--calib"
        flags = [action, "--resume", weights, "--data-path", "/data/imagenet"]
        return shlex.join([*launcher(), *flags])
    exported = outcome.files.get(f"INT8 mode {session.modes[0]}")
    if outcome.training is not None:  # another recipe would mean to train anew
        exported = exported or outcome.files["calibrated"]
    elif "recipe" in paths:
        return _command_with({"--recipe": str(paths["recipe"]), "--tag": "excluded"})
    if exported is None:  # the recipe exists as fake quantization only
        return _command_with({"--recipe": "int8", "--tag": "int8"})
    data = session.config.DATA.DATA_PATH if outcome.val.labelled else "LABELLED_IMAGES"
    zipped = ["--zip"] if session.config.DATA.ZIP_MODE else []
    flags = ["--eval", "--resume", str(exported), "--data-path", data, *zipped]
    return shlex.join([*launcher(), *flags])


def _command_with(flags: dict[str, str]) -> str:
    """This run's command with other values of some flags."""
    words = _command()
    for flag, value in flags.items():
        words = [word for word in words if not word.startswith(f"{flag}=")]
        if flag in words:
            at = words.index(flag)
            words[at : at + 2] = []
        words += [flag, value]
    return shlex.join(words)

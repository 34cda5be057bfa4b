"""The report as one tidy table: section, name, metric, value; a line per figure."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator
from typing import Any

from swinq.report.schema import Report

HEADER = ("section", "name", "metric", "value")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run


def to_csv(report: Report) -> str:
    """RFC 4180 with a header line; histograms and class names are left to the JSON."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for section, name, metric, value in _figures(report):
        writer.writerow([section, _inert(name), metric, _inert(value)])
    return text.getvalue()


def _figures(report: Report) -> Iterator[tuple[str, str, str, Any]]:
    yield "run", report.model, "schema_version", report.schema_version
    for metric in ("command", "date", "swinq_version"):
        yield "run", report.model, metric, getattr(report.run, metric)
    yield from _flat("environment", report.model, report.run.environment)
    for file in report.files:
        yield from _flat("file", file.role, file, skip=("role",))
    for data in report.data:
        yield from _flat("data", data.role, data, skip=("role", "class_names"))
    for model in report.models:
        yield from _flat("accuracy", model.name, model, skip=("name",))
    if training := report.training:
        lists = ("learned_ranges", "curve", "validations")
        yield from _flat("training", report.model, training, skip=lists)
        for kind in training.learned_ranges:
            yield "training", kind, "learned", True
        for point in training.curve:
            yield from _flat("training", f"step {point.step}", point, skip=("step",))
        for validation in training.validations:
            yield "training", f"step {validation.step}", "top1", validation.top1
    for latency in report.latency:
        name = f"{latency.name} batch {latency.batch}"
        yield from _flat("latency", name, latency, skip=("name", "batch"))
    for quantizer in report.quantizers:
        yield from _flat("quantizer", quantizer.name, quantizer, skip=("name", "histogram"))
    for error in report.layer_errors:
        yield from _flat("layer_error", error.layer, error, skip=("layer",))
    if sweep := report.sensitivity:
        yield "sensitivity", "all layers", "images", sweep.images
        yield "sensitivity", "all layers", "all_quantized", sweep.all_quantized
        for row in sweep.rows:
            yield from _flat("sensitivity", row.layer, row, skip=("layer",))
        for layer in sweep.suggestion.layers if sweep.suggestion else ():
            yield "suggestion", layer, "precision", "fp16"
    for number, verdict in enumerate(report.verdicts, start=1):
        yield "verdict", f"{verdict.subject} {number}", verdict.level, verdict.text
    for number, text in enumerate(report.warnings, start=1):
        yield "warning", str(number), "text", text
    for number, text in enumerate(report.notes, start=1):
        yield "note", str(number), "text", text


def _flat(
    section: str, name: str, row: Any, skip: tuple[str, ...] = (), prefix: str = ""
) -> Iterator[tuple[str, str, str, Any]]:
    """Every field that has a value; those of nested rows as 'outer.inner'."""
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if field.name in skip or value is None or value == "":
            continue
        if dataclasses.is_dataclass(value):
            yield from _flat(section, name, value, prefix=f"{prefix}{field.name}.")
        elif isinstance(value, dict):
            for key, item in value.items():
                yield section, name, f"{prefix}{field.name}.{key}", item
        else:
            yield section, name, prefix + field.name, value


def _inert(cell: Any) -> Any:
    """Text that a spreadsheet would take for a formula, marked as text; figures as they are."""
    if isinstance(cell, str) and cell.startswith(_FORMULA):
        return "'" + cell
    return cell

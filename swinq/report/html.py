"""The report as one HTML file: offline, without scripts, in the reader's light or dark scheme.

Class names, layer names, paths and configuration come from files that anyone may have made, so the
template escapes everything; only the plots' data URIs, made here, go into attributes as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from swinq.report import figures, plots
from swinq.report.schema import (
    LatencyRow,
    LayerErrorRow,
    QuantizerRow,
    Report,
    SensitivityRow,
)
from swinq.report.training import training_facts, training_levels
from swinq.report.verdict import accuracy_verdict, headline, headline_row

TEMPLATE = "report.html.j2"
SHOWN = 10  # rows of a long table that are open; the rest unfolds
SHOWN_CLASSES = 12


@dataclass
class Card:
    """A figure in large print."""

    label: str
    figure: str
    unit: str
    detail: str
    level: str = ""


def to_html(report: Report) -> str:
    """The whole page; equal reports give equal text."""
    environment = Environment(
        loader=PackageLoader("swinq.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        points=figures.points,
        significant=figures.significant,
        decibels=figures.decibels,
        share=figures.share,
        size=figures.size,
        p_value=lambda p: figures.p_value(p).removeprefix("= "),
    )
    shown = headline_row(report)
    compared = [row for row in report.models if row.comparison]
    return environment.get_template(TEMPLATE).render(
        report=report,
        headline=headline(report),
        shown=shown,
        cards=cards(report),
        worst_errors=sorted(report.layer_errors, key=_worst)[:SHOWN],
        worst_sensitivity=_most_sensitive(report)[:SHOWN],
        most_clipped=sorted(report.quantizers, key=_clipped)[:SHOWN],
        speed=speed_rows(report.latency),
        training=training_facts(report.training) if report.training else [],
        plots={
            "accuracy": plots.accuracy_plot(report.models) if compared else "",
            "errors": plots.layer_error_plot(report.layer_errors) if report.layer_errors else "",
            "sensitivity": plots.sensitivity_plot(report.sensitivity)
            if report.sensitivity and report.sensitivity.rows
            else "",
            "training": plots.training_plot(report.training, training_levels(report))
            if report.training and report.training.curve
            else "",
            "amax": plots.amax_plot(report.quantizers) if report.quantizers else "",
        },
        histograms=plots.histogram_plots(report.quantizers),
        shown_classes=SHOWN_CLASSES,
        shown_rows=SHOWN,
    )


def cards(report: Report) -> list[Card]:
    """Float, every other form of the model, and the gain in time and in size."""
    made = []
    levels = {row.name: accuracy_verdict(row).level for row in report.models if row.comparison}
    for row in report.models:
        detail = f"top-1 of {figures.count(row.images, 'image')}"
        if row.comparison:
            detail = f"top-1, {figures.points(row.comparison.difference)} points"
        made.append(Card(row.name, f"{row.top1:.2f}", "%", detail, levels.get(row.name, "")))
    made += _gain_cards(report)
    return made


def _gain_cards(report: Report) -> list[Card]:
    made = []
    ratios = [row for row in speed_rows(report.latency) if row.gain and row.row.kind == "int8"]
    if ratios:
        best = max(ratios, key=lambda row: row.gain or 0)
        detail = f"{best.row.name}, batch {best.row.batch}, against float"
        level = "good" if (best.gain or 0) > 1 else "warning"
        made.append(Card("Speed", f"{best.gain:.2f}", "×", detail, level))
    whole = next((row.size_bytes for row in report.models if row.kind == "float"), None)
    small = next((row.size_bytes for row in report.models if row.kind == "int8"), None)
    if whole and small:
        detail = f"against {figures.size(whole)} of the checkpoint"
        figure, unit = figures.size(small).split()
        made.append(Card("INT8 file", figure, unit, detail))
    return made


@dataclass
class SpeedRow:
    """A latency and how many times as fast as float that is (None for float itself)."""

    row: LatencyRow
    gain: float | None
    bar: float  # images/s as a share of the best at any size


def speed_rows(latency: list[LatencyRow]) -> list[SpeedRow]:
    """Each measured time beside the fastest float at the same batch size and device."""
    best = max((row.images_per_second for row in latency), default=0.0)
    made = []
    for row in latency:
        floats = [
            other.median_ms
            for other in latency
            if other.kind == "float" and (other.batch, other.device) == (row.batch, row.device)
        ]
        gain = min(floats) / row.median_ms if floats and row.kind != "float" else None
        made.append(SpeedRow(row, gain, row.images_per_second / best))
    return made


def _worst(row: LayerErrorRow) -> float:
    return row.minimum


def _clipped(row: QuantizerRow) -> float:
    return -(row.clipped_share or 0.0)


def _most_sensitive(report: Report) -> list[SensitivityRow]:
    rows = report.sensitivity.rows if report.sensitivity else []
    return sorted(rows, key=lambda row: -row.only_this_quantized)

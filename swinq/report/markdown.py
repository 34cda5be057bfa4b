"""The report as one Markdown page, for a pull request or a model card."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from swinq.report.figures import decibels, p_value, points, share, significant, size
from swinq.report.schema import LatencyRow, ModelRow, Report
from swinq.report.training import training_facts
from swinq.report.verdict import headline

WORST_LAYERS = 10
_SYMBOLS = {"good": "✓", "note": "•", "warning": "⚠", "bad": "✗"}


def to_markdown(report: Report) -> str:
    """Headline, verdicts, tables and what it takes to repeat the run; details are in the HTML."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"# {_text(headline(report))}"
    yield f"\n{_text(report.model)}, {_text(report.run.date)}, swinq {report.run.swinq_version}\n"
    for text in report.warnings:
        yield f"- ⚠ {_text(text)}"
    for verdict in report.verdicts:
        yield f"- {_SYMBOLS[verdict.level]} {_text(verdict.text)}"
    for text in report.notes:
        yield f"- • {_text(text)}"
    yield "\n## Accuracy\n"
    yield from _table(_ACCURACY, [_accuracy(row) for row in report.models])
    yield from _training(report)
    if report.latency:
        yield "\n## Speed\n"
        rows = [
            [
                _name(row),
                str(row.batch),
                significant(row.median_ms),
                significant(row.images_per_second),
            ]
            for row in report.latency
        ]
        yield from _table(("model", "batch", "median ms", "images/s"), rows)
    yield from _sensitivity(report)
    yield from _layers(report)
    yield "\n## Repeat it\n"
    yield from _fenced(report.run.command, "sh")
    environment = report.run.environment
    yield f"\n{_text(environment.device)}, {_text(environment.platform)}, "
    yield f"Python {environment.python}, torch {environment.torch}, "
    yield f"{environment.threads} threads, {environment.ranks} ranks\n"
    rows = [[_text(f.role), _text(f.path), size(f.size_bytes), f.sha256] for f in report.files]
    rows += [
        [_text(d.role), _text(d.source), f"{d.images:,} images", d.sha256] for d in report.data
    ]
    yield from _table(("input", "path", "size", "sha256"), rows)


_ACCURACY = (
    *("model", "images", "top-1", "top-5", "difference", "95 % interval"),
    *("p", "lost", "won", "agreement", "mean KL", "file"),
)


def _accuracy(row: ModelRow) -> list[str]:
    cells = [_name(row), f"{row.images:,}", f"{row.top1:.2f}", f"{row.top5:.2f}"]
    c = row.comparison
    if c is None:
        return [*cells, *["–"] * 7, size(row.size_bytes)]
    return [
        *cells,
        points(c.difference),
        f"{points(c.low)} … {points(c.high)}",
        p_value(c.p_value).removeprefix("= "),
        f"{c.only_reference:,}",
        f"{c.only_other:,}",
        f"{c.agreement_percent:.2f} %",
        significant(c.mean_kl),
        size(row.size_bytes),
    ]


def _name(row: ModelRow | LatencyRow) -> str:
    return _text(f"{row.name} ({row.engine})" if row.engine else row.name)


def _training(report: Report) -> Iterator[str]:
    if not (summary := report.training):
        return
    yield "\n## Training\n"
    for label, text in training_facts(summary):
        yield f"- {label}: {_text(text)}"
    if summary.validations:
        yield ""
        rows = [[f"{point.step:,}", f"{point.top1:.2f}"] for point in summary.validations]
        yield from _table(("step", "top-1"), rows)


def _sensitivity(report: Report) -> Iterator[str]:
    if not (sweep := report.sensitivity):
        return
    yield f"\n## Sensitivity, {sweep.images:,} images\n"
    yield f"All layers quantized: KL {significant(sweep.all_quantized)} nats to float.\n"
    worst = sorted(sweep.rows, key=lambda row: -row.only_this_quantized)[:WORST_LAYERS]
    rows = [
        [
            _text(row.layer),
            significant(row.only_this_quantized),
            significant(row.only_this_float),
        ]
        for row in worst
    ]
    yield from _table(("layer", "KL, only this quantized", "KL, only this float"), rows)
    if sweep.suggestion and sweep.suggestion.recipe:
        yield f"\n{_text(sweep.suggestion.reason)}:\n"
        yield from _fenced(sweep.suggestion.recipe, "yaml")


def _layers(report: Report) -> Iterator[str]:
    if not report.layer_errors:
        return
    yield f"\n## SQNR at layer outputs, dB, {report.layer_error_images:,} images\n"
    worst = sorted(report.layer_errors, key=lambda row: row.minimum)[:WORST_LAYERS]
    rows = [
        [
            _text(row.layer),
            *map(decibels, (row.total, row.minimum, row.percentile_1, row.median)),
            f"{row.dead_channels} of {row.channels}",
        ]
        for row in worst
    ]
    yield from _table(("layer", "total", "min", "1st pct", "median", "dead channels"), rows)
    clipped = sorted(report.quantizers, key=lambda row: -(row.clipped_share or 0))[:WORST_LAYERS]
    if clipped:
        yield "\n## Most clipped quantizers\n"
        rows = [
            [
                _text(row.name),
                significant(row.amax.minimum),
                significant(row.amax.maximum),
                share(row.clipped_share),
                _text(row.method),
            ]
            for row in clipped
        ]
        yield from _table(("quantizer", "amax min", "amax max", "clipped", "method"), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """First column to the left, figures to the right."""
    yield "| " + " | ".join(header) + " |"
    yield "|---|" + "---:|" * (len(header) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _text(value: str) -> str:
    """Names and paths as plain text: no markup, no HTML, no new cell, one line."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", " ".join(value.split()))


def _fenced(text: str, language: str) -> Iterator[str]:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    yield f"{fence}{language}\n{text.rstrip()}\n{fence}"

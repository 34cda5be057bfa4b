"""What a report says of training (QAT): its facts, the same on every page, and its verdicts."""

from __future__ import annotations

from swinq.console import duration
from swinq.report.figures import count, points, significant
from swinq.report.schema import ModelRow, Report, TrainingSummary, Verdict

# In points of top-1; a smaller move from one validation to the next is not worth a sentence.
MOVED = 0.1


def training_facts(summary: TrainingSummary) -> list[tuple[str, str]]:
    """Label and text of what was done, in the order in which it is read."""
    ranges = "stayed as calibrated"
    if summary.learned_ranges:
        kinds = ", ".join(summary.learned_ranges)
        ranges = f"learned for {kinds}, at a relative rate of {significant(summary.range_rate)}"
    facts = [
        ("Images", summary.source),
        (
            "Length",
            f"{count(summary.epochs, 'epoch')} of {count(summary.images, 'image')}: "
            f"{count(summary.steps, 'step')} of {summary.images_per_step:,}",
        ),
        ("Time", f"{duration(summary.seconds)}, {significant(summary.images_per_second)} images/s"),
        ("Arithmetic", f"{summary.precision} matrix products, fp32 fake quantization"),
        ("Learning rate", f"{summary.rate:.3g} at its peak"),
        ("Ranges", ranges),
        ("Learned from", " and ".join(_sources(summary))),
    ]
    exported = f"the model after step {summary.best_step or summary.steps:,}"
    if not summary.exports_trained:
        exported = "the calibrated model, as it was before training: no step was better"
    return [*facts, ("Exported", exported)]


def _sources(summary: TrainingSummary) -> list[str]:
    """What the loss was against."""
    labels = ["labels"] if summary.label_scale else []
    return [*labels, summary.teacher] if summary.teacher else labels


def before_and_after(report: Report) -> tuple[ModelRow, ModelRow] | None:
    """The rows of the fake-quantized model before and after training, if both were judged."""
    rows = [row for row in report.models if row.kind == "fake-quant"]
    return (rows[0], rows[-1]) if report.training and len(rows) > 1 else None


def training_levels(report: Report) -> dict[str, float]:
    """Top-1 that training is held against: the float model's, and that of calibration alone."""
    levels = {row.name: row.top1 for row in report.models if row.kind == "float"}
    if pair := before_and_after(report):
        levels["before training"] = pair[0].top1
    return levels


def training_verdicts(report: Report) -> list[Verdict]:
    """What training gave, how the exported model was chosen, and whether it ended too soon."""
    summary = report.training
    if summary is None:
        return []
    verdicts = []
    if pair := before_and_after(report):
        before, after = pair
        gain = after.top1 - before.top1
        moved = f"from {before.top1:.2f} to {after.top1:.2f} %"
        if gain > 0:
            text = f"Training gave {points(gain)} points of top-1 over calibration, {moved}."
            verdicts.append(Verdict("training", "good", text))
        else:
            text = f"Training gained nothing over calibration alone: top-1 {moved}."
            verdicts.append(Verdict("training", "warning" if gain < -MOVED else "note", text))
    if len(summary.validations) > 1:
        verdicts.append(_choice(summary))
    return verdicts


def _choice(summary: TrainingSummary) -> Verdict:
    """How the exported step was chosen, and what the curve says of longer or slower training."""
    top1 = [point.top1 for point in summary.validations]
    text = (
        f"The best of {len(top1)} validations was exported, chosen by accuracy on these same "
        "images, which flatters it a little."
    )
    if top1[-1] < max(top1) - MOVED:
        fell = f" Accuracy fell by {max(top1) - top1[-1]:.2f} points after it: a lower rate may do."
        return Verdict("training", "warning", text + fell)
    if top1[-1] == max(top1) > max(top1[:-1]) + MOVED:
        text += " It was still rising: more epochs may give more."
    return Verdict("training", "note", text)

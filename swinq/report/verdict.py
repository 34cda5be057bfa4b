"""Plain-English judgements of a report's numbers, good or bad alike."""

from __future__ import annotations

import math

from swinq.report.figures import changes, count, p_value, points, share, significant
from swinq.report.schema import (
    ComparisonRow,
    LatencyRow,
    Level,
    ModelRow,
    QuantizerRow,
    Report,
    Verdict,
)
from swinq.report.training import training_verdicts

FINE = 0.1  # points: the loss that users ask to be shown
GOOD_LOSS = 0.3  # points: more than this is worth a look at the layers
SIGNIFICANT = 0.05
MUCH_CLIPPED = 0.01  # share of values
DROWNED_DB = 10.0  # median channel of a layer
SAME_SPEED = 0.02  # relative; under it two times are called equal


def judge(report: Report) -> list[Verdict]:
    """All verdicts, accuracy first."""
    verdicts = [accuracy_verdict(row) for row in report.models if row.comparison]
    verdicts += resolution_verdicts(report.models)
    verdicts += training_verdicts(report)
    verdicts += speed_verdicts(report.latency)
    verdicts += range_verdicts(report.quantizers)
    return verdicts + layer_verdicts(report)


def headline(report: Report) -> str:
    """One sentence for the top of the page."""
    row = headline_row(report)
    if row is None or row.comparison is None:
        return f"{report.model}: nothing was compared with the float model"
    c = row.comparison
    interval = f"95 % interval {points(c.low)} … {points(c.high)}"
    return f"{row.name} {changes(c.difference)} ({interval})"


def headline_row(report: Report) -> ModelRow | None:
    """What would be shipped: the first INT8 model, else the first fake-quant one.

    After training the last fake-quant one, as the first is from before it.
    """
    for kind in ("int8", "fake-quant"):
        rows = [row for row in report.models if row.kind == kind and row.comparison]
        if rows:
            return rows[-1] if report.training and kind == "fake-quant" else rows[0]
    return None


def accuracy_verdict(row: ModelRow) -> Verdict:
    """Whether the difference to float is real, and whether it is large."""
    c = row.comparison
    if c is None:
        raise ValueError(f"{row.name} was compared with nothing")
    if c.images == 0:
        return Verdict("accuracy", "warning", f"{row.name}: no images were compared.")
    flips = f"{c.only_reference:,} lost, {c.only_other:,} won"
    text = f"{row.name} {changes(c.difference)} of top-1 on {count(c.images, 'image')} ({flips}). "
    real = c.p_value < SIGNIFICANT
    text += f"That is {'' if real else 'no '}more than chance (McNemar p {p_value(c.p_value)})."
    level: Level = "good"
    if c.difference < -GOOD_LOSS:
        level = "bad" if real else "warning"
    elif (real and c.difference < 0) or c.low < -GOOD_LOSS:
        level = "note"
    return Verdict("accuracy", level, text)


def resolution_verdicts(models: list[ModelRow]) -> list[Verdict]:
    """For each number of images that models were compared on, the finest difference it shows."""
    widest: dict[int, ComparisonRow] = {}
    for c in (row.comparison for row in models):
        if c and c.images and c.high - c.low > _width(widest.get(c.images)):
            widest[c.images] = c
    return [Verdict("accuracy", "note", resolution(c)) for c in widest.values()]


def _width(c: ComparisonRow | None) -> float:
    return c.high - c.low if c else 0.0


def resolution(c: ComparisonRow) -> str:
    """What so many images can show, and how many it would take to show 0.1 points."""
    half_width = (c.high - c.low) / 2
    if half_width <= FINE:
        return f"{count(c.images, 'image')} can show differences down to {half_width:.2f} points."
    wanted = c.images * (half_width / FINE) ** 2  # the interval shrinks with the root of images
    return (
        f"{count(c.images, 'image')} cannot show differences under {half_width:.2f} points; "
        f"{FINE} would take about {_round_up(wanted):,}."
    )


def speed_verdicts(rows: list[LatencyRow]) -> list[Verdict]:
    """INT8 against the fastest float at the same batch size, a sentence per INT8 model."""
    fastest: dict[tuple[int, str], float] = {}  # (batch, device) -> ms
    for row in rows:
        if row.kind == "float":
            key = (row.batch, row.device)
            fastest[key] = min(row.median_ms, fastest.get(key, math.inf))
    verdicts = []
    for name in dict.fromkeys(row.name for row in rows if row.kind == "int8"):
        pairs = [
            (fastest[row.batch, row.device], row)
            for row in rows
            if row.name == name and (row.batch, row.device) in fastest and row.median_ms > 0
        ]
        if pairs:
            verdicts.append(_speed_verdict(name, pairs))
    return verdicts


def _speed_verdict(name: str, pairs: list[tuple[float, LatencyRow]]) -> Verdict:
    """`pairs` holds (float ms, INT8 row) for each batch size."""

    def gain(pair: tuple[float, LatencyRow]) -> float:
        return pair[0] / pair[1].median_ms

    def figures(pair: tuple[float, LatencyRow]) -> str:
        float_ms, row = pair
        times = f"{significant(row.median_ms)} against {significant(float_ms)} ms"
        return f"batch {row.batch}: {times}"

    slow, fast = min(pairs, key=gain), max(pairs, key=gain)
    faster = f"{gain(fast):.2f} times as fast"
    if gain(slow) < 1 - SAME_SPEED:
        times = 1 / gain(slow)
        text = f"{name} is slower than float here: {times:.2f} times the time ({figures(slow)})."
        if gain(fast) > 1 + SAME_SPEED:
            text += f" At another size it is {faster} ({figures(fast)})."
        return Verdict("speed", "warning", text)
    if gain(fast) <= 1 + SAME_SPEED:
        return Verdict("speed", "warning", f"{name} is no faster than float ({figures(fast)}).")
    if gain(slow) <= 1 + SAME_SPEED:
        text = f"{name} is {faster} as float ({figures(fast)}), but not always ({figures(slow)})."
        return Verdict("speed", "note", text)
    if len(pairs) > 1:
        faster = f"{gain(slow):.2f} to {faster}"
    return Verdict("speed", "good", f"{name} is {faster} as float ({figures(fast)}).")


def range_verdicts(rows: list[QuantizerRow]) -> list[Verdict]:
    """Dead channels and heavy clipping."""
    verdicts = []
    if dead := [row for row in rows if row.dead_channels]:
        channels = count(sum(row.dead_channels for row in dead), "channel")
        text = f"{channels} never saw a value other than 0: {_first(dead)}."
        verdicts.append(Verdict("ranges", "warning", text))
    clipped = [row for row in rows if (row.clipped_share or 0) > MUCH_CLIPPED]
    if clipped:
        clipped.sort(key=lambda row: row.clipped_share or 0, reverse=True)
        text = (
            f"{count(len(clipped), 'quantizer')} with more than {100 * MUCH_CLIPPED:g} % of values "
            f"clipped, at most {share(clipped[0].clipped_share)}: {_first(clipped)}."
        )
        verdicts.append(Verdict("ranges", "warning", text))
    return verdicts


def layer_verdicts(report: Report) -> list[Verdict]:
    """Channels that noise drowns, layers where it drowns most, and what the sweep advises."""
    verdicts = []
    errors = report.layer_errors
    # errors are against the float model from before training, which changed layers on purpose
    trained = report.training is not None and report.training.exports_trained
    level: Level = "note" if trained else "warning"
    noise = "What rounding and training changed" if trained else "Noise"
    if dead := [row for row in errors if row.dead_channels]:
        worst = max(dead, key=lambda row: row.dead_channels)
        text = (
            f"{noise} drowns {count(sum(row.dead_channels for row in dead), 'output channel')} in "
            f"{count(len(dead), 'layer')}, most in {worst.layer}: {worst.dead_channels} of "
            f"{worst.channels}, though its total is {worst.total:.1f} dB."
        )
        verdicts.append(Verdict("layers", level, text))
    if drowned := [row for row in errors if row.median < DROWNED_DB]:
        worst = min(drowned, key=lambda row: row.median)
        text = (
            f"{count(len(drowned), 'layer')} with a median channel under {DROWNED_DB:.0f} dB, "
            f"the worst {worst.layer} with {worst.median:.1f} dB"
            + (", what training changed included." if trained else ".")
        )
        verdicts.append(Verdict("layers", level, text))
    suggestion = report.sensitivity.suggestion if report.sensitivity else None
    if suggestion:
        text = suggestion.reason[:1].upper() + suggestion.reason[1:] + "."
        verdicts.append(Verdict("layers", "note" if suggestion.worth_it else "good", text))
    return verdicts


def _first(rows: list[QuantizerRow], shown: int = 3) -> str:
    more = f" and {len(rows) - shown} more" if len(rows) > shown else ""
    return ", ".join(row.name for row in rows[:shown]) + more


def _round_up(value: float) -> int:
    """To two significant digits."""
    step = 10 ** max(int(math.log10(max(value, 1))) - 1, 0)
    return math.ceil(value / step) * step

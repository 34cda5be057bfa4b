"""The report's pictures, each a data URI; what a plot shows is in a table of the page as well."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, MaxNLocator

from swinq.report.schema import (
    LayerErrorRow,
    ModelRow,
    QuantizerRow,
    Sensitivity,
    TrainingSummary,
)
from swinq.report.svg import (
    ACCENT,
    ALARM,
    GRID,
    INK,
    MUTED,
    SECOND,
    SHADE,
    data_uri,
    new_figure,
    styled,
)

WIDTH = 10.0  # inches, of every figure
BARS = 20  # layers in the sensitivity plot; the table has all
CEILING_DB = 80.0  # nothing in INT8 is better; what is exact is drawn here
_PLACE = re.compile(r"layers\.(\d+)\.(blocks\.\d+|downsample)\.(.+)")


@styled
def accuracy_plot(models: Sequence[ModelRow]) -> str:
    """Difference to float of each model with its 95 % interval."""
    rows = [(row.name, row.comparison) for row in models if row.comparison][::-1]
    figure, (ax,) = new_figure(WIDTH, 0.7 + 0.34 * len(rows))
    ax.axvline(0, color=MUTED, linewidth=1)
    for y, (_, c) in enumerate(rows):
        color = ALARM if c.high < 0 else ACCENT
        ax.plot(
            [c.low, c.high], [y, y], color=color, linewidth=3, solid_capstyle="round", alpha=0.45
        )
        ax.plot(c.difference, y, "o", color=color, markersize=6)
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.tick_params(axis="y", labelcolor=INK, length=0)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    reach = max(0.1, *(max(-c.low, c.high) for _, c in rows)) * 1.08
    ax.set_xlim(-reach, reach)
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x:+.2g}".replace("-", "−") if x else "0")
    )
    ax.set_xlabel("points of top-1 against float, with 95 % interval")
    ax.grid(axis="x")
    ax.spines["left"].set_visible(False)
    return data_uri(figure)


@styled
def training_plot(summary: TrainingSummary, levels: Mapping[str, float]) -> str:
    """Loss and rate along the steps; beside it the quantized model's top-1 against `levels`."""
    judged = bool(summary.validations)
    figure, axes = new_figure(WIDTH, 2.9, 1, 2 if judged else 1)
    loss, steps = axes[0], [point.step for point in summary.curve]
    loss.plot(steps, [point.loss for point in summary.curve], color=ACCENT)
    loss.set_title("loss, and the learning rate (dashed)")
    loss.set_xlabel("step")
    loss.grid(axis="y")
    rate = loss.twinx()
    rate.plot(steps, [point.rate for point in summary.curve], color=MUTED, linestyle="--")
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.1e}" if y else "0"))
    if judged:
        top1 = axes[1]
        for (name, level), style in zip(levels.items(), ("-", ":"), strict=False):
            top1.axhline(level, color=MUTED, linewidth=1, linestyle=style, label=name)
        validated = [point.step for point in summary.validations]
        scores = [point.top1 for point in summary.validations]
        top1.plot(validated, scores, "o-", color=ACCENT, markersize=4)
        if summary.best_step in validated:
            best = scores[validated.index(summary.best_step)]
            top1.plot(summary.best_step, best, "o", color=SECOND, markersize=8)
        top1.set_title("top-1 of the quantized model, %")
        top1.set_xlabel("step")
        top1.grid(axis="y")
        if levels:
            top1.legend(loc="best")
    for ax in axes:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return data_uri(figure)


@styled
def layer_error_plot(rows: Sequence[LayerErrorRow]) -> str:
    """SQNR along the depth: what the total says, and what the channels say."""
    figure, (ax,) = new_figure(WIDTH, 3.1)
    depth = range(len(rows))

    def clip(values: Sequence[float]) -> list[float]:
        return [min(max(value, -5.0), CEILING_DB) for value in values]

    minimum = clip([row.minimum for row in rows])
    ax.fill_between(depth, minimum, clip([r.median for r in rows]), color=ACCENT, alpha=0.14, lw=0)
    ax.plot(depth, clip([row.total for row in rows]), color=MUTED, label="total", linestyle="--")
    ax.plot(depth, clip([row.median for row in rows]), color=ACCENT, label="median channel")
    ax.plot(depth, clip([row.percentile_1 for row in rows]), color=SECOND, label="1st percentile")
    ax.plot(depth, minimum, "o", color=ALARM, markersize=2.5, label="worst channel")
    _mark_stages(ax, [row.layer for row in rows], "stage ")
    ax.set_ylabel("SQNR, dB")
    ax.grid(axis="y")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.06), ncols=4, borderaxespad=0)
    return data_uri(figure)


@styled
def sensitivity_plot(sensitivity: Sensitivity) -> str:
    """The most sensitive layers: what each costs alone, and what leaving it out gives back."""
    rows = sorted(sensitivity.rows, key=lambda row: row.only_this_quantized)[-BARS:]
    figure, (alone, back) = new_figure(WIDTH, 0.9 + 0.2 * len(rows), 1, 2, sharey=True)
    advised = sensitivity.suggestion.layers if sensitivity.suggestion else []
    colors = [ALARM if row.layer in advised else ACCENT for row in rows]
    depth = range(len(rows))
    alone.barh(depth, [row.only_this_quantized for row in rows], color=colors, height=0.7)
    alone.set_title("KL with only this layer quantized")
    gains = [sensitivity.all_quantized - row.only_this_float for row in rows]
    back.barh(depth, gains, color=colors, height=0.7)
    back.set_title("KL given back by leaving this layer in float")
    back.axvline(0, color=MUTED, linewidth=1)
    alone.set_yticks(depth, [row.layer for row in rows], fontsize=8)
    for ax in (alone, back):
        ax.set_ylim(-0.6, len(rows) - 0.4)
        ax.set_xlabel("nats")
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0, labelcolor=INK)
        ax.spines["left"].set_visible(False)
    return data_uri(figure)


@styled
def amax_plot(rows: Sequence[QuantizerRow]) -> str:
    """Ranges along the depth, a panel for each kind of quantizer; bars span the channels."""
    panels = [
        ("inputs of GEMMs", [r for r in rows if r.name.endswith(".input_quantizer")]),
        ("outputs of GEMMs", [r for r in rows if r.name.endswith(".output_quantizer")]),
        ("weights", [r for r in rows if r.name.endswith(".weight_quantizer")]),
    ]
    taken = {row.name for _, part in panels for row in part}
    panels.append(("q, k, v", [row for row in rows if row.name not in taken]))
    panels = [(title, part) for title, part in panels if part]
    figure, axes = new_figure(
        WIDTH, 2.2 * math.ceil(len(panels) / 2), math.ceil(len(panels) / 2), 2
    )
    for ax, (title, part) in zip(axes, panels, strict=False):
        depth = range(len(part))
        floor = min((r.amax.median for r in part if r.amax.median > 0), default=1.0) / 64
        low, middle, high = (
            [max(value, floor) for value in values]
            for values in (
                [r.amax.minimum for r in part],
                [r.amax.median for r in part],
                [r.amax.maximum for r in part],
            )
        )
        ax.vlines(depth, low, high, color=ACCENT, alpha=0.35, linewidth=2)
        ax.plot(depth, middle, "o", color=ACCENT, markersize=2.5)
        dead = [i for i, row in enumerate(part) if row.dead_channels]
        ax.plot(dead, [low[i] for i in dead], "x", color=ALARM, markersize=5)
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))
        ax.minorticks_off()
        ax.set_title(f"amax of {title}, by stage")
        ax.grid(axis="y")
        _mark_stages(ax, [row.name for row in part])
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return data_uri(figure)


OCTAVES_BELOW, OCTAVES_ABOVE = 16.0, 3.0  # of amax, that a histogram shows
ROUNDED_TO_0 = -math.log2(254.0)  # half a code: what is smaller becomes 0
_CELL, _GAP = 0.86, 0.14  # shares of a grid square


def histogram_plots(rows: Sequence[QuantizerRow]) -> dict[str, str]:
    """A grid of histograms for each stage: block by block down, quantizer by quantizer across.

    All cells share their axes: across, octaves relative to amax; up, the logarithm of the count.
    """
    stages: dict[str, dict[tuple[str, str], QuantizerRow]] = {}
    for row in rows:
        if row.histogram and row.histogram.counts and row.amax.maximum > 0:
            place = _PLACE.fullmatch(row.name)
            stage, block, what = place.groups() if place else ("", "", row.name)
            name = f"Stage {int(stage) + 1}" if stage else "Others"
            what = what.removesuffix("_quantizer").replace("attn.", "").replace("mlp.", "")
            stages.setdefault(name, {})[block.replace("blocks.", "block "), what] = row
    return {name: _histogram_grid(cells) for name, cells in stages.items()}


@styled
def _histogram_grid(cells: dict[tuple[str, str], QuantizerRow]) -> str:
    """`cells` maps (row's label, column's label) to a quantizer."""
    down = list(dict.fromkeys(block for block, _ in cells))
    across = list(dict.fromkeys(what for _, what in cells))
    figure, (ax,) = new_figure(WIDTH, 0.4 + 0.62 * len(down))
    inside: list[tuple[float, float]] = []
    clipped: list[tuple[float, float]] = []
    frames: list[tuple[float, float]] = []
    zeroed: list[tuple[float, float]] = []

    def rectangle(x0: float, x1: float, y0: float, y1: float) -> list[tuple[float, float]]:
        return [(x0, y0), (x0, y1), (x1, y1), (x1, y0), (x0, y0)]

    def position(octaves: float) -> float:
        """Place in a cell, 0..1, of a value so many octaves above amax."""
        clamped = min(max(octaves, -OCTAVES_BELOW), OCTAVES_ABOVE)
        return (clamped + OCTAVES_BELOW) / (OCTAVES_BELOW + OCTAVES_ABOVE) * _CELL

    for (block, what), row in cells.items():
        x, y = across.index(what), -down.index(block)
        histogram = row.histogram
        assert histogram is not None
        frames += rectangle(x, x + _CELL, y, y + _CELL)
        zeroed += rectangle(x, x + position(ROUNDED_TO_0), y, y + _CELL)
        tallest = math.log1p(max(histogram.counts))
        amax = math.log2(row.amax.maximum)
        for i, n in enumerate(histogram.counts):
            left = histogram.low + i / histogram.per_octave - amax
            right = left + 1 / histogram.per_octave
            if n and right > -OCTAVES_BELOW and left < OCTAVES_ABOVE:
                top = y + _CELL * math.log1p(n) / tallest
                bars = clipped if left >= 0 else inside
                bars += rectangle(x + position(left), x + position(right), y, top)
    _fill(ax, frames, SHADE, edge=GRID)
    _fill(ax, zeroed, GRID)
    _fill(ax, inside, ACCENT)
    _fill(ax, clipped, ALARM)
    for block, what in cells:
        line, y = across.index(what) + position(0), -down.index(block)
        ax.plot([line, line], [y, y + _CELL], color=INK, linewidth=0.8)
    ax.set_xticks([i + _CELL / 2 for i in range(len(across))], across)
    ax.set_yticks([-i + _CELL / 2 for i in range(len(down))], down)
    ax.xaxis.tick_top()
    ax.tick_params(length=0, labelcolor=INK)
    ax.spines[:].set_visible(False)
    ax.set_xlim(-0.02, max(len(across), 7) - _GAP + 0.02)
    ax.set_ylim(1 - len(down) - 0.04, _CELL + 0.04)
    return data_uri(figure)


def _fill(ax: Axes, corners: list[tuple[float, float]], color: str, edge: str = "none") -> None:
    """Closed rectangles of five corners each, as one path: small in the file."""
    if corners:
        codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
        path = Path(corners, codes * (len(corners) // 5))
        ax.add_patch(PathPatch(path, facecolor=color, edgecolor=edge, linewidth=0.5))


def _mark_stages(ax: Axes, names: Sequence[str], word: str = "") -> None:
    """A tick, `word` and number, where each stage begins; counts where names have no stages."""
    starts: dict[str, int] = {}
    for i, name in enumerate(names):
        if place := _PLACE.fullmatch(name):
            starts.setdefault(f"{word}{int(place[1]) + 1}", i)
    ax.set_xlim(-1, len(names))
    if not starts:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    for start in list(starts.values())[1:]:
        ax.axvline(start - 0.5, color=GRID, linewidth=1)
    ax.set_xticks(list(starts.values()), list(starts), ha="left" if word else "center")
    ax.tick_params(axis="x", length=0)

"""Figures that follow the reader's light or dark scheme: matplotlib drawings as SVG data URIs.

A plot is drawn in placeholder colours, which become CSS variables with a light and a dark value:
one drawing serves both schemes and print, is sharp at any zoom, and is a fraction of a PNG's size.
It goes into the page as an <img>, where no script could run even if a name smuggled one in.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from typing import Any, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Name -> (placeholder that is drawn, light, dark).
_PALETTE = {
    "ink": ("#010101", "#1b2432", "#e7ebf2"),
    "muted": ("#020202", "#5d6878", "#9ba7b7"),
    "grid": ("#030303", "#e2e6ec", "#2c3543"),
    "accent": ("#040404", "#2f5fd0", "#7aa7ff"),
    "second": ("#050505", "#0d8a7b", "#4fd1c1"),
    "alarm": ("#060606", "#cf3f16", "#ff8560"),
    "shade": ("#070707", "#f1f3f7", "#1d2531"),
}
INK, MUTED, GRID, ACCENT, SECOND, ALARM, SHADE = (drawn for drawn, _, _ in _PALETTE.values())

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text, in the reader's own font
    "svg.hashsalt": "swinq",  # equal reports give equal files
    "text.parse_math": False,  # a '$' in a name is a '$'
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


Plot = TypeVar("Plot", bound=Callable[..., Any])


def styled(plot: Plot) -> Plot:
    """Draw in the report's style: matplotlib reads it whenever a plot adds something."""
    return matplotlib.rc_context(_STYLE)(plot)


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of inches, without background, and its axes row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    figure.patch.set_visible(False)
    for ax in axes.flat:
        ax.patch.set_visible(False)
    return figure, list(axes.flat)


def data_uri(figure: Figure) -> str:
    """The figure as `data:image/svg+xml;base64,...`."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]*>", _shorter, svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    for name, (drawn, _, _) in _PALETTE.items():
        svg = svg.replace(drawn, f"var(--{name})")
    svg = svg.replace(">", f"><style>{_css()}</style>", 1)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _shorter(tag: re.Match[str]) -> str:
    """A tag with its coordinates to a hundredth of a point; text between tags is left alone."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0])


def _css() -> str:
    def variables(column: int) -> str:
        return ":root{" + "".join(f"--{k}:{v[column]};" for k, v in _PALETTE.items()) + "}"

    return f"{variables(1)}@media (prefers-color-scheme:dark){{{variables(2)}}}"

"""Numbers as a reader sees them, the same in HTML, Markdown and verdicts."""

from __future__ import annotations

import math


def points(value: float) -> str:
    """A signed difference in percentage points, with a minus as wide as the plus."""
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "−")


def changes(difference: float) -> str:
    """'loses 0.03 points' or 'gains 0.10 points'."""
    return f"{'gains' if difference > 0 else 'loses'} {abs(difference):.2f} points"


def p_value(p: float) -> str:
    """Three decimals or a bound: '= 0.250', '< 0.001'."""
    return f"= {p:.3f}" if p >= 0.001 else "< 0.001"


def significant(value: float, digits: int = 3) -> str:
    """So many significant digits, with an exponent only for the very small: '0.00123', '1,234'."""
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "–")
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    if places > 7:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    return f"{value:,.{max(places, 0)}f}".replace("-", "−")


def decibels(value: float | None) -> str:
    """One decimal; a dash for what was not measured, ∞ for no noise at all."""
    if value is None:
        return "–"
    return f"{value:.1f}".replace("-", "−") if math.isfinite(value) else significant(value)


def share(value: float | None) -> str:
    """A share of 1 as a percentage with enough digits to tell little from none."""
    if value is None:
        return "–"
    if 0 < value < 1e-6:
        return "< 0.0001 %"
    return f"{significant(100 * value, 2)} %"


def count(n: int, noun: str) -> str:
    """'1 image', '3,925 images'."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def size(size_bytes: int | None) -> str:
    """Megabytes of 10^6 bytes, or a dash."""
    return "–" if size_bytes is None else f"{significant(size_bytes / 1e6)} MB"

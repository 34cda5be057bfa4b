"""Rows of the tables that hold models against each other, from scores, comparisons and times."""

from __future__ import annotations

from swinq.evaluate import Comparison, Scores
from swinq.report.schema import ComparisonRow, Kind, LatencyRow, ModelRow


def model_row(
    name: str,
    kind: Kind,
    scores: Scores,
    comparison: Comparison | None = None,
    *,
    int8_mode: int | None = None,
    size_bytes: int | None = None,
    device: str = "",
    engine: str = "",
) -> ModelRow:
    """What one form of the model scores, and how it differs from the float one."""
    return ModelRow(
        name=name,
        kind=kind,
        images=scores.images,
        top1=scores.top1_percent,
        top5=scores.top5_percent,
        int8_mode=int8_mode,
        comparison=comparison_row(comparison) if comparison else None,
        size_bytes=size_bytes,
        device=device,
        engine=engine,
    )


def comparison_row(comparison: Comparison) -> ComparisonRow:
    """The comparison's counts and everything that is derived from them."""
    low, high = comparison.interval
    return ComparisonRow(
        images=comparison.images,
        both_right=comparison.both_right,
        only_reference=comparison.only_reference,
        only_other=comparison.only_other,
        neither=comparison.neither,
        agreement_percent=comparison.agreement_percent,
        difference=comparison.difference,
        low=low,
        high=high,
        p_value=comparison.p_value,
        mean_kl=comparison.mean_kl,
    )


def latency_row(
    name: str,
    kind: Kind,
    batch: int,
    median_ms: float,
    *,
    device: str = "",
    int8_mode: int | None = None,
    engine: str = "",
) -> LatencyRow:
    """A median time, and the images a second that it makes."""
    return LatencyRow(
        name=name,
        kind=kind,
        batch=batch,
        median_ms=median_ms,
        images_per_second=1e3 * batch / median_ms,
        device=device,
        int8_mode=int8_mode,
        engine=engine,
    )

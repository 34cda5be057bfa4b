"""Rows about quantizers: amax summarised, a fine histogram of |x| made coarse enough to print."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swinq.report.schema import Histogram, QuantizerRow, Range

MAX_BINS = 64
PER_OCTAVE = 2


def quantizer_row(
    name: str,
    amax: Tensor,
    method: str,
    *,
    clipped_share: float | None = None,
    counts: Tensor | None = None,
    edges: Tensor | None = None,
) -> QuantizerRow:
    """Summary of one calibrated quantizer.

    Args:
        name: the quantizer's, "layers.0.blocks.0.attn.qkv.input_quantizer".
        amax: () or (channels,) or any shape that holds one value per channel.
        method: how amax was found, "percentile 99.99".
        clipped_share: of values that the codes cannot hold; None takes it from the histogram where
            there is one and amax is a scalar.
        counts: (n,) integers, the observer's histogram of |x|; None where there was none.
        edges: (n + 1,) ascending edges of the same.
    """
    values = amax.detach().double().flatten().cpu()
    histogram = None
    if counts is not None and edges is not None:
        histogram = coarse_histogram(counts, edges)
        if clipped_share is None and values.numel() == 1:
            clipped_share = share_above(counts, edges, values.item())
    return QuantizerRow(
        name=name,
        amax=Range(
            channels=values.numel(),
            minimum=values.min().item(),
            median=values.median().item(),
            maximum=values.max().item(),
        ),
        method=method,
        clipped_share=clipped_share,
        dead_channels=int((values == 0).sum()),
        histogram=histogram,
    )


def share_above(counts: Tensor, edges: Tensor, amax: float) -> float:
    """Share of the values in bins that begin at or above amax: never more than was clipped."""
    counts, edges = counts.cpu(), edges.double().cpu()
    return counts[edges[:-1] >= amax].sum().item() / max(counts.sum().item(), 1)


def coarse_histogram(counts: Tensor, edges: Tensor, max_bins: int = MAX_BINS) -> Histogram:
    """Rebin a histogram of |x| into at most `max_bins` half octaves below its largest value.

    Each fine bin goes whole into the coarse one that holds its middle; no count is lost.

    Args:
        counts: (n,) integers.
        edges: (n + 1,) ascending, >= 0; the last may be infinite.
        max_bins: coarse bins at most; what lies lower is counted in `below`.
    """
    counts, edges = counts.to("cpu", torch.int64), edges.to("cpu", torch.float64)
    filled = counts.nonzero().flatten()
    counts, lower, upper = counts[filled], edges[:-1][filled], edges[1:][filled]
    middle = torch.where(upper.isfinite(), (lower + upper) / 2, lower)
    coarse = (middle.log2() * PER_OCTAVE).floor()  # -inf for a bin [0, 0]
    coarse[lower == 0] = -math.inf  # reaches down to zero: its place on a log axis is "below"
    positive = coarse.isfinite()
    if not positive.any():
        return Histogram(0.0, PER_OCTAVE, [], below=int(counts.sum()))
    last = int(coarse[positive].max())
    first = max(int(coarse[positive].min()), last - max_bins + 1)
    inside = coarse >= first
    binned = torch.zeros(last - first + 1, dtype=torch.int64)
    binned.index_add_(0, coarse[inside].long() - first, counts[inside])
    below = int(counts[~inside].sum())
    return Histogram(first / PER_OCTAVE, PER_OCTAVE, binned.tolist(), below)

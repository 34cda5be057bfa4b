"""Input-scale vectors: which of a Linear's input channels get a scale of their own.

A vector r moves range from the activations into the weight's columns, exactly in float:
W x = (W diag(r)) (x / r). With exponent a, r_c = max|x_c|^a / max|W_c|^(1-a) (SmoothQuant, Xiao
et al. 2022, arXiv 2211.10438). It can hurt, so every layer tries each exponent, and none at all,
on sampled rows of its real inputs, and takes a vector only where the output's error shrinks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swinq.quant.affine import WEIGHT_RANGE, quantize, scale_and_inverse

# A vector costs a multiply per channel, so it must earn at least this much of the error.
WORTHWHILE = 0.95

# Channels smaller than this share of the largest are treated alike: one sample says little of them.
SMALLEST_SHARE = 2.0**-12


def candidate_vectors(
    amax: Tensor, channel_maxima: Tensor, weight: Tensor, exponents: tuple[float, ...]
) -> list[Tensor]:
    """The input ranges to try: first ``amax`` itself (), then vectors (in,).

    Each exponent comes twice: with every channel's maximum inside its range, and clipped in the
    proportion that ``amax`` clips the tensor.
    """
    peak = channel_maxima.max()
    candidates = [amax]
    if not bool(amax > 0):
        return candidates
    x = channel_maxima.clamp(min=float(peak) * SMALLEST_SHARE)
    columns = weight.abs().amax(0)
    columns = columns.clamp(min=max(float(columns.max()), 1e-30) * SMALLEST_SHARE)
    clip = float(amax / peak)
    for a in exponents:
        r = x**a / columns ** (1 - a)
        covering = r * (x / r).max()
        candidates.append(covering)
        if clip < 0.98:
            candidates.append(covering * clip)
    return candidates


def output_error(rows: Tensor, weight: Tensor, amax: Tensor, per_row_weight: bool) -> Tensor:
    """What quantizing input and weight adds to a Linear's output, (rows, out) fp32.

    Args:
        rows: (rows, in) inputs; weight: (out, in); amax: () or (in,) range of the input.
        per_row_weight: one weight scale per output channel, or one for all.
    """
    scale, inverse = scale_and_inverse(amax)
    folded = weight if amax.ndim == 0 else weight * scale
    magnitude = folded.abs()
    weight_amax = magnitude.amax(1, keepdim=True) if per_row_weight else magnitude.max()
    weight_scale, weight_inverse = scale_and_inverse(weight_amax)
    low, high = WEIGHT_RANGE
    accumulated = quantize(rows, inverse) @ quantize(folded, weight_inverse, low, high).T
    factor = weight_scale.reshape(-1) if amax.ndim else (scale * weight_scale).reshape(-1)
    return accumulated * factor - rows @ weight.T


def relative_error(error: Tensor, rows: Tensor, weight: Tensor) -> float:
    """Noise-to-signal ratio averaged over output channels, so that loud ones hide no other."""
    signal = (rows @ weight.T).double().square().sum(0)
    noise = error.double().square().sum(0)
    return float((noise / signal.clamp(min=float(signal.max()) * 1e-12 + 1e-300)).mean())


def choose_vector(
    rows: Tensor,
    weight: Tensor,
    amax: Tensor,
    channel_maxima: Tensor,
    exponents: tuple[float, ...],
    per_row_weight: bool,
) -> tuple[Tensor, float]:
    """Pick the input range of one Linear.

    Returns:
        The range, () or (in,) fp32, and its error relative to that of the scalar (1 for itself).
    """
    candidates = candidate_vectors(amax, channel_maxima, weight, exponents)
    errors = [
        relative_error(output_error(rows, weight, c, per_row_weight), rows, weight)
        for c in candidates
    ]
    best = min(range(len(errors)), key=errors.__getitem__)
    if errors[0] <= 0.0 or errors[best] >= WORTHWHILE * errors[0]:
        return candidates[0], 1.0
    return candidates[best], errors[best] / errors[0]

"""Input-scale vectors: which of a Linear's input channels get a scale of their own.

A vector r moves range from the activations into the weight's columns, exactly in float:
W x = (W diag(r)) (x / r). With exponent a, r_c = max|x_c|^a / max|W_c|^(1-a) (SmoothQuant, Xiao
et al. 2022, arXiv 2211.10438). It can hurt, so every layer tries each exponent, and none at all,
on sampled rows of its real inputs, and takes a vector only where the output's error shrinks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swinq.distributed import broadcast_
from swinq.quant.affine import WEIGHT_RANGE, quantize, scale_and_inverse

# A vector costs a multiply per channel, so it must earn at least this much of the error.
WORTHWHILE = 0.95

# Rows that the candidates are compared on; rows come in an order that says nothing of their origin.
SEARCHED_ROWS = 512

# A single channel's maximum is less well known than a tensor's.
HEADROOM = 1.1

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
        covering = r * (x / r).max() * HEADROOM
        candidates.append(covering)
        if clip < 0.98:
            candidates.append(covering * clip)
    return candidates


def quantized_output(rows: Tensor, weight: Tensor, amax: Tensor, per_row_weight: bool) -> Tensor:
    """What a Linear without bias computes from rounded input and weight, (rows, out) fp32.

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
    return accumulated * factor


@dataclass(frozen=True)
class InputChoice:
    """The input range that serves one Linear best.

    Attributes:
        amax: () or (in,) fp32.
        ratio: its output error relative to that of one scale, 1 for one scale itself.
        mean_error: (out,) fp64, what quantizing adds to each output on average.
    """

    amax: Tensor
    ratio: float
    mean_error: Tensor


def choose_input_range(
    rows: Tensor,
    weight: Tensor,
    amax: Tensor,
    channel_maxima: Tensor,
    exponents: tuple[float, ...],
    per_row_weight: bool,
) -> InputChoice:
    """Pick the input range of one Linear: ``amax`` or a vector; all ranks take rank 0's choice.

    The error is a noise-to-signal ratio averaged over output channels, so that loud ones hide no
    other.

    Args:
        rows: (rows, in) fp32 inputs in random order; weight: (out, in) fp32; amax: () fp32.
        channel_maxima: (in,) fp32, largest magnitudes; exponents: of the vectors to try.
        per_row_weight: one weight scale per output channel, or one for all.
    """
    candidates = candidate_vectors(amax, channel_maxima, weight, exponents)
    wanted = rows @ weight.T  # (rows, out)

    def error_of(candidate: Tensor, first: int) -> Tensor:
        return quantized_output(rows[:first], weight, candidate, per_row_weight) - wanted[:first]

    signal = _power(wanted[:SEARCHED_ROWS])
    signal = signal.clamp(min=float(signal.max()) * 1e-12 + 1e-300)
    scores = [(_power(error_of(c, SEARCHED_ROWS)) / signal).mean() for c in candidates]
    # ranks on unlike machines may differ in the last bit: one of them decides
    errors = broadcast_(torch.stack(scores).cpu()).tolist()
    best = min(range(len(errors)), key=errors.__getitem__)
    if errors[best] >= WORTHWHILE * errors[0]:
        best = 0
    mean_error = error_of(candidates[best], len(rows)).mean(0, dtype=torch.float64)
    return InputChoice(candidates[best], errors[best] / errors[0] if best else 1.0, mean_error)


def _power(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=0, dtype=torch.float64).square()  # (out,)

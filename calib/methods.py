"""Methods: from the histogram of |x| to amax. Vectorised; all of a model's quantizers at once.

percentile  the edge below which the given share of the values lies
mse         the amax whose rounding and clipping error is least
entropy     the amax whose 8-bit distribution is nearest, by Kullback-Leibler divergence, to the
            clipped one (pytorch-quantization's algorithm, after Migacz, "8-bit inference with
            TensorRT", GTC 2017), here in O(bins * levels) by prefix sums

``*_search`` work on any histogram given as counts and edges. ``find_amax`` applies them to the
observers' histograms, whose bins cover all floats.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from swinq.calib.observers import BINS, bin_edges
from swinq.errors import CalibrationError
from swinq.quant.affine import QMAX

METHODS = ("max", "percentile", "mse", "entropy")

LEVELS = 128  # magnitudes of a signed 8-bit code
LINEAR_BINS = 2048
START_BIN = 128  # pytorch-quantization's first candidate
EQUAL = 1e-12  # divergences that differ by less, in nats, differ by rounding only
MOST = 90.0  # percentile of the values apart from zeros that entropy never goes below
NARROWER = 8  # when entropy wants less than the first candidate, the range shrinks by this
BINS_PER_OCTAVE = 256
MSE_OCTAVES = 12  # how far below the maximum a best amax is looked for


def percentile_search(counts: Tensor, edges: Tensor, percentile: float) -> Tensor:
    """Lower edge of the first bin at which the cumulated share reaches the percentile.

    Args:
        counts: (Q, bins) of any number type, each row with a positive sum.
        edges: (bins + 1,) ascending.
        percentile: in (0, 100].

    Returns:
        (Q,) fp64. The upper edge where that bin is the first one, as 0 would delete the tensor.
    """
    share = counts.double().cumsum(1) / counts.double().sum(1, keepdim=True)
    wanted = torch.full_like(share[:, :1], percentile / 100)
    index = torch.searchsorted(share.contiguous(), wanted).squeeze(1).clamp(max=counts.shape[1] - 1)
    return torch.where(index == 0, edges[1], edges[index].double())


def squared_error(values: Tensor, counts: Tensor, candidates: Tensor) -> Tensor:
    """Summed squared error of rounding and clipping ``values`` to each candidate amax.

    With k(v) the code of v and s = amax / 127 it is sum v^2 - 2 s sum v k(v) + s^2 sum k(v)^2. A
    value has code k or more from (k - 1/2) s on, so both other sums are sums over k of suffix sums:
    O(127) a candidate, however many bins there are.

    Args:
        values: (Q, bins) fp64 magnitudes, each row ascending; counts: (Q, bins).
        candidates: (Q, C) fp64, positive.

    Returns:
        (Q, C) fp64.
    """
    code = torch.arange(1, QMAX + 1, dtype=torch.float64, device=values.device)
    errors = []
    for v, n, amax in zip(values, counts.double(), candidates, strict=True):
        mass = torch.stack([n, n * v])
        suffix = F.pad(mass.flip(1).cumsum(1).flip(1), (0, 1))  # (2, bins + 1)
        scale = amax / QMAX
        first = torch.searchsorted(v, scale[:, None] * (code - 0.5))  # (C, 127) bins
        squared_codes = suffix[0][first] @ (2 * code - 1)
        values_times_codes = suffix[1][first].sum(1)
        errors.append((n * v * v).sum() - scale * (2 * values_times_codes - scale * squared_codes))
    return torch.stack(errors)


def mse_search(counts: Tensor, edges: Tensor, start_bin: int = START_BIN) -> Tensor:
    """The bin centre with the least squared error, among those from ``start_bin`` on.

    Args:
        counts: (Q, bins); edges: (bins + 1,) or (Q, bins + 1), ascending.

    Returns:
        (Q,) fp64.
    """
    edges = edges.double().expand(counts.shape[0], -1)
    centres = (edges[:, 1:] + edges[:, :-1]) / 2
    best = squared_error(centres, counts, centres[:, start_bin:]).argmin(1)
    return centres.gather(1, best[:, None] + start_bin).squeeze(1)


def entropy_search(
    counts: Tensor,
    edges: Tensor,
    beyond: Tensor | None = None,
    keep_first: Tensor | None = None,
    start_bin: int = START_BIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """The edge of linear bins with the least divergence; the last one among equals.

    For each candidate of i bins, P is the first i counts with everything above added to the last,
    Q is the first i counts averaged over their non-empty bins within each of 128 groups.

    Args:
        counts: (Q, bins); edges: (bins + 1,) or (Q, bins + 1), evenly spaced from 0.
        beyond: (Q,) counts above the last edge.
        keep_first: (Q,) bool, rows whose first bin is to count as it is. Elsewhere it holds zeros,
            of which there may be very many, and takes the count of the second.

    Returns:
        amax (Q,) fp64, the chosen number of bins (Q,) int64 and its divergence (Q,) fp64, which is
        infinite where every candidate ends in an empty bin.
    """
    counts = counts.double().clone()
    quantizers, bins = counts.shape
    device = counts.device
    second = torch.full((quantizers,), True, device=device) if keep_first is None else ~keep_first
    counts[:, 0] = counts[:, :2].gather(1, second.long()[:, None]).squeeze(1)
    total = counts.sum(1) if beyond is None else counts.sum(1) + beyond.double()

    def prefix(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(quantizers, 1), x.cumsum(1)], 1)  # (Q, bins + 1)

    below, filled = prefix(counts), prefix((counts > 0).double())
    log_below = prefix(torch.xlogy(counts, counts))
    divergences = []
    for start in range(start_bin, bins + 1, 256):  # bounds the (Q, candidates, LEVELS) temporaries
        i = torch.arange(start, min(start + 256, bins + 1), device=device)
        bounds = (torch.arange(LEVELS + 1, device=device) * i[:, None] + LEVELS - 1) // LEVELS
        group = below[:, bounds].diff(dim=2)  # (Q, candidates, LEVELS) counts
        members = filled[:, bounds].diff(dim=2)
        mean = torch.where(members > 0, group / members.clamp(min=1), 0.0)
        kept = below[:, i]  # counts inside the candidate
        tail = total[:, None] - kept
        last = counts[:, i - 1]
        # the last bin's group: its first bin is not after i - 1, and i is its end
        last_mean = mean[:, :, -1].where(last > 0, torch.zeros((), device=device, dtype=kept.dtype))
        clipped = last + tail
        p_log_p = log_below[:, i] - torch.xlogy(last, last) + torch.xlogy(clipped, clipped)
        p_log_q = torch.xlogy(group, mean).sum(2) + torch.xlogy(tail, last_mean)
        divergence = p_log_p - p_log_q + total[:, None] * (kept.log() - total[:, None].log())
        divergences.append(divergence / total[:, None])
    divergence = torch.cat(divergences, 1)
    divergence = torch.nan_to_num(divergence, nan=torch.inf, posinf=torch.inf)
    least = divergence.amin(1)
    candidates = divergence.shape[1]
    best = candidates - 1 - (divergence <= least[:, None] + EQUAL).flip(1).int().argmax(1)
    chosen = best + start_bin
    edges = edges.double().expand(quantizers, -1)
    return edges.gather(1, chosen[:, None]).squeeze(1), chosen, least


def linear_histogram(
    counts: Tensor, upper: Tensor, peaks: Tensor, bins: int = LINEAR_BINS
) -> tuple[Tensor, Tensor, Tensor]:
    """Spread the observers' histograms evenly over linear bins from 0 to ``upper``.

    Args:
        counts: (Q, BINS); upper: (Q,) fp64, positive; peaks: (Q,) fp64, the largest magnitudes,
            where the last bin that has counts ends.

    Returns:
        counts (Q, bins) fp64, edges (Q, bins + 1) fp64, counts beyond ``upper`` (Q,) fp64.
    """
    device = counts.device
    source = bin_edges(device)
    below = F.pad(counts.cumsum(1), (1, 0)).double()  # (Q, BINS + 1)
    share = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=device)
    edges = upper[:, None] * share
    index = torch.searchsorted(source, edges, right=True).clamp(1, BINS)  # source[index-1] <= edge
    start, end = source[index - 1], torch.minimum(source[index], peaks[:, None])
    inside = torch.where(edges < end, (edges - start) / (end - start), 1.0)
    low, high = below.gather(1, index - 1), below.gather(1, index)
    cumulated = low + (high - low) * inside
    return cumulated.diff(dim=1), edges, below[:, -1] - cumulated[:, -1]


def find_amax(method: str, counts: Tensor, peaks: Tensor, percentile: float = 99.99) -> Tensor:
    """Search amax for a stack of observers' histograms, on their device.

    Args:
        method: one of METHODS.
        counts: (Q, BINS) int64; peaks: (Q,) the largest magnitude of each, fp32.
        percentile: for method "percentile", in (0, 100].

    Returns:
        (Q,) fp32, at most the peak, and 0 where the peak is 0.

    Raises:
        CalibrationError: an unknown method, or a percentile outside its range.
    """
    if method not in METHODS:
        raise CalibrationError(
            f"calibration method {method!r} is not known", f"use one of {', '.join(METHODS)}"
        )
    if not 0 < percentile <= 100:
        raise CalibrationError(
            f"percentile {percentile} is outside (0, 100]", "99.99 is the usual choice"
        )
    amax = peaks.clone()
    seen = peaks > 0
    if method == "max" or not bool(seen.any()):
        return amax
    rows = counts[seen]
    peak = peaks[seen].double()
    if method == "percentile":
        found = _percentile(rows, percentile)
    else:
        found = _mse(rows, peak) if method == "mse" else _entropy(rows, peak)
    amax[seen] = torch.minimum(found, peak).float()
    return amax


def _percentile(counts: Tensor, percentile: float) -> Tensor:
    """Of all values; of those that are not 0 where more than the percentile are 0."""
    edges = bin_edges(counts.device)
    found = percentile_search(counts, edges, percentile)
    zero = found <= edges[1]
    if bool(zero.any()):
        found[zero] = percentile_search(_without_zeros(counts[zero]), edges, percentile)
    return found


def _mse(counts: Tensor, peak: Tensor) -> Tensor:
    """Every bin edge of the top octaves is a candidate."""
    edges = bin_edges(counts.device)
    centres = ((edges[1:] + edges[:-1]) / 2).expand(len(counts), -1)
    top = torch.searchsorted(edges, peak, right=True)  # the edge above the peak
    offsets = torch.arange(-BINS_PER_OCTAVE * MSE_OCTAVES, 1, device=counts.device)
    candidates = edges[(top[:, None] + offsets).clamp(min=1)]  # (Q, C)
    best = squared_error(centres, counts, candidates).argmin(1, keepdim=True)
    return candidates.gather(1, best).squeeze(1)


def _entropy(counts: Tensor, peak: Tensor) -> Tensor:
    """Linear bins up to the peak; where they are too coarse to tell, up to an eighth of it.

    They are where the answer is the first candidate, and where more than half of all values, zeros
    apart, share the first bin: an outlier as the peak leaves nothing but itself to compare. Then
    the first bin counts in full, and the narrower range must have the lesser divergence.

    Clipping all values to a single bin loses nothing by this measure, so ``MOST`` are kept.
    """
    found = peak.clone()
    upper = peak.clone()
    to_beat = torch.full_like(peak, torch.inf)
    zeros, total = counts[:, 0], counts.sum(1)
    row = torch.arange(len(peak), device=peak.device)
    while len(row):
        linear, edges, beyond = linear_histogram(counts[row], upper[row], peak[row])
        linear[:, 0] -= zeros[row]
        crowded = linear[:, 0] > (total - zeros)[row] / 2
        amax, chosen, divergence = entropy_search(linear, edges, beyond, keep_first=crowded)
        first = chosen == START_BIN
        better = divergence < to_beat[row] - EQUAL
        found[row[better]] = amax[better]
        to_beat[row[better]] = torch.where(first, torch.inf, divergence)[better]
        coarse = first | crowded | divergence.isinf()
        row = row[coarse & (upper[row] > peak[row] * 2.0**-30)]
        upper[row] /= NARROWER
    kept = percentile_search(_without_zeros(counts), bin_edges(peak.device), MOST)
    return torch.maximum(found, kept)


def _without_zeros(counts: Tensor) -> Tensor:
    return F.pad(counts[:, 1:], (1, 0))

"""The searches against brute force: on observers' histograms, and on published linear ones."""

import numpy as np
import pytest
import torch
from torch import Tensor

from swinq.calib.methods import (
    LINEAR_BINS,
    METHODS,
    START_BIN,
    entropy_search,
    find_amax,
    linear_histogram,
    mse_search,
    percentile_search,
    squared_error,
)
from swinq.calib.observers import BINS, HistogramObserver, bin_edges
from swinq.errors import CalibrationError
from swinq.quant.affine import quantize, scale_and_inverse
from tests.calib import published
from tests.calib.distributions import DISTRIBUTIONS, sample

BIN = 1 + 1 / 256  # the largest ratio between neighbouring edges of the observers' bins
ALL = pytest.mark.parametrize("name", DISTRIBUTIONS)


def observe(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Stacked counts (Q, BINS) and peaks (Q,) of some tensors."""
    observers = []
    for x in tensors:
        observers.append(HistogramObserver(None, None, torch.device("cpu")))
        observers[-1](x)
    return torch.stack([o.counts for o in observers]), torch.stack([o.peak for o in observers])


def linear(x: Tensor, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The published histogram: ``bins`` equal bins of |x| from 0 to the maximum."""
    magnitude = x.abs().double().numpy()
    return np.histogram(magnitude, bins, range=(0.0, float(magnitude.max())))


def search_linear(counts: np.ndarray, edges: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(counts)[None], torch.from_numpy(edges)


# on observers' histograms: within one bin of brute force over the values themselves


@ALL
@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.99, 100.0])
def test_percentile_is_the_bin_of_the_value_at_that_rank(name: str, percentile: float) -> None:
    x = sample(name)
    found = float(find_amax("percentile", *observe(x), percentile))
    ordered = x.abs().double().sort().values
    shares = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    wanted = float(ordered[shares >= percentile / 100][0])
    if wanted == 0:  # zeros say nothing of the range: the values that are not zero decide
        ordered = ordered[ordered > 0]
        shares = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
        wanted = float(ordered[shares >= percentile / 100][0])
    assert wanted / BIN <= found <= wanted


def brute_force_errors(x: Tensor, candidates: np.ndarray) -> np.ndarray:
    values, counts = np.unique(x.abs().double().numpy(), return_counts=True)
    return np.array([published.squared_error(values, counts, a) for a in candidates])


@ALL
def test_mse_is_the_edge_of_least_error_among_all_edges(name: str) -> None:
    x = sample(name)
    counts, peak = observe(x)
    found = float(find_amax("mse", counts, peak))
    edges = bin_edges().numpy()
    top = int(np.searchsorted(edges, float(peak), side="right"))
    candidates = np.minimum(edges[top - 256 * 12 : top + 1], float(peak))
    filled = counts[0].nonzero().squeeze(1).numpy()
    centres, n = (edges[filled] + edges[filled + 1]) / 2, counts[0].numpy()[filled]
    errors = np.array([published.squared_error(centres, n, a) for a in candidates])
    best = float(candidates[errors.argmin()])
    ties = candidates[errors <= errors.min() * (1 + 1e-9)]
    assert any(a / BIN <= found <= a * BIN for a in (best, *ties))
    # and on the values themselves nothing on a coarse grid is better by more than binning costs
    own, grid = brute_force_errors(x, np.array([found])), brute_force_errors(x, candidates[::16])
    binning = (x.double().square().sum() * (1 / 512) ** 2).item()
    assert own[0] <= grid.min() * 1.02 + binning


def spread_evenly(counts: np.ndarray, upper: float, peak: float) -> tuple[np.ndarray, float]:
    """The linear histogram by brute force: bin by bin, the share of it below each linear edge."""
    source = bin_edges().numpy()
    edges = upper * np.linspace(0, 1, LINEAR_BINS + 1)
    below = np.zeros(LINEAR_BINS + 1)
    for i in np.flatnonzero(counts):
        start, end = source[i], min(source[i + 1], peak)
        share = np.where(edges >= end, 1.0, (edges - start) / max(end - start, 1e-300))
        below += counts[i] * np.clip(share, 0, 1)
    return np.diff(below), counts.sum() - below[-1]


@ALL
def test_entropy_is_the_candidate_of_least_divergence(name: str) -> None:
    x = sample(name)
    counts, peak = observe(x)
    found = float(find_amax("entropy", counts, peak))
    zeros, total = float(counts[0, 0]), float(counts.sum())
    upper, to_beat = float(peak), np.inf
    answers = [upper]
    while True:  # an eighth of the range as long as the bins are too coarse
        bins, beyond = spread_evenly(counts[0].numpy(), upper, float(peak))
        bins[0] -= zeros
        crowded = bins[0] > (total - zeros) / 2
        divergences = published.entropy_divergences(bins, beyond, keep_first=crowded)
        least = divergences.min()
        chosen = START_BIN + published.last_argmin(divergences)
        if least < to_beat - 1e-12:
            ties = START_BIN + np.flatnonzero(divergences <= least + 1e-9)
            answers, width = list(ties * upper / LINEAR_BINS), upper / LINEAR_BINS
            to_beat = np.inf if chosen == START_BIN else least
        coarse = chosen == START_BIN or crowded or np.isinf(least)
        if not coarse or upper <= float(peak) * 2.0**-30:
            break
        upper /= 8
    magnitude = np.sort(x.abs()[x != 0].double().numpy())
    kept = magnitude[int(np.ceil(0.9 * len(magnitude))) - 1]  # no more than a tenth is clipped
    if max(answers) >= kept:
        assert np.abs(np.array(answers) - found).min() <= width * (1 + 1e-6)
    else:
        assert kept / BIN <= found <= kept


@ALL
@pytest.mark.parametrize("method", METHODS)
def test_amax_is_positive_at_most_the_peak_and_scales_with_the_values(
    name: str, method: str
) -> None:
    x = sample(name)
    amax = find_amax(method, *observe(x, x * 2.0**-7))
    assert amax.dtype == torch.float32
    assert 0 < float(amax[0]) <= float(x.abs().max())
    assert float(amax[1]) == float(amax[0]) * 2.0**-7  # an octave has the same bins as another
    if method == "max":
        assert float(amax[0]) == float(x.abs().max())


def test_all_quantizers_are_searched_at_once_as_if_alone() -> None:
    tensors = [sample(name) for name in DISTRIBUTIONS]
    counts, peaks = observe(*tensors, torch.zeros(9))
    for method in METHODS:
        together = find_amax(method, counts, peaks)
        alone = [find_amax(method, counts[i : i + 1], peaks[i : i + 1]) for i in range(len(peaks))]
        assert torch.equal(together, torch.cat(alone))
        assert float(together[-1]) == 0.0  # nothing but zeros


def test_a_search_keeps_its_hands_off_the_histogram() -> None:
    counts, peaks = observe(sample("laplace"), sample("very sparse"))
    before = counts.clone(), peaks.clone()
    for method in METHODS:
        find_amax(method, counts, peaks)
    assert torch.equal(counts, before[0]) and torch.equal(peaks, before[1])


def test_a_lone_outlier_does_not_widen_percentile_nor_entropy() -> None:
    x = sample("normal").repeat(20)
    counts, peaks = observe(torch.cat([x, torch.tensor([3000.0])]))
    assert float(find_amax("max", counts, peaks)) == 3000.0
    for method in ("percentile", "entropy"):
        assert float(find_amax(method, counts, peaks)) < 6.0


def test_entropy_keeps_two_far_lumps_apart_rather_than_clip_one() -> None:
    counts, peaks = observe(torch.cat([torch.full((600,), 1e-6), torch.full((400,), 1.0)]))
    assert float(find_amax("entropy", counts, peaks)) == 1.0


def test_values_that_are_zero_never_move_entropy() -> None:
    counts, peaks = observe(sample("gelu"))
    wanted = find_amax("entropy", counts, peaks)
    counts[0, 0] += 10**9
    assert torch.equal(find_amax("entropy", counts, peaks), wanted)


@pytest.mark.parametrize("method", ["average", "MAX", ""])
def test_an_unknown_method_is_named(method: str) -> None:
    with pytest.raises(CalibrationError, match=repr(method)) as error:
        find_amax(method, torch.zeros(1, BINS), torch.zeros(1))
    assert "entropy" in error.value.fix


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1, float("nan")])
def test_a_percentile_outside_its_range_is_named(percentile: float) -> None:
    with pytest.raises(CalibrationError, match="percentile"):
        find_amax("percentile", torch.zeros(1, BINS), torch.zeros(1), percentile)


# the published algorithms, given the same linear histogram


@ALL
@pytest.mark.parametrize("percentile", [90.0, 99.9, 99.99, 100.0])
def test_percentile_equals_the_published_one(name: str, percentile: float) -> None:
    counts, edges = linear(sample(name), 2048)
    found = percentile_search(*search_linear(counts, edges), percentile)
    assert float(found) == published.percentile(counts, edges, percentile)


@ALL
def test_mse_equals_the_published_one(name: str) -> None:
    counts, edges = linear(sample(name), 1024)
    found = float(mse_search(*search_linear(counts, edges)))
    candidates, errors = published.mse_errors(counts, edges)
    first_of_the_best = candidates[np.flatnonzero(errors <= errors.min() * (1 + 1e-9))]
    assert found in first_of_the_best


@ALL
def test_entropy_equals_the_published_one(name: str) -> None:
    counts, edges = linear(sample(name), 1024)
    amax, chosen, divergence = entropy_search(*search_linear(counts, edges))
    divergences = published.entropy_divergences(counts)
    best = np.flatnonzero(divergences <= divergences.min() + 1e-12) + START_BIN
    assert int(chosen) in best
    assert float(amax) == edges[int(chosen)]
    assert float(divergence) == pytest.approx(divergences.min(), abs=1e-12)
    if len(best) == 1:
        assert int(chosen) == published.last_argmin(divergences) + START_BIN


def test_entropy_takes_the_last_among_equal_candidates() -> None:
    counts = torch.zeros(1, 512)
    counts[0, :128] = 4.0  # every candidate that is a multiple of 128 bins loses nothing
    amax, chosen, _ = entropy_search(counts, torch.arange(513.0))
    assert int(chosen) == float(amax) == 512


def test_entropy_ignores_how_many_zeros_there_are() -> None:
    counts, edges = search_linear(*linear(sample("gelu"), 1024))
    amax, _, _ = entropy_search(counts, edges)
    counts[0, 0] += 10**9
    assert torch.equal(entropy_search(counts, edges)[0], amax)


# the parts


def test_squared_error_is_that_of_the_quantizer_itself() -> None:
    x = sample("laplace").abs().sort().values
    candidates = torch.tensor([[0.5, 3.0, float(x.max()), 50.0]])
    errors = squared_error(x.double()[None], torch.ones(1, len(x)), candidates.double())
    for amax, error in zip(candidates[0], errors[0], strict=True):
        scale, inverse = scale_and_inverse(amax)
        exact = (quantize(x, inverse) * scale - x).double().square().sum()
        assert float(error) == pytest.approx(float(exact), rel=1e-4)


@ALL
def test_the_linear_histogram_conserves_counts_and_places_them(name: str) -> None:
    x = sample(name)
    counts, peaks = observe(x)
    magnitude, edges = x.abs().double().sort().values, bin_edges()
    for part in (1.0, 0.3, 1e-3):
        upper = peaks.double() * part
        bins, linear_edges, beyond = linear_histogram(counts, upper, peaks.double())
        assert bins.shape == (1, LINEAR_BINS) and bool((bins >= 0).all())
        assert float(bins.sum() + beyond) == pytest.approx(len(x), rel=1e-12)
        assert float(linear_edges[0, 0]) == 0 and float(linear_edges[0, -1]) == float(upper)
        if part == 1.0:
            assert float(beyond) == 0.0  # nothing lies above the peak
        # the true count below an edge differs by at most what shares a bin with the edge
        below = torch.searchsorted(magnitude, linear_edges[0])
        holder = torch.searchsorted(edges, linear_edges[0], right=True) - 1
        shared = counts[0, holder.clamp(max=BINS - 1)]
        assert bool(((bins[0].cumsum(0) - below[1:]).abs() <= shared[1:] + 1e-6).all())

"""amax summaries and histograms made coarse without losing a count."""

import pytest
import torch

from swinq.report.quantizers import coarse_histogram, quantizer_row, share_above


def test_a_scalar_and_a_vector_are_summarised() -> None:
    row = quantizer_row("q", torch.tensor(2.5), "mse")
    assert (row.amax.channels, row.amax.minimum, row.amax.maximum) == (1, 2.5, 2.5)
    row = quantizer_row("q", torch.tensor([[3.0], [0.0], [1.0]]), "max")
    assert (row.amax.channels, row.amax.minimum, row.amax.median, row.amax.maximum) == (3, 0, 1, 3)
    assert row.dead_channels == 1 and row.clipped_share is None


def test_the_clipped_share_comes_from_the_histogram_of_a_scalar() -> None:
    counts, edges = torch.tensor([90, 8, 2]), torch.tensor([0.0, 1.0, 2.0, 4.0])
    assert quantizer_row("q", torch.tensor(2.0), "m", counts=counts, edges=edges).clipped_share == (
        pytest.approx(0.02)
    )
    assert share_above(counts, edges, 1.5) == pytest.approx(0.02)  # its own bin is not counted
    vector = quantizer_row("q", torch.tensor([2.0, 1.0]), "m", counts=counts, edges=edges)
    assert vector.clipped_share is None


@pytest.mark.parametrize("bins", [3, 64])
def test_no_count_is_lost_and_bins_are_where_they_say(bins: int) -> None:
    x = torch.cat([torch.zeros(11), torch.randn(5000).exp()])
    edges = torch.cat([torch.zeros(1), 2.0 ** torch.arange(-30, 20.01, 0.0625)])
    counts = torch.histogram(x, edges).hist.long()
    coarse = coarse_histogram(counts, edges, max_bins=bins)
    assert len(coarse.counts) <= bins
    assert sum(coarse.counts) + coarse.below == 5011
    for i, n in enumerate(coarse.counts):
        low = 2 ** (coarse.low + i / coarse.per_octave)
        assert n == ((x >= low) & (x < low * 2 ** (1 / coarse.per_octave))).sum()


def test_only_zeros_make_an_empty_histogram() -> None:
    coarse = coarse_histogram(torch.tensor([7, 0]), torch.tensor([0.0, 1.0, 2.0]))
    assert (coarse.counts, coarse.below) == ([], 7)


def test_an_open_last_bin_is_counted_at_its_edge() -> None:
    coarse = coarse_histogram(torch.tensor([0, 5]), torch.tensor([0.0, 8.0, float("inf")]))
    assert (coarse.low, coarse.counts) == (3.0, [5])

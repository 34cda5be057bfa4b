"""Observers: exact maxima and counts, bins by value alone, rows in an order of their own."""

import numpy as np
import pytest
import torch
from torch import Tensor

from swinq.calib.observers import (
    BINS,
    HistogramObserver,
    MaxObserver,
    RowSampler,
    Scratch,
    bin_edges,
)

CPU = torch.device("cpu")
TINY, HUGE = 1e-45, torch.finfo(torch.float32).max


def histogram(*tensors: Tensor) -> HistogramObserver:
    observer = HistogramObserver(None, None, CPU)
    for x in tensors:
        observer(x)
    return observer


def brute_force(x: Tensor) -> np.ndarray:
    magnitude = x.abs().double().numpy().reshape(-1)
    return np.histogram(magnitude, bin_edges().numpy())[0]


@pytest.mark.parametrize("scale", [1e-44, 1e-39, 1e-20, 1.0, 1e30])
def test_counts_equal_a_brute_force_binning(scale: float) -> None:
    x = torch.randn(7, 11, 13).mul(scale)
    assert np.array_equal(histogram(x).counts.numpy(), brute_force(x))


def test_every_finite_float_falls_into_the_bin_whose_edges_enclose_it() -> None:
    edges = bin_edges()
    special = torch.tensor([0.0, -0.0, TINY, -(2.0**-126), 1.0, 2.0 - 2.0**-23, -HUGE, HUGE])
    bits = torch.randint(0, 0x7F800000, (20_000,), dtype=torch.int32)
    x = torch.cat([special, bits.view(torch.float32)])
    observer = histogram(x)
    assert np.array_equal(observer.counts.numpy(), brute_force(x))
    assert int(observer.counts.sum()) == len(x)
    assert float(edges[-1]) == 2.0**128 and float(edges[0]) == 0.0


def test_edges_ascend_and_bins_are_narrow() -> None:
    edges = bin_edges()
    assert edges.shape == (BINS + 1,) and edges.dtype == torch.float64
    assert bool((edges.diff() > 0).all())
    normal = edges[edges >= 2.0**-126]
    ratio = normal[1:] / normal[:-1]
    assert float(ratio.max()) == 1 + 1 / 256 and float(ratio.min()) > 1 + 1 / 512


def test_batches_and_their_order_change_no_bit() -> None:
    x = torch.randn(64, 5) * torch.logspace(-20, 20, 64)[:, None]
    whole = histogram(x)
    for parts in (x.split(1), x.split(7), x.flip(0).split(13), (torch.zeros(3), x)):
        observer = histogram(*parts)
        counts = observer.counts.clone()
        counts[0] -= 3 if len(parts) == 2 else 0
        assert torch.equal(counts, whole.counts) and torch.equal(observer.peak, whole.peak)


@pytest.mark.parametrize("first", [0.0, TINY, 1e-30])
def test_a_first_batch_of_zeros_or_tiny_values_is_ordinary(first: float) -> None:
    observer = histogram(torch.full((10,), first), torch.tensor([3.0]))
    assert float(observer.peak) == 3.0
    assert int(observer.counts.sum()) == 11


def test_nan_and_infinity_show_in_the_peak_and_not_in_the_counts() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        observer = histogram(torch.tensor([1.0, bad, 2.0]), torch.tensor([5.0]))
        assert not bool(torch.isfinite(observer.peak))
        assert int(observer.counts.sum()) == 3
    assert bool(histogram(torch.tensor([float("nan")]), torch.tensor([1.0])).peak.isnan())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_counted_as_their_fp32_values(dtype: torch.dtype) -> None:
    x = torch.randn(1000).to(dtype)
    assert torch.equal(histogram(x).counts, histogram(x.float()).counts)


def test_a_transposed_view_is_counted_like_its_copy() -> None:
    x = torch.randn(6, 10)
    assert torch.equal(histogram(x.T).counts, histogram(x.T.contiguous()).counts)


def test_more_values_than_fp32_can_count_are_counted_exactly() -> None:
    observer = histogram(torch.tensor([1.0]))
    observer.counts *= 2**24
    observer(torch.tensor([1.0]))
    assert int(observer.counts.max()) == 2**24 + 1


def test_observers_that_share_memory_do_not_mix_their_tensors() -> None:
    scratch = Scratch()
    shared = [HistogramObserver(-1, 3, CPU, scratch) for _ in range(2)]
    tensors = [torch.randn(50, 3), 100 * torch.randn(5, 7, 3), torch.randn(2, 3)]
    for observer in (*shared, alone := HistogramObserver(-1, 3, CPU)):
        for x in tensors if observer is not shared[1] else tensors[:1]:
            kept = x.clone()
            observer(x)
            assert torch.equal(x, kept)
    assert torch.equal(shared[0].counts, alone.counts)
    assert torch.equal(shared[0].maximum, alone.maximum)
    assert np.array_equal(shared[1].counts.numpy(), brute_force(tensors[0]))


def test_maxima_are_kept_per_index_of_the_axis() -> None:
    x = torch.randn(4, 3, 5, 2)
    for axis, channels in ((1, 3), (-1, 2), (0, 4)):
        observer = MaxObserver(axis, channels, CPU)
        observer(0.5 * x)
        observer(-x)
        others = [d for d in range(4) if d != axis % 4]
        assert torch.equal(observer.maximum, x.abs().amax(others))
        assert torch.equal(observer.peak, x.abs().max())
    observer = MaxObserver(None, None, CPU)
    observer(x)
    assert torch.equal(observer.maximum, x.abs().max())


def test_a_histogram_keeps_channel_maxima_beside_the_counts_of_the_whole() -> None:
    observer = HistogramObserver(-1, 3, CPU)
    x = torch.randn(50, 3)
    observer(x)
    assert torch.equal(observer.maximum, x.abs().amax(0))
    assert torch.equal(observer.counts, histogram(x).counts)


def test_reset_forgets_everything() -> None:
    observer = HistogramObserver(-1, 3, CPU)
    observer(torch.randn(50, 3))
    observer.reset()
    assert not observer.counts.any() and not observer.maximum.any()
    observer(torch.ones(2, 3))
    assert int(observer.counts.sum()) == 6 and float(observer.peak) == 1.0


def test_sampled_rows_are_spread_over_all_tokens_of_an_image() -> None:
    sampler = RowSampler(4, 2)
    x = torch.arange(40.0).view(2, 10, 2)  # 20 tokens
    sampler(x)
    rows = sampler.gather([1], rank=0)
    assert sorted(rows[:, 0].tolist()) == [0.0, 10.0, 20.0, 30.0]


def test_an_image_with_fewer_tokens_than_rows_gives_some_twice() -> None:
    sampler = RowSampler(4, 1)
    sampler(torch.tensor([[7.0], [9.0]]))
    assert sorted(sampler.gather([1], 0).flatten().tolist()) == [7.0, 7.0, 9.0, 9.0]


def test_rows_end_in_the_same_order_whatever_the_order_of_images() -> None:
    images = [torch.randn(9, 6) for _ in range(5)]
    images.append(torch.eye(9)[:, :6])  # rows of the same values in other places
    images.append(-0.0 * torch.ones(9, 6))
    orders = [range(7), reversed(range(7)), [3, 6, 0, 5, 1, 4, 2]]
    gathered = []
    for order in orders:
        sampler = RowSampler(3, 6)
        for i in order:
            sampler(images[i])
        gathered.append(sampler.gather([7], 0))
    assert gathered[0].shape == (21, 6)
    for rows in gathered[1:]:
        assert torch.equal(rows.view(torch.int32), gathered[0].view(torch.int32))


def test_a_rank_without_images_gathers_zeros_only() -> None:
    assert torch.equal(RowSampler(2, 3).gather([1], 0), torch.zeros(2, 3))

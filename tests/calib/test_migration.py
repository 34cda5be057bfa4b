"""Input-scale vectors: exact in float, taken where they pay, and only there."""

import pytest
import torch
from torch import Tensor

from swinq.calib import migration
from swinq.calib.migration import HEADROOM, candidate_vectors, choose_input_range, quantized_output

EXPONENTS = (0.25, 0.5, 0.75, 1.0)
ROWS, IN, OUT = 300, 32, 24


def data(loud: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (ROWS, IN) with one channel ``loud`` times the others, a weight, channel maxima."""
    rows = torch.randn(ROWS, IN)
    rows[:, 5] *= loud
    return rows, torch.randn(OUT, IN) / IN**0.5, rows.abs().amax(0)


def noise(rows: Tensor, weight: Tensor, amax: Tensor, per_row: bool = True) -> float:
    wanted = rows.double() @ weight.double().T
    error = (quantized_output(rows, weight, amax, per_row).double() - wanted).square().sum(0)
    return float((error / wanted.square().sum(0)).mean())


@pytest.mark.parametrize("per_row", [True, False])
def test_a_planted_loud_channel_is_migrated_and_the_error_falls(per_row: bool) -> None:
    rows, weight, maxima = data(loud=100.0)
    choice = choose_input_range(rows, weight, maxima.max(), maxima, EXPONENTS, per_row)
    assert choice.amax.shape == (IN,) and choice.amax.dtype == torch.float32
    others = choice.amax[torch.arange(IN) != 5]
    assert float(choice.amax[5]) > 3 * float(others.max())
    before = noise(rows, weight, maxima.max(), per_row)
    after = noise(rows, weight, choice.amax, per_row)
    assert after < 0.1 * before
    assert choice.ratio == pytest.approx(after / before, rel=1e-3)


def test_nothing_is_migrated_where_it_does_not_pay() -> None:
    rows, weight, maxima = data()
    rows = rows / maxima  # all channels alike
    ones = torch.ones(IN)
    choice = choose_input_range(rows, weight, torch.tensor(1.0), ones, EXPONENTS, True)
    assert choice.amax.ndim == 0 and float(choice.amax) == 1.0 and choice.ratio == 1.0


def test_a_gain_below_the_threshold_is_not_worth_a_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight, maxima = data(loud=3.0)
    ratio = choose_input_range(rows, weight, maxima.max(), maxima, EXPONENTS, True).ratio
    assert 0.1 < ratio < 0.9
    for threshold, dimensions in ((ratio + 0.01, 1), (ratio - 0.01, 0)):
        monkeypatch.setattr(migration, "WORTHWHILE", threshold)
        choice = choose_input_range(rows, weight, maxima.max(), maxima, EXPONENTS, True)
        assert choice.amax.ndim == dimensions


def test_without_exponents_the_scalar_stays_and_its_mean_error_is_known() -> None:
    rows, weight, maxima = data(loud=30.0)
    amax = maxima.max()
    choice = choose_input_range(rows, weight, amax, maxima, (), True)
    assert torch.equal(choice.amax, amax) and choice.ratio == 1.0
    error = quantized_output(rows, weight, amax, True).double() - (rows @ weight.T).double()
    torch.testing.assert_close(choice.mean_error, error.mean(0), rtol=1e-3, atol=1e-7)


def test_a_vector_leaves_the_float_function_as_it_is() -> None:
    rows, weight, maxima = data(loud=100.0)
    for amax in candidate_vectors(maxima.max(), maxima, weight, EXPONENTS)[1:]:
        scale = amax.double() / 127
        folded = (rows.double() / scale) @ (weight.double() * scale).T
        torch.testing.assert_close(folded, rows.double() @ weight.double().T)


def test_covering_candidates_clip_nothing_and_clipped_ones_as_much_as_the_scalar() -> None:
    rows, weight, maxima = data(loud=10.0)
    candidates = candidate_vectors(maxima.max(), maxima, weight, EXPONENTS)
    assert len(candidates) == 1 + len(EXPONENTS)
    for amax in candidates[1:]:
        assert bool((amax >= maxima * (migration.HEADROOM - 1e-6)).all())
    clipping = candidate_vectors(0.5 * maxima.max(), maxima, weight, EXPONENTS)
    assert len(clipping) == 1 + 2 * len(EXPONENTS)
    for covering, clipped in zip(clipping[1::2], clipping[2::2], strict=True):
        torch.testing.assert_close(clipped, 0.5 * covering)


def test_exponent_one_gives_each_channel_its_own_range() -> None:
    rows, weight, maxima = data(loud=20.0)
    amax = candidate_vectors(maxima.max(), maxima, weight, (1.0,))[1]
    torch.testing.assert_close(amax, maxima * HEADROOM)


def test_silent_channels_and_columns_do_not_blow_up() -> None:
    rows, weight, maxima = data(loud=100.0)
    rows[:, 3], maxima[3], weight[:, 9] = 0.0, 0.0, 0.0
    choice = choose_input_range(rows, weight, maxima.max(), maxima, EXPONENTS, True)
    assert bool(torch.isfinite(choice.amax).all()) and bool((choice.amax > 0).all())
    assert bool(torch.isfinite(choice.mean_error).all())


def test_a_dead_input_keeps_its_zero_range() -> None:
    rows, weight, maxima = torch.zeros(4, IN), torch.randn(OUT, IN), torch.zeros(IN)
    choice = choose_input_range(rows, weight, torch.tensor(0.0), maxima, EXPONENTS, True)
    assert choice.amax.ndim == 0 and float(choice.amax) == 0.0 and choice.ratio == 1.0


def test_a_dead_weight_chooses_the_scalar() -> None:
    rows, weight, maxima = data(loud=50.0)
    choice = choose_input_range(rows, 0 * weight, maxima.max(), maxima, EXPONENTS, True)
    assert choice.amax.ndim == 0 and not choice.mean_error.any()


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_tiny_and_huge_activations_choose_the_same_vector(scale: float) -> None:
    rows, weight, maxima = data(loud=100.0)
    usual = choose_input_range(rows, weight, maxima.max(), maxima, EXPONENTS, True)
    rows, maxima = scale * rows, scale * maxima
    choice = choose_input_range(rows, weight, maxima.max(), maxima, EXPONENTS, True)
    torch.testing.assert_close(choice.amax / scale, usual.amax, rtol=1e-4, atol=0)

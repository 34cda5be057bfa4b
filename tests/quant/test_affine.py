"""The rounding rule: exact scales, exact codes, saturation, dead ranges, the gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swinq.quant.affine import (
    QMAX,
    SMALLEST_AMAX,
    WEIGHT_RANGE,
    quantize,
    round_half_even,
    scale_and_inverse,
)

INF = float("inf")


def test_scale_is_amax_over_127_and_inverse_its_reciprocal_each_rounded_once_to_fp32() -> None:
    amax = torch.rand(10_000) * 100 + 1e-3
    scale, inverse = scale_and_inverse(amax)
    expected = (amax.numpy().astype(np.float32) / np.float32(127)).astype(np.float32)
    assert np.array_equal(scale.numpy(), expected)
    assert np.array_equal(inverse.numpy(), (np.float32(1) / expected).astype(np.float32))


@given(
    st.floats(min_value=-(2.0**120), max_value=2.0**120, width=32),
    st.floats(min_value=SMALLEST_AMAX, max_value=2.0**126, width=32),
)
def test_codes_equal_numpys_single_fp32_multiply_and_half_even_rounding(
    x: float, amax: float
) -> None:
    _, inverse = scale_and_inverse(torch.tensor(amax))
    code = quantize(torch.tensor([x]), inverse)
    with np.errstate(over="ignore", under="ignore"):
        product = np.float32(x) * np.float32(np.float32(1) / (np.float32(amax) / np.float32(127)))
    assert float(code) == float(np.clip(np.rint(product), -128, 127))


def test_ties_round_to_the_even_code() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5])
    codes = quantize(x, torch.tensor(1.0))
    assert codes.tolist() == [-2, -2, 0, 0, 2, 2, 126]


def test_activations_saturate_at_minus_128_and_127() -> None:
    x = torch.tensor([-INF, -1e30, -128.49, 127.49, 127.5, 1e30, INF])
    assert quantize(x, torch.tensor(1.0)).tolist() == [-128, -128, -128, 127, 127, 127, 127]


def test_weights_saturate_at_minus_127() -> None:
    low, high = WEIGHT_RANGE
    codes = quantize(torch.tensor([-1e9, -127.6, 127.6]), torch.tensor(1.0), low, high)
    assert codes.tolist() == [-127, -127, 127]


@pytest.mark.parametrize("amax", [SMALLEST_AMAX, 1e-30, 1.0, 1e30, torch.finfo().max])
def test_the_range_itself_gets_code_127_at_every_magnitude(amax: float) -> None:
    ends = torch.tensor([-amax, amax])
    _, inverse = scale_and_inverse(torch.tensor(amax))
    assert quantize(ends, inverse).tolist() == [-QMAX, QMAX]


@pytest.mark.parametrize("amax", [0.0, 1e-45, 2.0**-126, SMALLEST_AMAX * (1 - 2.0**-24)])
def test_a_dead_range_gives_zero_scale_zero_inverse_and_zero_codes(amax: float) -> None:
    scale, inverse = scale_and_inverse(torch.tensor(amax))
    assert (float(scale), float(inverse)) == (0.0, 0.0)
    codes = quantize(torch.tensor([-3e38, -1.0, 0.0, 1e-45, 3e38]), inverse)
    assert codes.eq(0).all()


def test_the_smallest_live_range_has_a_normal_scale_and_a_finite_inverse() -> None:
    scale, inverse = scale_and_inverse(torch.tensor(SMALLEST_AMAX))
    assert float(scale) >= torch.finfo(torch.float32).tiny
    assert torch.isfinite(inverse) and float(inverse) > 0


def test_subnormal_values_round_to_code_zero_of_an_ordinary_range() -> None:
    _, inverse = scale_and_inverse(torch.tensor(1.0))
    assert quantize(torch.tensor([1e-45, -1e-40]), inverse).eq(0).all()


def test_an_uncalibrated_range_stays_nan() -> None:
    scale, inverse = scale_and_inverse(torch.tensor([1.0, float("nan")]))
    assert scale.isnan().tolist() == inverse.isnan().tolist() == [False, True]


def test_a_half_precision_tensor_is_scaled_in_fp32() -> None:
    x = torch.linspace(-1, 1, 4001).half()
    _, inverse = scale_and_inverse(torch.tensor(0.9))
    codes = quantize(x, inverse)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, quantize(x.float(), inverse))


def test_the_gradient_is_the_inverse_inside_the_range_and_zero_outside() -> None:
    x = torch.tensor([-200.0, -63.7, 0.0, 20.2, 63.4, 64.0, 1e9], requires_grad=True)
    quantize(x, torch.tensor(2.0)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 2, 2, 2, 0, 0]


def test_rounding_passes_the_gradient_through_unchanged() -> None:
    x = torch.tensor([0.2, 0.5, 7.9], requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 3.0])
    (round_half_even(x) * weights).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weights)

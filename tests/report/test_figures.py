"""Numbers as a reader sees them."""

import math

import pytest

from swinq.report.figures import count, decibels, p_value, points, share, significant, size


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.034, "+0.03"), (-0.034, "−0.03"), (-0.004, "0.00"), (0.0, "0.00"), (-12.5, "−12.50")],
)
def test_points_have_a_sign_unless_they_are_nothing(value: float, text: str) -> None:
    assert points(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00123456, "0.00123"),
        (1234.5678, "1,235"),
        (-4.1, "−4.10"),
        (0.0, "0"),
        (1.5e-9, "1.50e−09"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "–"),
    ],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


def test_what_was_not_measured_is_a_dash_and_no_noise_is_infinite() -> None:
    assert (decibels(None), decibels(math.inf), decibels(-3.21)) == ("–", "∞", "−3.2")
    assert (share(None), size(None)) == ("–", "–")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.0341, "3.4 %"), (0.0001, "0.010 %"), (1e-9, "< 0.0001 %")],
)
def test_a_small_share_is_not_none(value: float, text: str) -> None:
    assert share(value) == text


def test_counts_sizes_and_probabilities() -> None:
    assert (count(1, "image"), count(3925, "image")) == ("1 image", "3,925 images")
    assert size(28_540_032) == "28.5 MB"
    assert (p_value(0.25), p_value(0.00001)) == ("= 0.250", "< 0.001")

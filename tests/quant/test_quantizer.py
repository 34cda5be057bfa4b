"""TensorQuantizer: its range, its axis, its state, and that it cannot run without a range."""

import copy

import pytest
import torch

from swinq.errors import CalibrationError
from swinq.quant.quantizer import QuantDescriptor, TensorQuantizer

NAN, INF = float("nan"), float("inf")


def calibrated(amax: object, descriptor: QuantDescriptor | None = None) -> TensorQuantizer:
    quantizer = TensorQuantizer(descriptor or QuantDescriptor())
    quantizer.load_calib_amax(torch.tensor(amax))
    return quantizer


def test_a_new_quantizer_holds_nan_and_is_uncalibrated() -> None:
    one = TensorQuantizer(QuantDescriptor())
    many = TensorQuantizer(QuantDescriptor(axis=0), channels=3)
    assert one.amax.shape == () and many.amax.shape == (3,)
    assert one.amax.isnan() and many.amax.isnan().all()
    assert not one.calibrated and not many.calibrated


def test_running_uncalibrated_is_an_error_that_names_the_quantizer() -> None:
    quantizer = TensorQuantizer(QuantDescriptor())
    quantizer.name = "layers.0.blocks.1.attn.qkv.input_quantizer"
    with pytest.raises(CalibrationError, match=r"layers\.0\.blocks\.1\.attn\.qkv\.input") as error:
        quantizer(torch.ones(2))
    assert "calibrate" in error.value.fix


def test_one_nan_among_many_channels_is_uncalibrated_too() -> None:
    quantizer = TensorQuantizer(QuantDescriptor(axis=0), channels=2)
    quantizer.amax.copy_(torch.tensor([1.0, NAN]))
    with pytest.raises(CalibrationError, match="no range"):
        quantizer(torch.ones(2, 2))


def test_fake_quantization_gives_multiples_of_the_scale_that_are_nearest() -> None:
    quantizer = calibrated(2.0)
    x = torch.randn(1000)
    y = quantizer(x)
    scale, _ = quantizer.scale()
    inside = x.abs() <= 2.0
    assert (y - x)[inside].abs().max() <= float(scale) / 2 * (1 + 1e-5)
    assert torch.equal(y / scale, (y / scale).round())
    assert y.max() == 127 * scale


@pytest.mark.parametrize("shape", [(4, 5, 3), (7, 3), (3,)])
def test_a_vector_without_axis_lies_along_the_last_dimension(shape: tuple[int, ...]) -> None:
    quantizer = calibrated([1.0, 10.0, 100.0], QuantDescriptor(axis=-1))
    codes, scale = quantizer.codes(torch.ones(shape))
    assert scale.shape == (*[1] * (len(shape) - 1), 3)
    assert (codes == torch.tensor([127.0, 13.0, 1.0])).all()


@pytest.mark.parametrize("axis", [0, 1, 2, -2])
def test_an_axis_gives_each_index_its_own_scale(axis: int) -> None:
    quantizer = TensorQuantizer(QuantDescriptor(axis=axis), channels=2)
    quantizer.load_calib_amax(torch.tensor([1.0, 4.0]))
    x = torch.ones(2, 2, 2)
    codes, _ = quantizer.codes(x)
    assert codes.select(axis, 0).eq(127).all()
    assert codes.select(axis, 1).eq(32).all()


def test_the_descriptor_bounds_the_codes() -> None:
    quantizer = calibrated(1.0, QuantDescriptor(low=-127))
    assert float(quantizer.codes(torch.tensor(-9.0))[0]) == -127
    assert float(calibrated(1.0).codes(torch.tensor(-9.0))[0]) == -128


def test_a_disabled_quantizer_returns_the_very_tensor_even_uncalibrated() -> None:
    quantizer = TensorQuantizer(QuantDescriptor())
    quantizer.enabled = False
    x = torch.randn(3)
    assert quantizer(x) is x


@pytest.mark.parametrize("amax", [NAN, INF, -1.0, [1.0, -INF], [1.0, 2.0, NAN]])
def test_a_range_that_is_not_finite_or_negative_is_refused_by_name(amax: object) -> None:
    quantizer = TensorQuantizer(QuantDescriptor())
    quantizer.name = "layers.1.downsample.reduction.input_quantizer"
    with pytest.raises(CalibrationError, match=r"downsample\.reduction"):
        quantizer.load_calib_amax(torch.tensor(amax))
    assert not quantizer.calibrated


def test_the_refused_channel_itself_is_shown_not_just_the_first_ones() -> None:
    amax = torch.ones(100)
    amax[70] = -3.5
    with pytest.raises(CalibrationError, match=r"-3\.5"):
        TensorQuantizer(QuantDescriptor(axis=0), 100).load_calib_amax(amax)


def test_zero_is_a_range_that_is_dead_and_rounds_everything_to_zero() -> None:
    quantizer = calibrated(0.0)
    assert quantizer.calibrated and quantizer.dead
    assert quantizer(torch.tensor([5.0, -1.0])).eq(0).all()
    assert not calibrated([0.0, 1.0]).dead


@pytest.mark.parametrize("saved", [torch.tensor(3.0), torch.tensor([1.0, 2.0, 3.0])])
def test_a_state_dict_brings_a_scalar_or_a_vector(saved: torch.Tensor) -> None:
    for channels in (None, 3):
        axis = None if channels is None else -1
        quantizer = TensorQuantizer(QuantDescriptor(axis=axis), channels)
        quantizer.load_state_dict({"_amax": saved})
        assert torch.equal(quantizer.amax, saved)
        assert quantizer(torch.ones(2, 3)).shape == (2, 3)


def test_a_state_dict_without_the_range_is_refused() -> None:
    with pytest.raises(RuntimeError, match="_amax"):
        TensorQuantizer(QuantDescriptor()).load_state_dict({})


def test_a_state_dict_round_trip_keeps_every_bit() -> None:
    first, second = calibrated(0.1), TensorQuantizer(QuantDescriptor())
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.amax, second.amax)


def test_new_ranges_take_effect_at_once_however_they_come() -> None:
    quantizer = calibrated(1.0)
    assert float(quantizer.scale()[0] * 127) == pytest.approx(1.0)
    for value in range(2, 40):  # freed memory is used again: addresses repeat
        if value % 3 == 0:
            quantizer.load_state_dict({"_amax": torch.tensor(float(value))})
        elif value % 3 == 1:
            quantizer.amax.fill_(value)
        else:
            quantizer.load_calib_amax(torch.tensor(0.5))
            quantizer.load_calib_amax(torch.tensor(float(value)))
        assert float(quantizer.scale()[0] * 127) == pytest.approx(value)


def test_a_copy_has_a_range_of_its_own() -> None:
    quantizer = calibrated(1.0)
    quantizer.scale()
    other = copy.deepcopy(quantizer)
    other.amax.fill_(2.0)
    assert float(quantizer.scale()[0]) * 2 == float(other.scale()[0])


def test_a_copy_takes_new_ranges_however_often_the_original_did() -> None:
    quantizer = calibrated(1.0)
    for amax in (2.0, 3.0):
        quantizer.load_state_dict({"_amax": torch.tensor(amax)})
    copied = copy.deepcopy(quantizer)
    copied.load_state_dict({"_amax": torch.tensor(100.0)})
    assert copied.scale()[0] * 127 == pytest.approx(100.0)
    assert quantizer.scale()[0] * 127 == pytest.approx(3.0)


def test_a_scale_first_used_in_inference_mode_serves_training_too() -> None:
    quantizer = calibrated(1.0)
    quantizer._amax = torch.tensor([1.0, 1.0])  # other shape: its scale is not known yet
    x = torch.tensor([0.3, 5.0], requires_grad=True)
    with torch.inference_mode():
        quantizer(x)
    quantizer(x).sum().backward()
    assert x.grad is not None and x.grad[0] == pytest.approx(1.0) and x.grad[1] == 0


def test_the_observer_sees_a_detached_tensor_and_only_while_attached() -> None:
    seen: list[torch.Tensor] = []
    quantizer = TensorQuantizer(QuantDescriptor())
    x = torch.ones(2, requires_grad=True)
    quantizer.observe(x)
    quantizer.observer = seen.append
    quantizer.observe(x)
    assert len(seen) == 1 and not seen[0].requires_grad


def test_the_printed_quantizer_tells_its_state() -> None:
    quantizer = TensorQuantizer(QuantDescriptor(axis=0), 2)
    assert "uncalibrated, axis=0" in repr(quantizer)
    quantizer.load_calib_amax(torch.ones(2))
    quantizer.enabled = False
    assert "(calibrated, axis=0, disabled)" in repr(quantizer)

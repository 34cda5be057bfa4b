"""SQNR against a float64 oracle, dead channels that a total hides, clipping, hooks that go away."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from swinq.calib.calibrate import calibrate
from swinq.models.architecture import Architecture
from swinq.models.build import build_model
from swinq.quant.insert import quantize_model, quantized_layers, used_quantizers
from swinq.quant.quantizer import QuantDescriptor, TensorQuantizer
from swinq.quant.spec import QuantSpec
from swinq.report.layer_error import (
    DEAD_DB,
    ErrorSums,
    clipped_values,
    measure_clipping,
    measure_layer_errors,
    observed,
)


def oracle(y: Tensor, other: Tensor) -> tuple[float, list[float]]:
    """Total and per-channel SQNR by plain loops in float64."""
    signal, noise = y.double().square(), (other.double() - y.double()).square()
    channels = [
        10 * math.log10(signal[..., c].sum().item() / noise[..., c].sum().item())
        for c in range(y.shape[-1])
    ]
    return 10 * math.log10(signal.sum().item() / noise.sum().item()), channels


def coarser(model: nn.Module, step: float) -> nn.Module:
    """A copy whose Linear weights are rounded to multiples of step."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = (module.weight.data / step).round() * step
    return other


def test_sums_over_batches_match_the_oracle() -> None:
    y = torch.randn(6, 7, 130) * torch.logspace(-3, 3, 130)
    other = y + 0.01 * torch.randn_like(y)
    sums = ErrorSums()
    for a, b in zip(y.split(4), other.split(4), strict=True):
        sums.add(a, b)
    row = sums.row("layer")
    total, channels = oracle(y, other)
    channels.sort()
    assert row.total == pytest.approx(total, abs=1e-9)
    assert row.minimum == pytest.approx(channels[0], abs=1e-9)
    assert row.percentile_1 == pytest.approx(channels[1], abs=1e-9)  # nearest rank: ceil(1.3)
    assert row.median == pytest.approx(channels[64], abs=1e-9)
    assert row.channels == 130
    assert row.dead_channels == sum(value < DEAD_DB for value in channels) > 0


def test_a_dead_channel_is_the_minimum_although_the_total_hides_it() -> None:
    y = torch.randn(100, 16)
    y[:, 0] *= 200  # a loud channel sets the scale; quiet channel 5 is rounded to zero
    y[:, 5] *= 0.01
    scale = y.abs().max() / 127
    sums = ErrorSums()
    sums.add(y[:, [0, 5]], ((y / scale).round() * scale)[:, [0, 5]])
    row = sums.row("layer")
    assert row.total > 30
    assert row.minimum == pytest.approx(0.0, abs=1e-9)
    assert row.dead_channels == 1


def test_exact_and_silent_layers_have_no_noise() -> None:
    sums = ErrorSums()
    sums.add(torch.zeros(3, 4), torch.zeros(3, 4))
    assert (sums.row("silent").total, sums.row("silent").channels) == (math.inf, 0)
    sums.add(torch.ones(3, 4), torch.ones(3, 4))
    assert (sums.row("exact").minimum, sums.row("exact").dead_channels) == (math.inf, 0)


@pytest.mark.parametrize("version", [1, 2])
def test_layers_of_a_swin_match_outputs_recorded_by_hand(
    version: int, tiny_architecture: Architecture, tiny_architecture_v2: Architecture
) -> None:
    model = build_model(tiny_architecture if version == 1 else tiny_architecture_v2).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # v2 starts with dead branches
    other = coarser(model, 0.02)
    images = torch.randn(5, 3, 32, 32)
    attention = "layers.0.blocks.1.attn"
    names = [attention, f"{attention}.qkv", f"{attention}.proj", "layers.0.downsample.reduction"]
    rows = measure_layer_errors(model, other, names, [images[:3], images[3:]], micro_batch=2)
    seen: list[dict[str, Tensor]] = []
    for network in (model, other):
        outputs: dict[str, Tensor] = {}
        block = network.get_submodule(attention)
        bias = bias_outside(block)
        handles = [
            block.proj.register_forward_hook(
                lambda m, args, y, at=outputs: at.update({attention: args[0], names[2]: y})
            ),
            block.qkv.register_forward_hook(
                lambda m, args, y, at=outputs, bias=bias: at.update({names[1]: y + bias})
            ),
            network.get_submodule(names[3]).register_forward_hook(
                lambda m, args, y, at=outputs: at.update({names[3]: y})
            ),
        ]
        with torch.no_grad():
            network(images)
        for handle in handles:
            handle.remove()
        seen.append(outputs)
    assert [row.layer for row in rows] == names
    for row in rows:
        total, channels = oracle(seen[0][row.layer], seen[1][row.layer])
        assert row.total == pytest.approx(total, abs=1e-3)  # batches of other sizes: other bits
        assert row.minimum == pytest.approx(min(channels), abs=1e-3)
        assert row.local_total is not None and row.local_total > row.total


def bias_outside(attention: nn.Module) -> Tensor | float:
    """What v2's attention adds to its qkv; v1's Linear has its own bias."""
    return 0.0 if attention.qkv.bias is not None else attention.qkv_bias().detach()


@pytest.mark.parametrize("version", [1, 2])
def test_every_layer_of_a_calibrated_model_has_a_row(
    version: int, tiny_architecture: Architecture, tiny_architecture_v2: Architecture
) -> None:
    model = build_model(tiny_architecture if version == 1 else tiny_architecture_v2).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    images = torch.randn(4, 3, 32, 32)
    quantized = quantize_model(copy.deepcopy(model), QuantSpec())
    calibrate(quantized, list(images))
    layers = list(quantized_layers(quantized))
    rows = measure_layer_errors(model, quantized, layers, [images])
    assert [row.layer for row in rows] == layers
    for row in rows:  # INT8 has 6 dB a bit; a bias on one side only would show as less than 20
        assert row.local_total is not None and 25 < row.local_total < 60, row.layer
    clipped = measure_clipping(quantized, list(used_quantizers(quantized)), [images])
    activations = {n for n in used_quantizers(quantized) if not n.endswith(".weight_quantizer")}
    assert set(clipped) == activations and max(clipped.values()) < 0.01


def test_local_error_is_the_layers_own() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    other = copy.deepcopy(model)
    other[0].weight.data *= 1.1  # only the first layer is wrong
    first, second = measure_layer_errors(model, other, ["0", "1"], [torch.randn(4, 8)])
    assert first.local_total == pytest.approx(first.total)
    assert second.total < 60 and second.local_total == math.inf


def test_a_layer_that_never_runs_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].spare = nn.Linear(8, 8)
    rows = measure_layer_errors(model, coarser(model, 0.1), ["0", "0.spare"], [torch.randn(4, 8)])
    assert [row.layer for row in rows] == ["0"]


def test_hooks_are_gone_even_after_a_failure() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(RuntimeError, match="stop"), observed(model, ["0"], lambda name, y: None):
        raise RuntimeError("stop")
    assert not model[0]._forward_hooks


def test_clipped_values_are_the_codes_that_clamping_changes() -> None:
    x = torch.tensor([126.4, 127.4, 127.6, 500.0, -128.4, -128.6])
    assert clipped_values(x, torch.tensor(1.0)) == 3


def test_clipping_is_measured_where_values_are_shown_or_passed() -> None:
    class Layer(nn.Module):
        """As QuantLinear: the input is observed and coded, the output quantizer is called."""

        def __init__(self) -> None:
            super().__init__()
            self.input_quantizer = TensorQuantizer(QuantDescriptor())
            self.output_quantizer = TensorQuantizer(QuantDescriptor(axis=-1), 2)
            self.idle_quantizer = TensorQuantizer(QuantDescriptor())
            self.input_quantizer.load_calib_amax(torch.tensor(1.0))
            self.output_quantizer.load_calib_amax(torch.tensor([1.0, 100.0]))
            self.idle_quantizer.enabled = False

        def forward(self, x: Tensor) -> Tensor:
            self.input_quantizer.observe(x)
            codes, scale = self.input_quantizer.codes(x)
            return self.idle_quantizer(self.output_quantizer(codes * scale * 10))

    layer = Layer()
    x = torch.tensor([[0.5, 0.5], [2.0, 0.5], [0.05, 0.05], [0.01, 0.01]])
    names = ["input_quantizer", "output_quantizer", "idle_quantizer"]
    assert measure_clipping(layer, names, [x[:2], x[2:]]) == {
        "input_quantizer": 1 / 8,
        "output_quantizer": 2 / 8,
    }
    assert layer.input_quantizer.observer is None

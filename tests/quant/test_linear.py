"""QuantLinear against an oracle in 64-bit integers, in every configuration of a recipe."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinq.errors import CalibrationError
from swinq.quant.linear import QuantLinear, QuantQkv, round_to_half
from swinq.quant.spec import QuantSpec

IN, OUT, ROWS = 48, 24, 40
F32 = np.float32

FASTERTRANSFORMER = QuantSpec(
    weight_granularity="per_tensor",
    output_granularity="per_tensor",
    output_layers=("qkv", "proj", "fc1", "fc2", "reduction"),
    output_position="before_bias",
    output_method="percentile",
    output_headroom=1.0,
    probabilities="static",
)


def build(
    kind: str = "proj",
    spec: QuantSpec | None = None,
    precision: str = "int8",
    bias: bool = True,
    vector: bool = False,
) -> tuple[QuantLinear, Tensor]:
    """A calibrated layer, and inputs (ROWS, IN) of which a few lie outside its range."""
    layer = QuantLinear(nn.Linear(IN, OUT, bias=bias), kind, spec or QuantSpec(), precision)
    x = torch.randn(ROWS, IN) * torch.logspace(-1, 1, IN)
    x[0], x[1] = x.abs().amax(0), -x.abs().amax(0)
    amax = x.abs().amax(0) if vector else x.abs().max()
    layer.input_quantizer.load_calib_amax(0.9 * amax)
    layer.calibrate_weight()
    y = F.linear(x, layer.weight, layer.bias).abs()
    per_channel = layer.output_quantizer.descriptor.axis is not None
    layer.output_quantizer.load_calib_amax(0.9 * (y.amax(0) if per_channel else y.max()).detach())
    return layer, x


def scales(amax: np.ndarray) -> tuple[Any, Any]:
    scale = F32(amax) / F32(127)
    return scale, F32(1) / scale


def codes_of(x: np.ndarray, inverse: Any, low: int = -128) -> np.ndarray:
    return np.clip(np.rint(F32(x) * inverse), low, 127).astype(np.int64)


def oracle(layer: QuantLinear, x: Tensor, correction: bool = True) -> dict[str, np.ndarray]:
    """Codes, accumulators and outputs by the equations alone."""
    weight = layer.weight.detach().numpy()
    s_in, inv_in = scales(layer.input_quantizer.amax.numpy())
    folded = weight * s_in if np.ndim(s_in) else weight
    magnitude = np.abs(folded)
    per_row = layer.weight_quantizer.descriptor.axis == 0
    s_w, inv_w = scales(magnitude.max(1, keepdims=True) if per_row else magnitude.max())
    a, w = codes_of(x.numpy(), inv_in), codes_of(folded, inv_w, low=-127)
    acc = a @ w.T  # int64
    factor = np.reshape(s_w, -1) if np.ndim(s_in) else np.reshape(s_in * s_w, -1)
    y = F32(acc) * factor
    bias = np.zeros(OUT, F32) if layer.bias is None else layer.bias.detach().numpy()
    bias = bias + layer.bias_correction.numpy()
    before = layer.before_bias
    y = y if before else y + bias
    if layer.output_quantizer.enabled:
        s_out, inv_out = scales(layer.output_quantizer.amax.numpy())
        y = F32(codes_of(y, inv_out)) * s_out
    return {"a": a, "w": w, "acc": acc, "s_w": np.reshape(s_w, -1), "y": y + bias if before else y}


@pytest.mark.parametrize("vector", [False, True], ids=["scalar input", "vector input"])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("mode", [1, 2])
def test_the_layer_computes_what_the_integer_oracle_computes(
    vector: bool, granularity: str, bias: bool, mode: int
) -> None:
    spec = QuantSpec(weight_granularity=granularity)
    layer, x = build("fc2", spec, bias=bias, vector=vector)
    layer.bias_correction.normal_(std=0.01)
    layer.set_int8_mode(mode)
    expected = oracle(layer, x)

    codes, _ = layer.input_quantizer.codes(x)
    weight, weight_scale = layer.integer_weight()
    assert np.array_equal(codes.numpy(), expected["a"])
    assert {-128, 127} <= set(expected["a"].reshape(-1).tolist())  # both ends are reached
    assert weight.dtype == torch.int8 and np.array_equal(weight.numpy(), expected["w"])
    assert np.array_equal(weight_scale.numpy(), np.broadcast_to(expected["s_w"], OUT))
    with torch.no_grad():
        accumulator = F.linear(codes, weight.float())
        assert np.array_equal(accumulator.numpy(), expected["acc"])  # fp32 holds the integers
        assert np.array_equal(layer(x).numpy(), expected["y"])


def test_a_recipe_that_rounds_before_the_bias_adds_it_unrounded() -> None:
    layer, x = build("fc1", FASTERTRANSFORMER)
    with torch.no_grad():
        y = layer(x)
    assert np.array_equal(y.numpy(), oracle(layer, x)["y"])
    steps = ((y - layer.bias) / layer.output_quantizer.scale()[0]).detach()
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    assert layer.output_quantizer.amax.ndim == 0


def test_rounded_outputs_are_multiples_of_their_channels_scale() -> None:
    layer, x = build("proj")
    scale, _ = layer.output_quantizer.scale()
    with torch.no_grad():
        codes = layer(x) / scale
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert scale.shape == (OUT,) and codes.abs().max() == 128


@pytest.mark.parametrize(
    ("kind", "precision", "mode_1", "mode_2"),
    [
        ("qkv", "int8", False, False),
        ("fc1", "int8", False, False),
        ("proj", "int8", True, True),
        ("fc2", "int8", True, False),
        ("reduction", "int8", True, False),
        ("proj", "int8-unrounded", False, False),
        ("fc2", "int8-unrounded", False, False),
        ("proj", "fp16", False, False),
    ],
)
def test_which_outputs_are_rounded(kind: str, precision: str, mode_1: bool, mode_2: bool) -> None:
    layer, _ = build(kind, precision=precision)
    assert layer.output_quantizer.enabled is mode_1
    layer.set_int8_mode(2)
    assert layer.output_quantizer.enabled is mode_2
    layer.set_int8_mode(1)
    assert layer.output_quantizer.enabled is mode_1


def test_an_fp16_layer_rounds_operands_to_half_and_nothing_else() -> None:
    layer, x = build("proj", precision="fp16")
    layer.bias_correction.fill_(1e9)  # corrects the int8 error, so it has no business here
    with torch.no_grad():
        y = layer(x)
    wanted = x.half().double() @ layer.weight.half().double().T + layer.bias.double()
    assert torch.allclose(y.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.export_bias(), layer.bias)
    without, _ = build("proj", precision="fp16", bias=False)
    assert torch.equal(without.export_bias(), torch.zeros(OUT))


def test_round_to_half_is_the_nearest_half_as_fp32() -> None:
    x = torch.tensor([1.0 + 2.0**-11, 1.0 + 3 * 2.0**-11, 1e-9, 70000.0])
    assert round_to_half(x).tolist() == [1.0, 1.0 + 2.0**-9, 0.0, float("inf")]
    assert round_to_half(x).dtype == torch.float32


def test_round_to_half_passes_gradients_that_a_half_does_not_hold() -> None:
    x = torch.ones(3, requires_grad=True)
    (round_to_half(x) * torch.tensor([1e-9, 1.0, 1e9])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == pytest.approx([1e-9, 1.0, 1e9])


def test_an_inactive_layer_is_the_float_linear_to_the_bit() -> None:
    for layer, x in (build("proj"), build("fc1", FASTERTRANSFORMER), build("proj", bias=False)):
        layer.bias_correction.fill_(3.0)
        layer.active = False
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    layer, x = build("proj")
    layer.active = False
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_v2s_qkv_bias_is_q_bias_zero_v_bias() -> None:
    third = OUT // 3
    q_bias, v_bias = nn.Parameter(torch.randn(third)), nn.Parameter(torch.randn(third))
    linear = nn.Linear(IN, OUT, bias=False)
    layer = QuantQkv(linear, q_bias, v_bias, kind="qkv", spec=QuantSpec(), precision="int8")
    expected = torch.cat([q_bias, torch.zeros(third), v_bias])
    assert torch.equal(layer.full_bias(), expected) and torch.equal(layer.export_bias(), expected)
    x = torch.randn(5, IN)
    layer.input_quantizer.load_calib_amax(x.abs().max())
    layer.calibrate_weight()
    with torch.no_grad():
        assert torch.allclose(layer(x), x @ linear.weight.T + expected, atol=0.05)
    layer.active = False
    assert torch.equal(layer(x), F.linear(x, linear.weight, expected))


def test_gradients_flow_to_weight_bias_and_input_in_training() -> None:
    layer, x = build("proj")
    x = (0.5 * x).requires_grad_()
    layer(x).square().sum().backward()
    reference = x.detach().clone().requires_grad_()
    weight = layer.weight.detach().clone().requires_grad_()
    F.linear(reference, weight, layer.bias.detach()).square().sum().backward()
    for got, wanted in ((x.grad, reference.grad), (layer.weight.grad, weight.grad)):
        assert got is not None and wanted is not None
        assert F.cosine_similarity(got.flatten(), wanted.flatten(), dim=0) > 0.95
    assert layer.bias is not None and layer.bias.grad is not None


def test_no_gradient_passes_where_the_input_was_clipped() -> None:
    layer, x = build("fc1")
    limit = float(layer.input_quantizer.amax)
    x = x.requires_grad_()
    layer(x).sum().backward()
    clipped = x.detach().abs() > 1.01 * limit
    assert x.grad is not None and clipped.any()
    assert x.grad[clipped].eq(0).all() and x.grad[~clipped].ne(0).float().mean() > 0.9


def test_kept_weight_codes_follow_every_change_of_weight_and_ranges() -> None:
    layer, _ = build("fc1")

    def changed(before: Tensor) -> Tensor:
        after, scale = layer.integer_weight()
        with torch.no_grad():
            layer._cached_codes = None
            fresh, _ = layer.integer_weight()
        assert torch.equal(after, fresh)
        assert not torch.equal(after, before)
        return after

    codes, _ = layer.integer_weight()
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight))  # an optimiser's step
    codes = changed(codes)
    layer.load_state_dict({**layer.state_dict(), "weight": torch.randn(OUT, IN)})
    codes = changed(codes)
    layer.weight_quantizer.load_calib_amax(2 * layer.weight_quantizer.amax)
    codes = changed(codes)
    layer.input_quantizer.load_calib_amax(torch.rand(IN) + 0.5)  # folds into the columns
    codes = changed(codes)
    layer.weight = nn.Parameter(torch.randn(OUT, IN))
    changed(codes)


def test_weight_codes_are_computed_once_while_nothing_changes() -> None:
    layer, x = build("fc1")
    with torch.no_grad():
        layer(x)
        kept = layer._weight_codes()
        layer(x)
        assert layer._weight_codes() is kept
    layer(x)
    assert layer._weight_codes() is not kept  # training needs the graph
    assert layer._weight_codes().requires_grad


def test_a_layer_without_ranges_names_itself() -> None:
    layer = QuantLinear(nn.Linear(IN, OUT), "fc1", QuantSpec(), "int8")
    layer.input_quantizer.name = "mlp.fc1.input_quantizer"
    layer.weight_quantizer.name = "mlp.fc1.weight_quantizer"
    with pytest.raises(CalibrationError, match="fc1.input_quantizer"):
        layer(torch.ones(1, IN))
    with pytest.raises(CalibrationError, match="fc1.weight_quantizer"):
        layer.integer_weight()


def test_a_dead_weight_row_and_a_dead_input_channel_contribute_exactly_nothing() -> None:
    linear = nn.Linear(IN, OUT, bias=False)
    with torch.no_grad():
        linear.weight[3] = 0
    layer = QuantLinear(linear, "fc1", QuantSpec(), "int8")
    amax = torch.ones(IN)
    amax[7] = 0
    layer.input_quantizer.load_calib_amax(amax)
    layer.calibrate_weight()
    x = torch.rand(5, IN)
    codes, scale = layer.integer_weight()
    assert scale[3] == 0 and codes[3].eq(0).all() and codes[:, 7].eq(0).all()
    with torch.no_grad():
        y = layer(x)
        x[:, 7] = 100.0
        assert torch.equal(layer(x), y) and y.isfinite().all() and y[:, 3].eq(0).all()


def test_the_printed_layer_tells_sizes_and_precision() -> None:
    assert f"{IN}, {OUT}, fp16" in repr(build("proj", precision="fp16")[0])

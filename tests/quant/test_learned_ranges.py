"""Learned ranges and AMP: LSQ's gradient in float64, limits, dead channels, state, exact codes."""

import copy
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from swinq.errors import CalibrationError
from swinq.models.architecture import Architecture
from swinq.quant.affine import SMALLEST_AMAX
from swinq.quant.attention import row_max_codes
from swinq.quant.insert import named_quantizers, quantize_model, used_quantizers
from swinq.quant.linear import AMP_SHIFT, QuantLinear, multiply_codes
from swinq.quant.quantizer import QuantDescriptor, TensorQuantizer
from swinq.quant.spec import QuantSpec
from tests.quant.ranges import set_ranges_to_maxima
from tests.quant.tiny import tiny_swin


def learned(amax: object, descriptor: QuantDescriptor | None = None) -> TensorQuantizer:
    quantizer = TensorQuantizer(descriptor or QuantDescriptor())
    quantizer.load_calib_amax(torch.tensor(amax))
    quantizer.learn_range()
    return quantizer


def lsq(x: Tensor, amax: Tensor, grad: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Esser et al. 2020, equations 1 and 5, in float64: gradients of x and of log amax, by element.

    d(x_hat)/d(s) = rint(x/s) - x/s inside, the bound outside; d(s)/d(log amax) = s.
    """
    x, amax, grad = x.double(), amax.double(), grad.double()
    scale = amax / 127
    ratio = x / scale
    inside = (ratio >= low) & (ratio <= high)
    by_scale = torch.where(inside, ratio.round() - ratio, ratio.clamp(low, high))
    return grad * inside, grad * by_scale * scale


def close(got: Tensor | None, wanted: Tensor, atol: float = 1e-5) -> None:
    assert got is not None
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("low", [-128, -127])
def test_one_range_gets_lsqs_gradient(low: int) -> None:
    quantizer = learned(1.5, QuantDescriptor(low=low))
    x = torch.randn(50, 20, requires_grad=True)
    grad = torch.randn(50, 20)
    quantizer(x).backward(grad)
    by_x, by_range = lsq(x.detach(), quantizer.amax, grad, low, 127)
    assert (by_x == 0).any() and (by_x != 0).any()
    close(x.grad, by_x)
    close(quantizer.log_amax.grad, by_range.sum().view(1), atol=1e-3)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_range_per_index_gets_lsqs_gradient_along_its_axis(axis: int) -> None:
    quantizer = learned([0.5, 1.0, 2.0], QuantDescriptor(axis=axis))
    x = torch.randn(3, 3, 3, requires_grad=True)
    grad = torch.randn(3, 3, 3)
    quantizer(x).backward(grad)
    amax = quantizer.broadcast(quantizer.amax, 3)
    by_x, by_range = lsq(x.detach(), amax, grad, -128, 127)
    close(x.grad, by_x)
    others = [d for d in range(3) if d != axis % 3]
    close(quantizer.log_amax.grad, by_range.sum(others))


@pytest.mark.parametrize("vector", [False, True], ids=["scalar input", "vector input"])
def test_a_layers_ranges_get_lsqs_gradients(vector: bool) -> None:
    layer = QuantLinear(nn.Linear(16, 8), "proj", QuantSpec(), "int8")
    x = torch.randn(30, 16)
    layer.input_quantizer.load_calib_amax(0.8 * (x.abs().amax(0) if vector else x.abs().max()))
    layer.calibrate_weight()
    layer.weight_quantizer.load_calib_amax(0.9 * layer.weight_quantizer.amax)
    layer.output_quantizer.load_calib_amax(torch.full((8,), 0.7))
    grad = torch.randn(30, 8)
    for quantizer in (layer.input_quantizer, layer.weight_quantizer, layer.output_quantizer):
        quantizer.learn_range()
    layer(x).backward(grad)

    with torch.no_grad():
        weight = layer.weight_quantizer(layer.folded_weight()).double()  # (out, in), folded
        scale = layer.input_quantizer.scale()[0].double()
        codes = layer.input_quantizer.codes(x)[0].double()
        product = codes @ weight.T * (1.0 if vector else scale)
        y = product + layer.export_bias().double()
    by_y, by_output = lsq(y, layer.output_quantizer.amax, grad, -128, 127)
    close(layer.output_quantizer.log_amax.grad, by_output.sum(0))
    # what the product sees of the input: codes * scale, with weights from which it is folded out
    by_input = lsq(
        x, layer.input_quantizer.amax, by_y @ (weight / scale if vector else weight), -128, 127
    )[1]
    wanted = by_input.sum(0) if vector else by_input.sum().view(1)
    close(layer.input_quantizer.log_amax.grad, wanted, atol=1e-3)
    folded = layer.folded_weight().detach()
    by_weight = lsq(
        folded,
        layer.weight_quantizer.amax[:, None],
        by_y.T @ (codes if vector else codes * scale),
        -127,
        127,
    )[1]
    close(layer.weight_quantizer.log_amax.grad, by_weight.sum(1), atol=1e-3)


def test_learning_starts_at_the_range_and_fixing_ends_where_it_is() -> None:
    quantizer = learned([0.3, 4.0], QuantDescriptor(axis=-1))
    assert torch.allclose(quantizer.amax, torch.tensor([0.3, 4.0]), rtol=1e-6)
    assert isinstance(quantizer.log_amax, nn.Parameter)
    assert "learned, axis=-1" in repr(quantizer)
    with torch.no_grad():
        quantizer.log_amax += 0.1
    amax = quantizer.amax
    assert torch.allclose(amax, math.exp(0.1) * torch.tensor([0.3, 4.0]))
    quantizer.fix_range()
    assert torch.equal(quantizer.amax, amax) and torch.equal(quantizer._amax, amax)
    assert not list(quantizer.parameters())
    quantizer.fix_range()  # nothing left to do
    assert torch.equal(quantizer.amax, amax)


def test_an_uncalibrated_range_cannot_be_learned() -> None:
    quantizer = TensorQuantizer(QuantDescriptor())
    quantizer.name = "head.input_quantizer"
    with pytest.raises(CalibrationError, match=r"head\.input_quantizer"):
        quantizer.learn_range()


def test_a_limit_holds_whatever_the_parameter_says() -> None:
    quantizer = learned(1.0, QuantDescriptor(limit=1.0))
    with torch.no_grad():
        quantizer.log_amax += 1.0
    assert float(quantizer.amax) == 1.0
    (-quantizer(torch.tensor([0.3, 5.0])).sum()).backward()  # a larger range would lower this
    assert quantizer.log_amax.grad.tolist() == [0.0]


def test_dead_channels_stay_dead_and_numbers() -> None:
    quantizer = learned([0.0, 1.0, SMALLEST_AMAX / 4], QuantDescriptor(axis=-1))
    optimizer = torch.optim.AdamW([quantizer.log_amax], lr=0.1, weight_decay=0.0)
    x = torch.randn(40, 3, requires_grad=True)
    for _ in range(3):
        optimizer.zero_grad()
        quantizer(x).square().sum().backward()
        optimizer.step()
    assert quantizer.amax[0] == quantizer.amax[2] == 0.0 != quantizer.amax[1]
    assert quantizer.log_amax.isfinite().all()
    assert x.grad[:, [0, 2]].eq(0).all() and x.grad.isfinite().all()
    quantizer.fix_range()
    assert quantizer.amax.tolist()[::2] == [0.0, 0.0] and quantizer.calibrated


def test_learning_finds_the_range_of_least_error() -> None:
    x = torch.randn(20_000)
    x[0] = 40.0  # an outlier that a range by the maximum serves badly
    quantizer = learned(40.0)
    optimizer = torch.optim.Adam([quantizer.log_amax], lr=0.05)

    def error() -> Tensor:
        return (quantizer(x)[1:] - x[1:]).square().mean()

    before = float(error().detach())
    for _ in range(200):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert float(error().detach()) < before / 20
    assert 2.5 < float(quantizer.amax) < 6.0


def test_state_with_a_learned_range_loads_into_learning_and_fixed_quantizers() -> None:
    source = learned([0.3, 4.0], QuantDescriptor(axis=-1))
    with torch.no_grad():
        source.log_amax -= 0.5
    state = source.state_dict()
    assert sorted(state) == ["_amax", "log_amax"]
    same = learned([1.0, 1.0], QuantDescriptor(axis=-1))
    same.load_state_dict(state)
    assert torch.equal(same.log_amax, source.log_amax)
    fixed = TensorQuantizer(QuantDescriptor(axis=-1), 2)
    fixed.load_state_dict(state)
    assert fixed.log_amax is None and torch.equal(fixed.amax, source.amax)
    assert sorted(state) == ["_amax", "log_amax"]  # the caller's dictionary is his own
    one = TensorQuantizer(QuantDescriptor())
    one.load_state_dict(learned(2.0).state_dict())
    assert one.amax.shape == () and float(one.amax) == pytest.approx(2.0)


def quantized_tiny(architecture: Architecture, spec: QuantSpec | None = None) -> nn.Module:
    model = quantize_model(tiny_swin(architecture), spec or QuantSpec())
    set_ranges_to_maxima(model, torch.randn(4, 3, 32, 32), share=0.95)
    return model


@pytest.mark.parametrize("version", [1, 2])
def test_switching_learning_on_changes_no_more_than_the_last_bits(
    version: int, tiny_architecture: Architecture, tiny_architecture_v2: Architecture
) -> None:
    model = quantized_tiny(tiny_architecture if version == 1 else tiny_architecture_v2)
    student = copy.deepcopy(model)
    for quantizer in used_quantizers(student).values():
        quantizer.learn_range()
    for name, quantizer in used_quantizers(student).items():
        before = named_quantizers(model)[name].amax
        torch.testing.assert_close(quantizer.amax, before, rtol=2e-6, atol=0.0)
    images = torch.randn(2, 3, 32, 32)
    loss = student(images).square().mean()
    loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    moved = [n for n, p in student.named_parameters() if "log_amax" in n and p.grad.any()]
    assert len(moved) == len(used_quantizers(student))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_codes_are_exact_up_to_one_rounding_of_the_amp_type(dtype: torch.dtype) -> None:
    a = torch.randint(-128, 128, (8, 6144)).float()
    b = torch.randint(-127, 128, (6144, 8)).float()
    a[0], b[:, 0] = -128.0, 127.0  # the largest sum there can be, beyond fp16
    factor = torch.rand(8) * 1e-4
    exact = (a.double() @ b.double()).float()
    with torch.autocast("cpu", dtype):
        y = multiply_codes(a, b, factor)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, exact.to(torch.float64).float() * factor, rtol=2**-8, atol=1e-9)
    halves = (exact / 2**11).to(dtype).float() * 2**11  # rounded once
    share = float(((y / factor - halves).abs() <= 1e-5 * halves.abs()).float().mean())
    assert share > 0.9  # a backend may round sums of parts


class Products(TorchDispatchMode):
    """Keeps the operands of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.operands.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("probabilities", ["row_max", "static"])
@pytest.mark.parametrize("version", [1, 2])
def test_under_amp_products_see_the_very_codes_and_the_rest_is_fp32(
    version: int,
    probabilities: str,
    training: bool,
    tiny_architecture: Architecture,
    tiny_architecture_v2: Architecture,
) -> None:
    architecture = tiny_architecture if version == 1 else tiny_architecture_v2
    model = quantized_tiny(architecture, QuantSpec(probabilities=probabilities))
    block = model.layers[0].blocks[1]
    x = torch.randn(2, 256, 32)
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        amp = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
        with Products() as products, torch.set_grad_enabled(training), amp:
            outputs.append(block(x).detach())
        coded = [pair for pair in products.operands if pair[0].shape[-1] != 2]  # not v2's cpb_mlp
        coded = [pair for pair in coded if pair[0].shape[-1] != 512]
        assert len(coded) == 6  # qkv, q k, p v, proj, fc1, fc2
        for pair in coded:
            for codes in pair:
                assert codes.dtype == dtype
                integers = codes.double()
                integers = integers / AMP_SHIFT if integers.abs().max() < 1 else integers
                assert torch.equal(integers, integers.round())
                assert 1 <= integers.abs().max() <= 255
        assert outputs[-1].dtype == torch.float32
    difference = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert 0.0 < float(difference) < 0.02


def test_attentions_softmax_gradient_is_that_of_its_rounded_probabilities() -> None:
    s = torch.randn(2, 3, 7, 7, requires_grad=True)
    v = torch.randint(-128, 128, (2, 3, 7, 5)).float()
    grad = torch.randn(2, 3, 7, 5)
    p, total = row_max_codes(s, torch.float32)
    multiply_codes(p, v, 0.01 / total).backward(grad)
    share = (p / total).detach().double()
    by_p = grad.double() @ (0.01 * v.double()).transpose(-2, -1)
    wanted = share * (by_p - (by_p * share).sum(-1, keepdim=True))
    close(s.grad, wanted)
    assert float(s.grad.sum(-1).abs().max()) < 1e-5


def test_a_range_beyond_its_limit_comes_back_and_goes_no_further() -> None:
    """Descent on a loss that wants it smaller moves it; on one that wants it larger, not."""
    for wants, moves in ((1.0, True), (-1.0, False)):
        quantizer = TensorQuantizer(QuantDescriptor(axis=-1, limit=1.0), 2)
        quantizer.load_calib_amax(torch.tensor([1.0, 0.5]))
        log_amax = quantizer.learn_range()
        with torch.no_grad():
            log_amax += torch.tensor([0.01, 0.0])  # a step too far
        codes, scale = quantizer.codes(torch.tensor([[5.0, 5.0]]))  # clipped: the code is 127
        (wants * (codes * scale)).sum().backward()
        assert log_amax.grad is not None
        assert bool(log_amax.grad[0] != 0) is moves
        assert log_amax.grad[1] != 0

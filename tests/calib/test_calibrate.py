"""Calibration as a whole: what it sets and reports, and that order and batches cannot matter."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swinq.calib.calibrate import Calibration, calibrate
from swinq.calib.methods import METHODS
from swinq.calib.observers import BINS
from swinq.errors import CalibrationError
from swinq.models.architecture import Architecture
from swinq.quant.insert import (
    float_layers,
    named_quantizers,
    quantize_model,
    quantized_layers,
    set_int8_mode,
    used_quantizers,
)
from swinq.quant.linear import QuantLinear
from swinq.quant.spec import LayerRule, QuantSpec
from swinq.quant.stream import stream_modules
from tests.quant.recipes import recipe
from tests.quant.tiny import tiny_swin

FULL = recipe("int8")


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def swin(
    request: pytest.FixtureRequest,
    tiny_architecture: Architecture,
    tiny_architecture_v2: Architecture,
) -> nn.Module:
    return tiny_swin(tiny_architecture if request.param == 1 else tiny_architecture_v2)


@pytest.fixture
def swin_v1(tiny_architecture: Architecture) -> nn.Module:
    return tiny_swin(tiny_architecture)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 32, 32) * torch.linspace(0.3, 2.0, 6).view(-1, 1, 1, 1)


def quantized(model: nn.Module, spec: QuantSpec = FULL) -> nn.Module:
    return quantize_model(copy.deepcopy(model), spec)


def findings(model: nn.Module, result: Calibration) -> dict[str, Tensor]:
    """Every tensor that calibration found."""
    found = {n: q.amax for n, q in named_quantizers(model).items() if q.calibrated}
    found |= {f"histogram of {n}": h for n, h in result.histograms.items()}
    for name, layer in quantized_layers(model).items():
        if isinstance(layer, QuantLinear):
            found[f"bias correction of {name}"] = layer.bias_correction
    found["residual"] = torch.tensor(list(result.residual_max.values()))
    found["vectors"] = torch.tensor(list(result.vectors.values()))
    return found


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


@pytest.mark.parametrize("method", METHODS)
def test_every_quantizer_gets_a_range_and_logits_stay_close(
    swin: nn.Module, images: Tensor, method: str
) -> None:
    fake = quantized(swin)
    result = calibrate(fake, images, method=method)
    assert result.method == method and result.images == len(images)
    used = used_quantizers(set_int8_mode(fake, 1))
    assert [n for n, q in named_quantizers(fake).items() if q.calibrated] == sorted(
        used, key=list(named_quantizers(fake)).index
    )
    assert all(q.observer is None for q in named_quantizers(fake).values())
    for mode in (1, 2):
        set_int8_mode(fake, mode)
        with torch.no_grad():
            wanted = swin(images)
            error = float((fake(images) - wanted).norm() / wanted.norm())
        assert 0 < error < (0.35 if method == "entropy" else 0.05)


def test_the_fastertransformer_recipe_calibrates_in_both_versions(
    swin: nn.Module, images: Tensor
) -> None:
    fake = quantized(swin, recipe("fastertransformer"))
    result = calibrate(fake, images)
    assert not result.vectors
    assert all(q.amax.ndim == 0 for q in named_quantizers(fake).values())
    assert "layers.0.blocks.0.attn.a_quantizer" in result.histograms
    assert "layers.0.blocks.0.mlp.fc1.output_quantizer" in result.histograms
    with torch.no_grad():
        wanted = swin(images)
        assert float((fake(images) - wanted).norm() / wanted.norm()) < 0.2


def test_method_max_sets_the_largest_magnitude_of_the_float_model(
    swin_v1: nn.Module, images: Tensor
) -> None:
    fake = quantized(swin_v1, QuantSpec(output_headroom=1.25))
    calibrate(fake, images, method="max")
    seen: list[Tensor] = []
    fc2 = swin_v1.get_submodule("layers.0.blocks.1.mlp.fc2")
    fc2.register_forward_hook(lambda module, args, out: seen.extend((args[0], out)))
    with torch.no_grad():
        for image in images:
            swin_v1(image[None])
    layer: Any = fake.get_submodule("layers.0.blocks.1.mlp.fc2")
    largest = torch.stack(seen[::2]).abs().max()
    torch.testing.assert_close(layer.input_quantizer.amax, largest, rtol=1e-6, atol=0)
    channels = torch.stack(seen[1::2]).abs().amax((0, 1, 2))
    torch.testing.assert_close(layer.output_quantizer.amax, 1.25 * channels, rtol=1e-5, atol=0)
    assert torch.equal(layer.weight_quantizer.amax, layer.weight.abs().amax(1))


# the same bits, however the images come


def test_order_of_images_and_kind_of_iterable_change_no_bit(
    swin: nn.Module, images: Tensor
) -> None:
    runs = [
        images,
        images.flip(0),
        [images[i] for i in (3, 0, 5, 1, 4, 2)],
        (image for image in images),
    ]
    found = []
    for run in runs:
        fake = quantized(swin)
        found.append(findings(fake, calibrate(fake, run, method="mse")))
    assert any("bias correction" in name and x.any() for name, x in found[0].items())
    assert found[0]["vectors"].numel() > 0
    for other in found[1:]:
        assert_same_bits(found[0], other)


def test_calibrating_again_starts_afresh(swin: nn.Module, images: Tensor) -> None:
    once, twice = quantized(swin), quantized(swin)
    calibrate(twice, 3 * images, method="entropy")
    with torch.no_grad():
        twice(images)  # leaves scales and codes behind
    wanted = findings(once, calibrate(once, images))
    assert_same_bits(wanted, findings(twice, calibrate(twice, images)))
    with torch.no_grad():
        assert torch.equal(once(images), twice(images))


def test_calibrating_in_mode_2_finds_what_mode_1_needs_too(swin: nn.Module, images: Tensor) -> None:
    one, two = quantized(swin), set_int8_mode(quantized(swin), 2)
    assert_same_bits(findings(one, calibrate(one, images)), findings(two, calibrate(two, images)))


def test_calibration_runs_in_float_whatever_is_active_and_leaves_that_as_it_was(
    swin_v1: nn.Module, images: Tensor
) -> None:
    fake = quantized(swin_v1).train()
    names = ["layers.0.blocks.0.attn"]
    for name, layer in quantized_layers(fake).items():
        layer.active = name in names
    result = calibrate(fake, images)
    assert [n for n, layer in quantized_layers(fake).items() if layer.active] == names
    other = quantized(swin_v1)
    assert_same_bits(findings(fake, result), findings(other, calibrate(other, images)))
    assert not fake.training


def test_progress_is_told_once_for_each_image(swin_v1: nn.Module, images: Tensor) -> None:
    ticks: list[int] = []
    calibrate(quantized(swin_v1), images, on_image=lambda: ticks.append(1))
    assert len(ticks) == len(images)


# what is reported


def test_histograms_hold_every_value_of_every_image(swin: nn.Module, images: Tensor) -> None:
    result = calibrate(quantized(swin), images)
    tokens = {"layers.0": 256, "layers.1": 64}
    for name, counts in result.histograms.items():
        assert counts.shape == (BINS,) and counts.dtype == torch.int64
        if name.endswith("qkv.input_quantizer"):
            width = 32 if name.startswith("layers.0") else 64
            assert int(counts.sum()) == len(images) * tokens[name[:8]] * width
    assert not any("output_quantizer" in name for name in result.histograms)


def test_residual_maxima_are_those_of_the_stream(swin: nn.Module, images: Tensor) -> None:
    result = calibrate(quantized(swin), images)
    wanted = dict.fromkeys(stream_modules(swin), 0.0)
    for name, module in stream_modules(swin).items():

        def keep(module: nn.Module, args: Any, out: Tensor, name: str = name) -> None:
            wanted[name] = max(wanted[name], float(out.abs().max()))

        module.register_forward_hook(keep)
    with torch.no_grad():
        for image in images:
            swin(image[None])
    assert result.residual_max == pytest.approx(wanted, rel=1e-5)
    assert len(wanted) == 6


def test_v2s_query_and_key_ranges_never_exceed_1(
    tiny_architecture_v2: Architecture, images: Tensor
) -> None:
    swin = tiny_swin(tiny_architecture_v2)
    for name, module in swin.named_modules():
        if name.endswith("attn.qkv"):
            with torch.no_grad():
                module.weight[1:32] *= 1e-4  # of head 0's query one component is left
    fake = quantized(swin)
    calibrate(fake, images)
    attn: Any = fake.get_submodule("layers.0.blocks.0.attn")
    assert attn.q_quantizer.amax.tolist() == [1.0]
    for name, quantizer in named_quantizers(fake).items():
        if name.endswith(("q_quantizer", "k_quantizer")):
            assert float(quantizer.scale()[0].max()) <= 1 / 127
            assert float(quantizer.amax.min()) > 0.1  # headroom over what was seen


# input vectors and bias correction


def with_loud_channels(model: nn.Module) -> nn.Module:
    """The same float function, its LayerNorm outputs rescaled and the weights compensating."""
    model = copy.deepcopy(model)
    for stage in (0, 1):
        for number in (0, 1):
            block: Any = model.get_submodule(f"layers.{stage}.blocks.{number}")
            for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                factor = torch.ones(norm.weight.numel())
                factor[::11] = 60.0
                with torch.no_grad():
                    norm.weight *= factor
                    norm.bias *= factor
                    linear.weight /= factor
    return model


def test_loud_channels_get_a_vector_and_cost_nothing(swin_v1: nn.Module, images: Tensor) -> None:
    loud = with_loud_channels(swin_v1)
    images = torch.cat([images, images.flip(3), images.flip(2)])  # 18 * 64 tokens in stage 1
    with torch.no_grad():
        wanted = swin_v1(images)
        torch.testing.assert_close(loud(images), wanted, rtol=1e-4, atol=1e-4)
    errors = {}
    for name, model, spec in (
        ("plain", swin_v1, FULL),
        ("loud", loud, FULL),
        ("loud, no vectors", loud, recipe("int8", INPUT={"MIGRATION": []})),
    ):
        fake = quantized(model, spec)
        result = calibrate(fake, images)
        if name == "loud":
            vectors = {n for n in result.vectors if n.endswith(("qkv", "fc1"))}
            assert len(vectors) == 8 and max(result.vectors.values()) < 0.95
            for layer in vectors:
                assert named_quantizers(fake)[f"{layer}.input_quantizer"].amax.ndim == 1
        with torch.no_grad():
            errors[name] = float((fake(images) - wanted).norm())
    assert errors["loud"] < 1.3 * errors["plain"]
    assert errors["loud, no vectors"] > 3 * errors["loud"]


def test_bias_correction_removes_the_mean_error_of_each_output(
    swin_v1: nn.Module, images: Tensor
) -> None:
    sources: list[Tensor] = []
    fake = quantized(swin_v1, recipe("int8", BIAS_CORRECTION=True))
    calibrate(fake, images)
    layer: Any = fake.get_submodule("layers.0.blocks.0.mlp.fc2")
    layer.register_forward_pre_hook(lambda module, args: sources.append(args[0]))
    with torch.no_grad(), float_layers(fake):
        fake(images)
    layer.output_quantizer.enabled = False
    wanted = nn.functional.linear(sources[0], layer.weight, layer.bias)

    def mean_error() -> float:
        with torch.no_grad():
            return float((layer(sources[0]) - wanted).mean((0, 1)).square().mean().sqrt())

    assert layer.bias_correction.any()
    corrected = mean_error()
    layer.bias_correction.zero_()
    assert corrected < 0.3 * mean_error()


def test_few_tokens_give_no_vectors_and_a_note(swin_v1: nn.Module, images: Tensor) -> None:
    result = calibrate(quantized(with_loud_channels(swin_v1)), images[:1])
    assert not result.vectors
    assert any("no input-scale vectors for 17 layers" in note for note in result.notes)
    result = calibrate(quantized(swin_v1, QuantSpec()), images[:1])
    assert not result.notes  # none were asked for


def test_without_bias_correction_no_bias_changes(swin_v1: nn.Module, images: Tensor) -> None:
    fake = quantized(swin_v1, recipe("int8", BIAS_CORRECTION=False))
    calibrate(fake, images)
    for layer in quantized_layers(fake).values():
        if isinstance(layer, QuantLinear):
            assert not layer.bias_correction.any()


def test_fp16_layers_need_no_ranges_vectors_nor_corrections(
    swin_v1: nn.Module, images: Tensor
) -> None:
    rule = {"PATTERN": "*", "PRECISION": "fp16"}
    fake = quantized(with_loud_channels(swin_v1), recipe("int8", LAYERS=[rule]))
    result = calibrate(fake, images)
    assert not result.vectors and not result.histograms and result.residual_max
    assert not any(q.calibrated for q in named_quantizers(fake).values())
    for layer in quantized_layers(fake).values():
        if isinstance(layer, QuantLinear):
            assert not layer.bias_correction.any() and layer.input_quantizer.amax.ndim == 0
    with torch.no_grad():
        torch.testing.assert_close(fake(images), swin_v1(images), rtol=0, atol=0.05)


# what stops it


@pytest.mark.parametrize("empty", [[], torch.zeros(0, 3, 32, 32), iter(())])
def test_no_image_at_all_is_an_error(swin_v1: nn.Module, empty: Any) -> None:
    with pytest.raises(CalibrationError, match="0 calibration images"):
        calibrate(quantized(swin_v1), empty)


@pytest.mark.parametrize("arguments", [{"method": "kl"}, {"percentile": 0.0}])
def test_wrong_arguments_are_refused_before_any_image_is_run(
    swin_v1: nn.Module, images: Tensor, arguments: dict[str, Any]
) -> None:
    fake = quantized(swin_v1)
    fake.register_forward_pre_hook(lambda module, args: pytest.fail("ran an image"))
    with pytest.raises(CalibrationError):
        calibrate(fake, images, **arguments)


Damage = Callable[[Any], None]


def _nan_weight(model: Any) -> None:
    model.layers[1].blocks[0].mlp.fc1.weight.data[3, 4] = float("nan")


def _infinite_bias(model: Any) -> None:
    model.layers[0].blocks[1].attn.proj.bias.data[0] = float("inf")


def _overflow(model: Any) -> None:
    model.layers[0].blocks[0].mlp.fc1.bias.data.fill_(9.0)
    model.layers[0].blocks[0].mlp.fc2.weight.data.fill_(3e38)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_nan_weight, r"layers\.1\.blocks\.0\.mlp\.fc2\.input_quantizer saw nan"),
        (_infinite_bias, r"layers\.0\.blocks\.1\.attn\.proj\.output_quantizer saw inf"),
        (_overflow, r"layers\.0\.blocks\.0\.mlp\.fc2\.output_quantizer saw (inf|nan)"),
    ],
)
def test_nan_and_infinity_stop_at_the_first_layer_that_has_them(
    swin_v1: nn.Module, images: Tensor, damage: Damage, named: str
) -> None:
    damage(swin_v1)
    fake = quantized(swin_v1)
    with pytest.raises(CalibrationError, match=named):
        calibrate(fake, images)
    assert all(q.observer is None for q in named_quantizers(fake).values())
    assert not any(m._forward_hooks for m in stream_modules(fake).values())


def test_the_image_with_nan_is_told_by_its_number(swin: nn.Module, images: Tensor) -> None:
    images[4, 0, 7, 7] = float("nan")
    with pytest.raises(CalibrationError, match="image 4 of rank 0"):
        calibrate(quantized(swin), images)


def test_infinity_in_the_last_write_to_the_stream_is_seen_too(
    tiny_architecture_v2: Architecture, images: Tensor
) -> None:
    swin: Any = tiny_swin(tiny_architecture_v2)
    swin.layers[1].blocks[1].norm2.weight.data[5] = float("inf")  # no quantizer comes after it
    with pytest.raises(CalibrationError, match=r"layers\.1\.blocks\.1\.stream saw (inf|nan)"):
        calibrate(quantized(swin), images)


def test_black_and_nearly_black_first_images_are_ordinary(
    swin_v1: nn.Module, images: Tensor
) -> None:
    first = torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), 1e-38)])
    runs = torch.cat([first, images]), torch.cat([images, first])
    found = []
    for run in runs:
        fake = quantized(swin_v1)
        found.append(findings(fake, calibrate(fake, run)))
    assert_same_bits(*found)


def _kill(model: Any) -> None:
    attn = model.layers[0].blocks[0].attn.qkv
    attn.weight.data[-32:], attn.bias.data[-32:] = 0.0, 0.0  # all of v, so proj's input too


def test_a_tensor_that_is_always_zero_is_an_error_that_names_it(
    swin_v1: nn.Module, images: Tensor
) -> None:
    _kill(swin_v1)
    with pytest.raises(CalibrationError, match=r"2 tensors.*attn\.proj\.input_quantizer") as error:
        calibrate(quantized(swin_v1), images)
    assert "attn.v_quantizer" in error.value.problem and "ALLOW_DEAD" in error.value.fix
    partly = recipe("int8", ALLOW_DEAD=["*.v_quantizer"])
    with pytest.raises(CalibrationError, match="1 tensors"):
        calibrate(quantized(swin_v1, partly), images)


def test_a_dead_tensor_that_the_recipe_allows_computes_zeros(
    swin_v1: nn.Module, images: Tensor
) -> None:
    _kill(swin_v1)
    allowed = recipe("int8", ALLOW_DEAD=["*.v_quantizer", "layers.0.blocks.0.attn.proj.*"])
    for method in METHODS:
        fake = quantized(swin_v1, allowed)
        result = calibrate(fake, images, method=method)
        assert any("v_quantizer" in note for note in result.notes)
        with torch.no_grad():
            wanted = swin_v1(images)
            error = float((fake(images) - wanted).norm() / wanted.norm())
        assert error < (0.35 if method == "entropy" else 0.05)


def test_dead_channels_are_noted_with_their_number(swin_v1: nn.Module, images: Tensor) -> None:
    fc2: Any = swin_v1.get_submodule("layers.1.blocks.1.mlp.fc2")
    fc2.weight.data[:3], fc2.bias.data[:3] = 0.0, 0.0
    result = calibrate(quantized(swin_v1), images)
    name = "layers.1.blocks.1.mlp.fc2"
    assert f"{name}.output_quantizer: 3 of 64 channels are zero" in result.notes
    assert f"{name}.weight_quantizer: 3 of 64 channels are zero" in result.notes
    assert len([note for note in result.notes if "zero" in note]) == 2


def test_a_layer_rule_keeps_its_precision_through_calibration(
    swin_v1: nn.Module, images: Tensor
) -> None:
    fake = quantized(swin_v1, QuantSpec(layers=(LayerRule("*.fc1", "fp16"),)))
    calibrate(fake, images)
    assert quantized_layers(fake)["layers.0.blocks.0.mlp.fc1"].precision == "fp16"
